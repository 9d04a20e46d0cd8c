"""Apply guides to a pipeline: as its denoiser's forward, in a guider of diffusers, or as a callback."""

from typing import TYPE_CHECKING

from guidance.utils.lazy import lazy_names

if TYPE_CHECKING:
    from guidance.apply.apply import apply_guidance as apply_guidance
    from guidance.apply.callback import MoveLatents as MoveLatents
    from guidance.apply.forward import GuidanceHandle as GuidanceHandle
    from guidance.apply.forward import cfg_parts as cfg_parts
    from guidance.apply.guider import GuidesGuider as GuidesGuider
    from guidance.apply.step import StepRecord as StepRecord

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
