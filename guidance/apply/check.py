"""The check before the first guided step: a gradient that exists, is finite and is that of the denoiser's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guidance.apply.values import Arguments, Call
from guidance.models.denoiser import is_offloaded
from guidance.models.types import Denoiser
from guidance.taps.hooks import X0, X0_THROUGH_UNET, PulledBack, find_detached, read_until
from guidance.utils.errors import UserError

#: Steps of the finite differences, relative to the input's RMS, largest first.
_STEPS = (1e-2, 1e-3)
_STEPS_HALF = (1e-1, 3e-2)

#: Relative difference between the slopes to both sides up to which they are a measurement, and of the gradient from
#: them from which on it is wrong.
_CONSISTENT, _WRONG = 0.2, 0.2


def check_gradient(guided: Any, call: Call, pulled: PulledBack) -> None:
    """Compare a gradient with finite differences of the features that it comes from, for one sample.

    The gradient pulls ``v``, a gradient at the taps, back to the input: ``g = J^T v``, so that ``<v, h(x)>`` rises by
    ``<g, u>`` along ``u``.  Three forwards of the encoder half for one sample; nothing is said where the slopes to both
    sides differ, as with coarse precision.

    Args:
        guided: The :class:`~guidance.apply.guided.GuidedDenoiser`.
        call: The call.
        pulled: The gradient of one group of guides.

    Raises:
        UserError: If the gradient is not finite for any sample, or not that of the features.
    """
    g, taps = pulled.gradient, list(pulled.at_taps)
    finite = g.flatten(1).isfinite().all(1)
    if not finite.any():
        raise UserError(
            "Expected a finite gradient in the first guided step, got none for any sample; run the model in bfloat16 "
            "or float32, and check the guide's score."
        )
    if {X0, X0_THROUGH_UNET} & set(taps) or is_offloaded(guided.denoiser) or _offloads(guided.denoiser):
        return
    k = int(torch.where(finite, g.flatten(1).norm(dim=1), -1.0).argmax())
    one = guided.one(call, k)
    v = {tap: h[k : k + 1].double() for tap, h in pulled.at_taps.items()}

    def value(x: Tensor) -> float:
        found = read_until(lambda: guided.call(one._replace(x_t=x), tapped=True), guided.denoiser, taps)
        return float(sum((v[tap] * found[tap].double()).sum() for tap in taps))

    wrong = _disagreement(value, one.x_t, g[k : k + 1])
    if wrong is not None:
        raise _explain(guided, one, taps, *wrong)


def _disagreement(value: Any, x: Tensor, g: Tensor) -> tuple[float, float] | None:
    """Return the slope along the gradient as it should be and as it is, if they differ; None if not, or unknown."""
    half = x.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(x.device.type)
    direction = g if bool(g.any()) else x
    unit = (direction / direction.double().square().mean().sqrt()).to(g.dtype)
    middle = value(x)
    for step in _STEPS_HALF if half else _STEPS:
        size = step * x.float().square().mean().sqrt()
        above, below = ((x + sign * size * unit.to(x)).to(x.dtype) for sign in (1, -1))
        up, down = value(above) - middle, middle - value(below)
        measured, expected = (up + down) / 2, float((g.double() * (above.double() - below.double())).sum()) / 2
        if abs(up - down) <= _CONSISTENT * abs(measured):
            wrong = abs(measured - expected) > _WRONG * max(abs(measured), abs(expected))
            return (measured / float(size), expected / float(size)) if wrong else None
    return None


def _explain(guided: Any, one: Arguments, taps: list[str], measured: float, expected: float) -> UserError:
    """Name what cuts the gradient, if it is a module that detaches its output."""
    names = find_detached(lambda x: guided.call(one._replace(x_t=x), tapped=True), guided.denoiser, one.x_t, taps)
    culprit = "a processor, a cast or a compiled module before it"
    if names:
        module = guided.denoiser.get_submodule(names[0])
        processor = getattr(module, "processor", None)
        culprit = f"'{names[0]}' ({type(module if processor is None else processor).__name__})"
    return UserError(
        f"Expected the gradient at '{', '.join(taps)}' to be that of the latents, slope {measured:.4g} by finite "
        f"differences, got {expected:.4g}: {culprit} cuts the gradient; call pipe.unet.set_default_attn_processor(), "
        "or take off what changes the denoiser's backward."
    )


def _offloads(denoiser: Denoiser) -> bool:
    """Tell whether any module is moved between devices by hooks, which an early stop would leave half done."""
    return any(hasattr(module, "_hf_hook") for module in denoiser.modules())


def recomputes(denoiser: Denoiser) -> bool:
    """Tell whether gradient checkpointing runs blocks a second time, outside of the forward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in denoiser.modules())


def casts_layerwise(denoiser: Denoiser) -> bool:
    """Tell whether layers cast their weights to another precision for their forward only."""
    registries = (getattr(module, "_diffusers_hook", None) for module in denoiser.modules())
    return any("layerwise_casting" in getattr(registry, "hooks", {}) for registry in registries)
