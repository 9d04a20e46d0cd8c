"""Apply guides to a pipeline: as its denoiser's forward, in a guider of diffusers, or as a callback."""

from typing import TYPE_CHECKING

from guidance.utils.lazy import lazy_names

if TYPE_CHECKING:
    from guidance.apply.apply import apply_guidance as apply_guidance
    from guidance.apply.callback import MoveLatents as MoveLatents
    from guidance.apply.guider import GuidesGuider as GuidesGuider
    from guidance.apply.values import GuidanceHandle as GuidanceHandle
    from guidance.apply.values import Observation as Observation
    from guidance.apply.values import Observer as Observer
    from guidance.apply.values import StepRecord as StepRecord

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
