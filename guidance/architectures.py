"""UNets of published models by their shape, with random weights: for what depends on shapes, not on values.

No hub is needed; speed, memory, FLOPs and the exactness of gradients are those of the real model.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from guidance.errors import UserError, nearest

_SD: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
}

#: name -> arguments of UNet2DConditionModel, from the models' published unet/config.json.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd-1.5": _SD | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd-2.1-base": _SD
    | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}


def build_unet(name: str, *, seed: int = 0) -> UNet2DConditionModel:
    """Build a model's UNet with random weights, frozen, in eval mode.

    Args:
        name: Key of :data:`ARCHITECTURES`.
        seed: Of the weights.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"Expected the name of an architecture, got '{name}'.{nearest(name, ARCHITECTURES)}")
    torch.manual_seed(seed)
    return UNet2DConditionModel(**ARCHITECTURES[name]).eval().requires_grad_(False)
