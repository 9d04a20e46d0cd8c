"""Taps: where features of a denoiser are read. The only code of the library that touches hooks."""

from typing import TYPE_CHECKING

from guidance.utils.lazy import lazy_names

if TYPE_CHECKING:
    from guidance.taps.hooks import X0 as X0
    from guidance.taps.hooks import X0_THROUGH_UNET as X0_THROUGH_UNET
    from guidance.taps.hooks import capture as capture
    from guidance.taps.hooks import encode_features as encode_features
    from guidance.taps.hooks import forward_with_gradient as forward_with_gradient
    from guidance.taps.hooks import watch as watch
    from guidance.taps.hooks import whole_blocks as whole_blocks

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
