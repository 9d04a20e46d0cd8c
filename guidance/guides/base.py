"""The protocol of guides: a score of features of the denoiser, and its strength, interval and space.

Each guidance method has a file beside this one.  :mod:`guidance.apply` turns guides into a shift of the denoiser's
output.
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

#: Prompts of the conditional part of the batch, set by our sampling loop; None inside other pipelines.
run_prompts: ContextVar[tuple[str, ...] | None] = ContextVar("run_prompts", default=None)

#: Factors of all guides' scales, one per sample of the conditional part, set by our sampling loop; None: 1.
run_factors: ContextVar[tuple[float, ...] | None] = ContextVar("run_factors", default=None)

SPACES = ("eps", "x")

NORMALIZE = ("cfg", None)


@dataclasses.dataclass(frozen=True)
class Strength:
    """Strength, interval and space of a guide.

    Attributes:
        guidance_scale: Factor of the gradient; a negative one pushes away, 0 does nothing.
        normalize: "cfg" makes the scale portable: per sample, the shift's RMS is ``guidance_scale`` times the RMS of
            ``eps_cond - eps_uncond`` (of eps itself without classifier-free guidance).  None: the raw gradient,
            ``eps - guidance_scale * sigma_t * grad log p`` (Dhariwal and Nichol 2021, algorithm 2).
        start, stop: Fractions of the sampling steps; 0 is the first step (pure noise), 1 the end.
        every: Take a gradient every ``every``-th step and reuse the direction of the last shift in between.
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
            raise UserError(f"Expected a finite guidance_scale, got {self.guidance_scale}; 0 turns the guide off.")
        if self.normalize not in NORMALIZE:
            raise UserError(f"Expected normalize 'cfg' or None, got {self.normalize!r}.")
        if self.space not in SPACES:
            raise UserError(f"Expected space 'eps' or 'x', got {self.space!r}.")
        if self.space == "x" and self.normalize is not None:
            raise UserError("Expected normalize=None with space='x', which has no portable scale; or use space='eps'.")
        if not 0 <= self.start < self.stop <= 1:
            raise UserError(f"Expected 0 <= start < stop <= 1, got start={self.start}, stop={self.stop}.")
        if self.every < 1:
            raise UserError(f"Expected every >= 1, got {self.every}; 1 takes a gradient at each step.")

    @classmethod
    def within(
        cls, default: tuple[float, float], *, start: float | None, stop: float | None, **options: Any
    ) -> Strength:
        """Build a strength whose ``start`` and ``stop`` fall back to those of a trained head or adapter."""
        start = default[0] if start is None else start
        return cls(start=start, stop=default[1] if stop is None else stop, **options)

    def active(self, fraction: float) -> bool:
        """Tell whether the guide is active at a fraction of the steps."""
        return self.guidance_scale != 0 and self.start <= fraction < self.stop

    def phases(self, num_steps: int, first: int = 0) -> list[str]:
        """Return the phase of each step of a run, see :func:`guidance.guides.phases.step_phases`."""
        start, stop = (self.start, self.stop) if self.guidance_scale != 0 else (1.0, 1.0)
        return step_phases(start, stop, self.every, num_steps, first)


@runtime_checkable
class Guide(Protocol):
    """Push on a sample: a :class:`ScoringGuide` or a :class:`DirectGuide`."""

    name: str
    strength: Strength

    def prepare(self, pipe: Pipeline) -> None:
        """Check that the guide fits the pipeline (UserError if not) and move to its device."""


@runtime_checkable
class ScoringGuide(Guide, Protocol):
    """A guide that scores features at a tap; the gradient of the score is its push.

    ``tap`` is the name of a module of the denoiser, or :data:`guidance.taps.hooks.X0` (the features are the x0
    prediction of the conditional part, in the model's latent space; the gradient stops there, as in MPGD), or
    :data:`guidance.taps.hooks.X0_THROUGH_UNET` (the same with the exact gradient).
    """

    tap: str

    def score(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Score features at timesteps ``t``, differentiably, in float32 or float64; larger is better."""


@runtime_checkable
class DirectGuide(Guide, Protocol):
    """A guide that returns directions of the latents itself, so that no gradient is taken."""

    def direction(
        self,
        x_t: Float[Tensor, "b c y x"],
        eps: Float[Tensor, "b c2 y x"],
        x0: Float[Tensor, "b c2 y x"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c2 y x"]:
        """Return the direction in which to push, of any size; ``x_t`` has more channels in inpainting models."""


def own_prompts(batch: int) -> tuple[str, ...]:
    """Return the prompt of each sample of the conditional part, as targets of a guide without others."""
    prompts = run_prompts.get()
    if prompts is None or len(prompts) != batch:
        found = "none" if prompts is None else f"{len(prompts)} prompts"
        raise UserError(
            f"Expected the prompts of the {batch} samples, got {found}; pass texts or images to the guide: each "
            "sample's own prompt is known only inside guidance.sample_latents and sample_images."
        )
    return prompts


def is_direct(guide: Guide) -> bool:
    """Tell whether a guide returns directions of the latents, so that no gradient is taken."""
    return hasattr(guide, "direction")


def describe_scorer(guide: ScoringGuide) -> dict[str, Any]:
    """Describe a guide that only scores, for a record: its name and what its method ``describe`` adds, if it has one.

    Its "networks" are fingerprints of weights, which must not grade the images that they have selected.
    """
    return {"guide": guide.name, **(guide.describe() if hasattr(guide, "describe") else {})}


def scale_for(guide: Guide, like: Tensor) -> float | Tensor:
    """Return a guide's scale: a number, or with ``run_factors`` one per sample, broadcastable to ``like``."""
    factors, scale = run_factors.get(), guide.strength.guidance_scale
    if factors is None:
        return scale
    return scale * torch.tensor(factors, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def rms(x: Tensor) -> Tensor:
    """Root mean square per sample, kept broadcastable: (b, ...) -> (b, 1, ...)."""
    return x.square().mean(dim=tuple(range(1, x.ndim)), keepdim=True).sqrt()


def unit_rms(x: Tensor) -> Tensor:
    """Scale each sample to RMS 1; zeros stay zeros."""
    size = rms(x)
    return x / torch.where(size > 0, size, 1.0)
