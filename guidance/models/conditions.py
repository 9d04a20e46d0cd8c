"""Encode prompts for a denoiser: text states, and the added conditions of SDXL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guidance.models.denoiser import denoiser_of, device_of
from guidance.models.types import ModelConfig, Pipeline
from guidance.utils.errors import UserError


def encode_prompts(
    pipe: Pipeline, prompts: Sequence[str], negative: str = "", *, classifier_free: bool = True
) -> dict[str, Any]:
    """Return the arguments of the denoiser besides its input and the timestep.

    Args:
        pipe: Stable Diffusion 1, 2 or XL.
        prompts: One per sample; b samples.
        negative: Prompt of the unconditional part; for "" SDXL's zeros where the pipeline uses them, as in diffusers.
        classifier_free: Whether there is an unconditional part.

    Returns:
        ``encoder_hidden_states`` (b or 2b, n, d), the unconditional part first.  For SDXL also ``added_cond_kwargs``:
        ``text_embeds`` (b or 2b, d2) and ``time_ids`` (b or 2b, 6), for a square image of the model's own size,
        uncropped.
    """
    config = denoiser_of(pipe).config
    kind = config.get("addition_embed_type")
    zeros = not negative and getattr(pipe, "config", {}).get("force_zeros_for_empty_prompt", False)
    encoded = pipe.encode_prompt(
        prompt=list(prompts),
        device=device_of(pipe),
        num_images_per_prompt=1,
        do_classifier_free_guidance=classifier_free,
        negative_prompt=None if zeros else [negative] * len(prompts),
    )

    def batch(cond: Tensor, uncond: Tensor | None) -> Tensor:
        return torch.cat([uncond, cond]) if classifier_free else cond

    states = {"encoder_hidden_states": batch(*encoded[:2])}
    if kind is None:
        return states
    pooled = encoded[2:4] if kind == "text_time" and len(encoded) == 4 else [None]
    ids = _ids(config, pipe)
    if pooled[0] is None or _width(config, pooled[0], ids) != config.projection_class_embeddings_input_dim:
        raise UserError(
            f"Expected a denoiser conditioned on text, or on sizes as SDXL's base model is, got {kind} of "
            f"{type(pipe).__name__}; use apply_guidance(pipe, guides) and call the pipeline."
        )
    texts = batch(*pooled)
    added = {"text_embeds": texts, "time_ids": ids.to(texts).expand(len(texts), -1)}
    return states | {"added_cond_kwargs": added}


def _ids(config: ModelConfig, pipe: Pipeline) -> Tensor:
    """Return original size, top left corner of the crop and target size, in pixels, rows first."""
    side = float(config.sample_size * pipe.vae_scale_factor)
    return torch.tensor([[side, side, 0.0, 0.0, side, side]])


def _width(config: ModelConfig, pooled: Tensor, ids: Tensor) -> int:
    return int(pooled.shape[-1] + ids.shape[-1] * config.addition_time_embed_dim)


def pick(conditions: Mapping[str, Any], rows: slice | NDArray[np.int64]) -> dict[str, Any]:
    """Return the conditions of some samples of a batch, by index."""
    return {k: pick(v, rows) if isinstance(v, Mapping) else v[rows] for k, v in conditions.items()}


def last(conditions: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the conditions of the last ``count`` samples of a batch: of the conditional part, or of all."""
    return pick(conditions, slice(-count, None))
