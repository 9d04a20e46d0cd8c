"""What a guide is: a score of what the denoiser sees, and how strongly, when and in which space it pushes.

One method a file beside this one.  :mod:`guidance.apply` turns guides into a shift of the denoiser's output.
"""

from __future__ import annotations

import dataclasses
import math
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from guidance.guides.phases import step_phases
from guidance.models.types import Pipeline
from guidance.utils.errors import UserError

#: Prompts of the conditional part of the batch, set by our own loop; None inside other pipelines.
run_prompts: ContextVar[tuple[str, ...] | None] = ContextVar("run_prompts", default=None)

#: Factors of all guides' scales, one for each sample of the conditional part, set by our own loop; None: 1.
run_factors: ContextVar[tuple[float, ...] | None] = ContextVar("run_factors", default=None)

SPACES = ("eps", "x")

NORMALIZE = ("cfg", None)


@dataclasses.dataclass(frozen=True)
class Strength:
    """How strongly and when a guide pushes.

    Attributes:
        guidance_scale: Factor of the gradient; negative pushes away, 0 does nothing.
        normalize: "cfg" makes the scale portable: per sample, the shift's RMS is ``guidance_scale`` times the RMS of
            ``eps_cond - eps_uncond`` (of eps itself without classifier-free guidance).  None: the raw gradient,
            ``eps - guidance_scale * sigma_t * grad log p`` (Dhariwal and Nichol 2021, algorithm 2).
        start, stop: Fractions of the sampling steps, 0 is the first (pure noise), 1 the end.
        every: Take a gradient each ``every``-th step and reuse the last shift's direction between.
        space: "eps" shifts the prediction; "x" moves the latents between steps, ``x <- x + s grad`` (the mid-u
            report's form; its total strength grows with the number of steps, and ``normalize`` must be None).
    """

    guidance_scale: float = 1.0
    normalize: str | None = "cfg"
    start: float = 0.0
    stop: float = 1.0
    every: int = 1
    space: str = "eps"

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise UserError(
                f"Expected a finite guidance_scale, got {self.guidance_scale}; 0 turns the guide off."
            )
        if self.normalize not in NORMALIZE:
            raise UserError(f"Expected normalize 'cfg' or None, got {self.normalize!r}.")
        if self.space not in SPACES:
            raise UserError(f"Expected space 'eps' or 'x', got {self.space!r}.")
        if self.space == "x" and self.normalize is not None:
            raise UserError(
                "Expected normalize=None with space='x', which has no portable scale; or use space='eps'."
            )
        if not 0 <= self.start < self.stop <= 1:
            raise UserError(f"Expected 0 <= start < stop <= 1, got start={self.start}, stop={self.stop}.")
        if self.every < 1:
            raise UserError(f"Expected every >= 1, got {self.every}; 1 takes a gradient at each step.")

    @classmethod
    def within(
        cls, own: tuple[float, float], *, start: float | None, stop: float | None, **options: Any
    ) -> Strength:
        """Build the strength of a guide that has a range of its own, as trained heads and adapters do.

        Args:
            own: The guide's own range, fractions of the steps.
            start, stop: The user's choice; None takes the guide's own.
            **options: The other attributes.

        Raises:
            UserError: If a value is out of range.
        """
        start = own[0] if start is None else start
        return cls(start=start, stop=own[1] if stop is None else stop, **options)

    def active(self, fraction: float) -> bool:
        """Tell whether the guide pushes at this fraction of the steps (0 first, below 1 last)."""
        return self.guidance_scale != 0 and self.start <= fraction < self.stop

    def phases(self, num_steps: int, first: int = 0) -> list[str]:
        """What the guide does in each step of a run, see :func:`guidance.guides.phases.step_phases`."""
        start, stop = (self.start, self.stop) if self.guidance_scale != 0 else (1.0, 1.0)
        return step_phases(start, stop, self.every, num_steps, first)


@runtime_checkable
class Guide(Protocol):
    """Scores features at a tap; everything :func:`guidance.apply_guidance` needs.

    ``tap`` is the name of a module of the denoiser, or :data:`guidance.taps.hooks.X0` (the features are the x0
    predicted by the conditional part, in the model's latent space; their gradient is taken there, as MPGD does), or
    :data:`guidance.taps.hooks.X0_THROUGH_UNET` (the same with the exact gradient).  Instead of ``score`` a guide may
    have a method ``direction(x_t, eps, x0, t)`` that returns a direction of the latents itself, (b, c, y, x), without
    any gradient.
    """

    name: str
    tap: str
    strength: Strength

    def prepare(self, pipe: Pipeline) -> None:
        """Check that the guide fits the pipeline (UserError if not) and move to its device."""

    def score(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Differentiable score of features at timesteps ``t``, float32 or float64; larger is better."""


def is_direct(guide: Guide) -> bool:
    """Tell whether a guide gives directions of the latents itself, so that no gradient is taken."""
    return hasattr(guide, "direction")


def describe_scorer(guide: Guide) -> dict[str, Any]:
    """What a record says of a guide that scores and does not push: its name, its networks, what it asks of them.

    A guide says the last two by a method ``describe``: "networks" are fingerprints of weights, which must not grade
    what they have chosen.
    """
    return {"guide": guide.name, **(guide.describe() if hasattr(guide, "describe") else {})}


def scale_for(guide: Guide, like: Tensor) -> float | Tensor:
    """A guide's scale: a number, or with ``run_factors`` one for each sample, (b, 1, ...) as ``like`` has axes."""
    factors, scale = run_factors.get(), guide.strength.guidance_scale
    if factors is None:
        return scale
    return scale * torch.tensor(factors, dtype=like.dtype, device=like.device).reshape(
        -1, *[1] * (like.ndim - 1)
    )


def rms(x: Tensor) -> Tensor:
    """Root mean square per sample, kept broadcastable: (b, ...) -> (b, 1, ...)."""
    return x.square().mean(dim=tuple(range(1, x.ndim)), keepdim=True).sqrt()


def unit_rms(x: Tensor) -> Tensor:
    """Scale each sample to RMS 1; zeros stay zeros."""
    size = rms(x)
    return x / torch.where(size > 0, size, 1.0)
