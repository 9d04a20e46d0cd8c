"""Classifier-free guidance and its variants: rescaling, an interval of steps, a weight that a head turns down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from guidance.guides.base import Guide, describe_scorer
from guidance.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """How the conditional and the unconditional prediction become one.

    ``eps = eps_uncond + w (eps_cond - eps_uncond)`` (Ho and Salimans 2022), and in the same way for v and x0.

    Attributes:
        scale: The weight w; 1 is off.  Or one for each sample, none of them 1.
        rescale: ``phi`` of Lin et al. ("Common Diffusion Noise Schedules and Sample Steps Are Flawed", WACV 2024,
            section 3.4): how far the result's standard deviation per sample is pulled back to that of the conditional
            prediction, against overexposure; 0 is off, they use 0.7.
        start, stop: Fractions of the steps between which w holds; outside it is 1 (Kynkaanniemi et al., "Applying
            Guidance in a Limited Interval", NeurIPS 2024), and without guides the unconditional part is not computed.
        modulate: A guide whose score is a log-probability, for example a class head's: with ``p = exp(score)`` of each
            sample the weight is ``1 + (w - 1) (1 - p)``, so that samples that are there already are left in peace.  No
            gradient is taken, and the guide's own scale is not used.
    """

    scale: float | tuple[float, ...] = 4.0
    rescale: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    modulate: Guide | None = None

    def __post_init__(self) -> None:
        several = isinstance(self.scale, tuple)
        for scale in self.scale if isinstance(self.scale, tuple) else (self.scale,):
            if not math.isfinite(scale):
                raise UserError(f"Expected a finite cfg_scale, got {scale}; 1 turns it off.")
            if several and scale == 1:
                raise UserError(
                    "Expected no 1 among the cfg_scale of a batch, which needs no second forward."
                )
        if not 0 <= self.rescale <= 1:
            raise UserError(f"Expected a rescale in 0..1, got {self.rescale}; 0 is off, 0.7 is usual.")
        if not 0 <= self.start < self.stop <= 1:
            raise UserError(f"Expected 0 <= start < stop <= 1, got start={self.start}, stop={self.stop}.")

    @classmethod
    def of(cls, scale: float | Sequence[float] | ClassifierFree) -> ClassifierFree:
        """Plain classifier-free guidance of a weight; one that is there already stays."""
        if isinstance(scale, ClassifierFree):
            return scale
        return cls(tuple(scale) if isinstance(scale, Sequence) else scale)

    def weight(self, fraction: float) -> float | tuple[float, ...]:
        """The weight at a fraction of the steps (0 first, below 1 last), before modulation."""
        return self.scale if self.start <= fraction < self.stop else 1.0

    def combine(
        self,
        uncond: Float[Tensor, "b c y x"],
        cond: Float[Tensor, "b c y x"],
        fraction: float,
        scores: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c y x"]:
        """One prediction of two, in the model's own parameterisation.

        Args:
            uncond, cond: Predictions.
            fraction: Of the steps.
            scores: What ``modulate`` says of each sample.

        Raises:
            UserError: If a score is no log-probability.

        >>> combine = ClassifierFree(3.0, start=0.5).combine
        >>> [combine(torch.zeros(1), torch.ones(1), fraction).item() for fraction in (0.2, 0.5)]
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
        every = tuple(range(1, cond.ndim))
        size = combined.float().std(every, keepdim=True).clamp(min=1e-8)
        pull = self.rescale * cond.float().std(every, keepdim=True) / size + (1 - self.rescale)
        return combined * pull.to(combined.dtype)

    def describe(self) -> dict[str, Any] | None:
        """What a record says of it beside the scale; None for plain classifier-free guidance."""
        if self == ClassifierFree(self.scale):
            return None
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "scale"}
        return own | {"modulate": None if self.modulate is None else describe_scorer(self.modulate)}
