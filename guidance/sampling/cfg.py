"""Classifier-free guidance and its variants: rescaling, an interval of steps, a weight that a head lowers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from guidance.guides.base import ScoringGuide, describe_scorer
from guidance.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """Combination of the conditional and the unconditional prediction.

    ``eps = eps_uncond + w (eps_cond - eps_uncond)`` (Ho and Salimans 2022), and in the same way for v and x0.

    Attributes:
        scale: The weight w; 1 is off, 0 is the unconditional model (to diffusers every w up to 1 is off).  Or one per
            sample, none of them 1.
        rescale: ``phi`` of Lin et al. ("Common Diffusion Noise Schedules and Sample Steps Are Flawed", WACV 2024,
            section 3.4): how far each sample's standard deviation is pulled back to that of the conditional prediction,
            against overexposure; 0 is off, they use 0.7.
        start, stop: Fractions of the steps between which w applies; outside it is 1 (Kynkaanniemi et al., "Applying
            Guidance in a Limited Interval", NeurIPS 2024), and without guides the unconditional part is not computed.
        modulate: A guide whose score is a log-probability, for example that of a class head: with ``p = exp(score)``
            the weight of each sample is ``1 + (w - 1) (1 - p)``, so that samples that already satisfy the guide are
            left alone.  No gradient is taken, and the guide's own scale is not used.
    """

    scale: float | tuple[float, ...] = 4.0
    rescale: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    modulate: ScoringGuide | None = None

    def __post_init__(self) -> None:
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if not all(map(math.isfinite, scales)):
            raise UserError(f"Expected a finite cfg_scale, got {self.scale}; 1 turns it off.")
        assert self.scale == 1 or 1 not in scales  # in a batch, 1 would need no second forward
        if not 0 <= self.rescale <= 1:
            raise UserError(f"Expected a rescale in 0..1, got {self.rescale}; 0 is off, 0.7 is usual.")
        if not 0 <= self.start < self.stop <= 1:
            raise UserError(f"Expected 0 <= start < stop <= 1, got start={self.start}, stop={self.stop}.")

    @classmethod
    def of(cls, scale: float | Sequence[float] | ClassifierFree) -> ClassifierFree:
        """Convert a weight, or one per sample, to plain classifier-free guidance."""
        if isinstance(scale, ClassifierFree):
            return scale
        return cls(tuple(scale) if isinstance(scale, Sequence) else scale)

    def weight(self, fraction: float) -> float | tuple[float, ...]:
        """Return the weight at a fraction of the steps, before modulation."""
        return self.scale if self.start <= fraction < self.stop else 1.0

    def combine(
        self,
        uncond: Float[Tensor, "b c y x"],
        cond: Float[Tensor, "b c y x"],
        fraction: float,
        scores: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c y x"]:
        """Combine two predictions, in the model's own parameterisation.

        Args:
            uncond, cond: Predictions.
            fraction: Fraction of the steps.
            scores: Scores of the guide ``modulate``.

        Raises:
            UserError: If a score is not a log-probability.

        >>> combine = ClassifierFree(3.0, start=0.5).combine
        >>> zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> [combine(zero, one, fraction).item() for fraction in (0.2, 0.5)]
        [1.0, 3.0]
        """
        weight: Any = self.weight(fraction)
        if isinstance(weight, tuple):
            weight = rearrange(torch.tensor(weight, dtype=cond.dtype, device=cond.device), "b -> b 1 1 1")
        if scores is not None:
            if not (scores <= 1e-4).all():
                raise UserError(
                    f"Expected log-probabilities to modulate cfg_scale by, got a score of {scores.max():g}; use a "
                    "guide with objective='class' or 'at_least'."
                )
            free = 1 - scores.to(cond.device, torch.float32).exp().clamp(max=1)
            weight = (1 + (weight - 1) * rearrange(free, "b -> b 1 1 1")).to(cond.dtype)
        combined = uncond + weight * (cond - uncond)
        if not self.rescale:
            return combined
        axes = tuple(range(1, cond.ndim))
        deviation = combined.float().std(axes, keepdim=True).clamp(min=1e-8)
        factor = self.rescale * cond.float().std(axes, keepdim=True) / deviation + (1 - self.rescale)
        return combined * factor.to(combined.dtype)

    def describe(self) -> dict[str, Any] | None:
        """Describe all options but the scale, for a record; None for plain classifier-free guidance."""
        if self == ClassifierFree(self.scale):
            return None
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "scale"}
        return options | {"modulate": None if self.modulate is None else describe_scorer(self.modulate)}
