"""Guides: one method a file, behind the small protocol of :mod:`guidance.guides.base`."""

from typing import TYPE_CHECKING

from guidance.utils.lazy import lazy_names

if TYPE_CHECKING:
    from guidance.guides.amortised import AmortisedGuide as AmortisedGuide
    from guidance.guides.base import DirectGuide as DirectGuide
    from guidance.guides.base import Guide as Guide
    from guidance.guides.base import ScoringGuide as ScoringGuide
    from guidance.guides.base import register_guide as register_guide
    from guidance.guides.clip import ClipGuide as ClipGuide
    from guidance.guides.embedding import EmbeddingGuide as EmbeddingGuide
    from guidance.guides.midblock import MidBlockGuide as MidBlockGuide
    from guidance.guides.registry import read_guide as read_guide

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
