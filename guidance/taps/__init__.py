"""Taps: where features of a denoiser are read. The only code of the library that touches hooks."""

from guidance.taps.hooks import (
    X0,
    X0_THROUGH_UNET,
    capture,
    encode_features,
    forward_with_gradient,
    watch,
    whole_blocks,
)

__all__ = ["X0", "X0_THROUGH_UNET", "capture", "encode_features", "forward_with_gradient", "watch", "whole_blocks"]
