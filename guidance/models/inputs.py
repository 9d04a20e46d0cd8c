"""Build denoiser inputs of the right shapes by class, to count FLOPs and list taps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from guidance.models.types import ModelConfig
from guidance.utils.errors import UserError

#: Text tokens of the published pipelines: of one CLIP, of CLIP and T5, of T5 alone.
_CLIP_TOKENS, _SD3_TOKENS, _T5_TOKENS, _PIXART_TOKENS = 77, 333, 512, 300


def build_inputs(model: nn.Module, latent_size: int | None, batch: int) -> tuple[Tensor, dict[str, Any]]:
    """Return the first argument and the others of a forward: zeros, on the model's device, in its precision."""
    name = type(model).__name__
    if name not in _INPUTS:
        known = ", ".join(_INPUTS)
        raise UserError(f"Expected a denoiser whose inputs are known, got {name}; those known are {known}.")
    config: ModelConfig = model.config
    side = latent_size or config.get("sample_size") or 128  # Flux: 1024 px
    size = tuple(side) if isinstance(side, list | tuple) else (side, side)
    with model.device:
        inputs = {"timestep": torch.zeros(batch), **_INPUTS[name](config, batch)}
        inputs = {name: _cast(value, model.dtype) for name, value in inputs.items()}
        if name == "FluxTransformer2DModel":
            return _pack(config, size, inputs)
        x = torch.zeros(batch, config.in_channels, *size, dtype=model.dtype)
    patch = config.get("patch_size") or 1
    most = (config.get("pos_embed_max_size") or size[0]) * patch
    if size[0] % patch or size[0] > most:
        raise UserError(f"Expected a latent-size that is a multiple of {patch}, at most {most}, got {size[0]}.")
    return x, inputs


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _cast(v, dtype) for name, v in value.items()}
    return value.to(dtype) if value.is_floating_point() else value


def _unet_2d_condition(config: ModelConfig, b: int) -> dict[str, Any]:
    width = config.cross_attention_dim
    text = torch.zeros(b, _CLIP_TOKENS, width[0] if isinstance(width, list | tuple) else width)
    if config.get("addition_embed_type") not in (None, "text_time") or config.get("class_embed_type"):
        raise UserError(
            "Expected a UNet conditioned on text, on sizes as SDXL is, or on class labels, got "
            f"addition_embed_type={config.get('addition_embed_type')}, class_embed_type="
            f"{config.get('class_embed_type')}; its taps can be used, but not be listed."
        )
    inputs = {"encoder_hidden_states": text, **_labels(config, b)}
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(b, pooled), "time_ids": torch.zeros(b, 6)}
    return inputs


def _labels(config: ModelConfig, b: int) -> dict[str, Any]:
    classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    return {"class_labels": torch.zeros(b, dtype=torch.long)} if classes else {}


def _pixart(config: ModelConfig, b: int) -> dict[str, Any]:
    text = torch.zeros(b, _PIXART_TOKENS, config.caption_channels)
    sizes = {"resolution": torch.zeros(b, 2), "aspect_ratio": torch.zeros(b, 1)}
    return {"encoder_hidden_states": text, "added_cond_kwargs": sizes}


def _joint(tokens: int) -> Callable[[ModelConfig, int], dict[str, Any]]:
    """Return inputs with states of every text token and one of the whole text, as SD3 and Flux take them."""

    def inputs(config: ModelConfig, b: int) -> dict[str, Any]:
        text = torch.zeros(b, tokens, config.joint_attention_dim)
        return {"encoder_hidden_states": text, "pooled_projections": torch.zeros(b, config.pooled_projection_dim)}

    return inputs


def _pack(config: ModelConfig, size: tuple[int, ...], inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Pack 2 x 2 latents into one token as Flux does, and add position ids, on the CPU even for meta models."""
    if size[0] % 2:
        raise UserError(f"Expected a latent-size that is a multiple of 2, got {size[0]}.")
    text, batch = inputs["encoder_hidden_states"], len(inputs["timestep"])
    sides = [torch.arange(n // 2, device="cpu").float() for n in size]
    ids = torch.cartesian_prod(torch.zeros(1, device="cpu"), *sides)
    more = {"img_ids": ids, "txt_ids": torch.zeros(text.shape[1], 3, device="cpu")}
    if config.guidance_embeds:
        more["guidance"] = torch.zeros(batch, dtype=text.dtype)
    return torch.zeros(batch, len(ids), config.in_channels, dtype=text.dtype), inputs | more


#: Class -> the arguments of a forward besides latents and timestep.
_INPUTS: dict[str, Callable[[ModelConfig, int], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet_2d_condition,
    "UNet2DModel": _labels,
    "DiTTransformer2DModel": _labels,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _joint(_SD3_TOKENS),
    "FluxTransformer2DModel": _joint(_T5_TOKENS),
}
