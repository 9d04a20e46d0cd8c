"""Guidance research toolkit: small heads on mid-block activations guide diffusion models.

Names are imported on first use, so that ``import guidance`` and every script's ``--help`` are instant.
"""

from typing import TYPE_CHECKING

from guidance.utils.lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from guidance.apply.apply import apply_guidance as apply_guidance
    from guidance.apply.callback import MoveLatents as MoveLatents
    from guidance.apply.guider import GuidesGuider as GuidesGuider
    from guidance.data.cache import FeatureCache as FeatureCache
    from guidance.guides.amortised import AmortisedGuide as AmortisedGuide
    from guidance.guides.base import DirectGuide as DirectGuide
    from guidance.guides.base import Guide as Guide
    from guidance.guides.base import ScoringGuide as ScoringGuide
    from guidance.guides.clip import ClipGuide as ClipGuide
    from guidance.guides.embedding import EmbeddingGuide as EmbeddingGuide
    from guidance.guides.midblock import MidBlockGuide as MidBlockGuide
    from guidance.guides.registry import read_guide as read_guide
    from guidance.heads.adapter import load_adapter as load_adapter
    from guidance.heads.config import HeadConfig as HeadConfig
    from guidance.heads.networks import build_head as build_head
    from guidance.heads.networks import load_head as load_head
    from guidance.heads.networks import save_head as save_head
    from guidance.models.clip import load_clip as load_clip
    from guidance.models.pipelines import load_pipeline as load_pipeline
    from guidance.sampling.cfg import ClassifierFree as ClassifierFree
    from guidance.sampling.loop import decode_latents as decode_latents
    from guidance.sampling.loop import sample_images as sample_images
    from guidance.sampling.loop import sample_latents as sample_latents
    from guidance.sampling.start import FromImage as FromImage
    from guidance.sampling.start import FromMask as FromMask
    from guidance.sampling.steering import best_of_n as best_of_n
    from guidance.sampling.steering import steer_latents as steer_latents
    from guidance.schedule import NoiseSchedule as NoiseSchedule
    from guidance.taps.hooks import capture as capture
    from guidance.taps.hooks import encode_features as encode_features
    from guidance.utils.errors import UserError as UserError

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
