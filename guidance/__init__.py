"""Guidance research toolkit: small heads on mid-block activations guide diffusion models.

Names are imported on first use, so that ``import guidance`` and every script's ``--help`` are instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guidance.adapter import load_adapter as load_adapter
    from guidance.apply import apply_guidance as apply_guidance
    from guidance.clip import load_clip as load_clip
    from guidance.errors import UserError as UserError
    from guidance.features import FeatureCache as FeatureCache
    from guidance.guides import Guide as Guide
    from guidance.guides import MidBlockGuide as MidBlockGuide
    from guidance.guides.amortised import AmortisedGuide as AmortisedGuide
    from guidance.guides.clip import ClipGuide as ClipGuide
    from guidance.guides.embedding import EmbeddingGuide as EmbeddingGuide
    from guidance.heads import build_head as build_head
    from guidance.heads import load_head as load_head
    from guidance.heads import save_head as save_head
    from guidance.pipelines import load_pipeline as load_pipeline
    from guidance.sampling import decode_latents as decode_latents
    from guidance.sampling import sample_images as sample_images
    from guidance.sampling import sample_latents as sample_latents
    from guidance.schedule import NoiseSchedule as NoiseSchedule
    from guidance.start import FromImage as FromImage
    from guidance.start import FromMask as FromMask
    from guidance.steering import best_of_n as best_of_n
    from guidance.steering import steer_latents as steer_latents
    from guidance.taps import capture as capture
    from guidance.taps import encode_features as encode_features

_HOME = {
    "AmortisedGuide": "guides.amortised",
    "ClipGuide": "guides.clip",
    "EmbeddingGuide": "guides.embedding",
    "FeatureCache": "features",
    "FromImage": "start",
    "FromMask": "start",
    "Guide": "guides",
    "MidBlockGuide": "guides",
    "NoiseSchedule": "schedule",
    "UserError": "errors",
    "apply_guidance": "apply",
    "best_of_n": "steering",
    "build_head": "heads",
    "capture": "taps",
    "decode_latents": "sampling",
    "encode_features": "taps",
    "load_adapter": "adapter",
    "load_clip": "clip",
    "load_head": "heads",
    "load_pipeline": "pipelines",
    "sample_images": "sampling",
    "sample_latents": "sampling",
    "save_head": "heads",
    "steer_latents": "steering",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'guidance' has no attribute '{name}'")
    return getattr(importlib.import_module(f"guidance.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
