"""Find the denoiser of a pipeline, its device, its signature and the fingerprint of its weights."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from guidance.models.layouts import SUPPORTED
from guidance.models.types import Denoiser, Pipeline
from guidance.utils.errors import UserError

#: First argument of the forward of UNets and of transformers.
_SAMPLES = ("sample", "hidden_states")


def called_denoiser(pipe: Pipeline) -> Denoiser:
    """Return the module that a pipeline calls as its denoiser: its UNet or transformer."""
    for name in ("unet", "transformer"):
        if (module := getattr(pipe, name, None)) is not None:
            return module
    raise UserError(
        f"Expected a pipeline with a unet or a transformer, got {type(pipe).__name__}, which has none; supported "
        f"are {', '.join(SUPPORTED)}."
    )


def denoiser_of(pipe: Pipeline) -> Denoiser:
    """Return the denoiser itself: the module inside, where :func:`called_denoiser` is wrapped by ``torch.compile``."""
    called = called_denoiser(pipe)
    return getattr(called, "_orig_mod", called)


def device_of(pipe: Pipeline) -> torch.device:
    """Return the device of the denoiser's computation, even while offloading keeps its weights elsewhere."""
    denoiser = denoiser_of(pipe)
    return torch.device(pipe._execution_device if is_offloaded(denoiser) else denoiser.device)


def is_offloaded(module: nn.Module) -> bool:
    """Tell whether hooks of accelerate or diffusers offload a module's weights."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def fingerprint_of(pipe: Pipeline) -> str | None:
    """Return the :func:`fingerprint` of the denoiser; None while its weights are offloaded to disk or meta."""
    denoiser = denoiser_of(pipe)
    return None if any(p.is_meta for p in denoiser.parameters()) else fingerprint(denoiser)


def signature_of(denoiser: nn.Module) -> tuple[inspect.Signature, str]:
    """Return the signature of a denoiser's forward, and the name of its first argument."""
    signature = inspect.signature(type(denoiser).forward)  # hooks of offloading replace the instance's
    names = [name for name in signature.parameters if name != "self"]
    if not names or names[0] not in _SAMPLES or "timestep" not in names:
        raise UserError(
            f"Expected a denoiser called with a sample and a timestep, got {type(denoiser).__name__}; supported "
            f"pipelines are {', '.join(SUPPORTED)}."
        )
    return signature, names[0]


@contextmanager
def frozen(denoiser: nn.Module) -> Iterator[None]:
    """Switch off gradients of weights, so that fewer activations are kept; by name, since offloading replaces them."""
    trainable = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    try:
        denoiser.requires_grad_(False)
        yield
    finally:
        for name, p in denoiser.named_parameters():
            p.requires_grad_(p.requires_grad or name in trainable)


def latent_channels(unet: Denoiser) -> int:
    """Return the channels of a denoiser's latents: without an inpainting mask or a learned variance."""
    return int(min(unet.config.in_channels, unet.config.out_channels))


def fingerprint(model: nn.Module) -> str:
    """Identify weights: 12 hex digits of a hash over names, shapes and a few numbers of every parameter.

    Reads 8 values per tensor in float16 (so half and full precision copies agree), in milliseconds.
    """
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        flat = p.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 8)][:8]
        digest.update(f"{name}{tuple(p.shape)}".encode())
        digest.update(picked.to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()[:12]
