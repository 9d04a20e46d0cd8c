"""Guides: one method a file, behind the small protocol of :mod:`guidance.guides.base`."""

from guidance.guides.base import Guide, Strength
from guidance.guides.midblock import MidBlockGuide

__all__ = ["Guide", "MidBlockGuide", "Strength"]
