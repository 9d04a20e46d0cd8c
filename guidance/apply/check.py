"""The check before the first guided step: a gradient that exists, is finite and is that of the denoiser's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from guidance.apply.values import Call
from guidance.models.denoiser import is_offloaded
from guidance.models.types import Denoiser
from guidance.taps.hooks import X0, X0_THROUGH_UNET, PulledBack, find_detached, read_until
from guidance.utils.errors import UserError

#: Steps of the finite differences, relative to the input's RMS, in float32 and in half precision.
_STEPS, _STEPS_HALF = (3e-3, 1e-3), (1e-1, 5e-2)


def check_gradient(guided: Any, call: Call, pulled: PulledBack) -> None:
    """Compare a gradient with finite differences of the features that it comes from, for one sample.

    The gradient pulls ``v``, a gradient at the taps, back to the input: ``g = J^T v``, so that ``<v, h(x)>`` rises by
    ``<g, u>`` along ``u``: the gradient itself, and in float32 a random direction.  A few forwards of the encoder half
    for one sample.  Nothing is said where the slopes to both sides differ as much, as they do in coarse precision.

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

    def forward(x: Tensor) -> Any:
        return guided.call(one._replace(x_t=x), tapped=True)

    def value(x: Tensor) -> float:
        found = read_until(lambda: forward(x), guided.denoiser, taps)
        return float(sum((v[tap] * found[tap].double()).sum() for tap in taps))

    wrong = _disagreement(value, one.x_t, g[k : k + 1])
    if wrong is None and not _is_coarse(one.x_t):
        return
    found = find_detached(forward, guided.denoiser, one.x_t, taps, swaps_weights=guided.swaps_weights)
    detached = [name for name in found if wrong or _is_attention(guided, name)]
    if wrong is None and not detached:
        return
    culprit = "a processor, a cast or a compiled module before it"
    if detached:
        module = guided.denoiser.get_submodule(detached[0])
        culprit = f"'{detached[0]}' ({type(getattr(module, 'processor', module)).__name__})"
    slopes = "" if wrong is None else f" (slope {wrong[1]:.4g}, by finite differences {wrong[0]:.4g})"
    raise UserError(
        f"Expected the gradient at '{', '.join(taps)}' to be that of the latents, got another{slopes}: {culprit} cuts "
        "it; put an ordinary processor there, pipe.unet.set_attn_processor(AttnProcessor2_0()), or take off what "
        "changes the denoiser's backward."
    )


def _is_coarse(x: Tensor) -> bool:
    """Tell whether finite differences are coarse."""
    rounded = x.dtype in (torch.float16, torch.bfloat16) or torch.get_float32_matmul_precision() == "medium"
    return rounded or torch.is_autocast_enabled(x.device.type)


def _is_attention(guided: Any, name: str) -> bool:
    return hasattr(guided.denoiser.get_submodule(name), "processor")


def _disagreement(value: Callable[[Tensor], float], x: Tensor, g: Tensor) -> tuple[float, float] | None:
    """Return a slope as it is and as the gradient has it, if they differ at both step sizes; None if not."""
    half = _is_coarse(x)
    noise = torch.randn(g.shape, generator=torch.Generator().manual_seed(0)).to(g)
    directions = [noise] if not g.any() else [g] if half else [g, noise]
    middle, rms = value(x), x.float().square().mean().sqrt()
    for direction in directions:
        unit = (direction / direction.double().square().mean().sqrt()).to(g.dtype)
        slopes = [_slopes(value, middle, x, unit, g, step * rms) for step in (_STEPS_HALF if half else _STEPS)]
        if all(abs(got - wanted) > 3 * spread + 0.05 * max(abs(got), abs(wanted)) for got, wanted, spread in slopes):
            return slopes[-1][:2]
    return None


def _slopes(
    value: Callable[[Tensor], float], middle: float, x: Tensor, unit: Tensor, g: Tensor, size: Tensor
) -> tuple[float, float, float]:
    """Return the slope along a direction by central differences, that of the gradient, and how the two sides differ."""
    above, below = ((x + sign * size * unit).to(x.dtype) for sign in (1, -1))
    up, down = value(above) - middle, middle - value(below)
    wanted = float((g.double() * (above.double() - below.double())).sum()) / 2
    found, spread, wanted = (v / float(size) for v in ((up + down) / 2, abs(up - down), wanted))
    return found, wanted, spread


def _offloads(denoiser: Denoiser) -> bool:
    """Tell whether any module is moved between devices by hooks, which an early stop would leave half done."""
    return any(hasattr(module, "_hf_hook") for module in denoiser.modules())


def recomputes(denoiser: Denoiser) -> bool:
    """Tell whether gradient checkpointing runs blocks a second time, outside of the forward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in denoiser.modules())


def swaps_weights(denoiser: Denoiser) -> bool:
    """Tell whether layers have other weights during their forward than after it: layerwise casts, group offloading."""
    registries = (getattr(module, "_diffusers_hook", None) for module in denoiser.modules())
    return any({"layerwise_casting", "group_offloading"} & set(getattr(r, "hooks", ())) for r in registries)
