"""The sampling loop, classifier-free guidance, where sampling starts, and steering without gradients."""

from typing import TYPE_CHECKING

from guidance.utils.lazy import lazy_names

if TYPE_CHECKING:
    from guidance.sampling.cfg import ClassifierFree as ClassifierFree
    from guidance.sampling.loop import decode_latents as decode_latents
    from guidance.sampling.loop import sample_images as sample_images
    from guidance.sampling.loop import sample_latents as sample_latents
    from guidance.sampling.loop import using_scheduler as using_scheduler
    from guidance.sampling.start import FromImage as FromImage
    from guidance.sampling.start import FromMask as FromMask
    from guidance.sampling.steering import best_of_n as best_of_n
    from guidance.sampling.steering import steer_latents as steer_latents

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
