"""Mid-block guidance, and the base class of all guides that score features with a trained head."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from guidance.guides.base import Strength
from guidance.heads.networks import Head, check_fits
from guidance.heads.objectives import build_objective
from guidance.models.denoiser import denoiser_of, device_of, fingerprint, fingerprint_of
from guidance.models.types import Pipeline
from guidance.schedule import NoiseSchedule
from guidance.utils.errors import UserError


class HeadGuide:
    """A guide with trained heads; subclasses define the score.

    Args:
        heads: One or more trained heads that read the same tap; frozen and put in eval mode.
        name: Name of the guide.
        start, stop: Fractions of the steps; None takes the range of the first head.
        **options: Other attributes of :class:`~guidance.guides.base.Strength`.
    """

    def __init__(
        self, heads: Sequence[Head], name: str, *, start: float | None, stop: float | None, **options: Any
    ) -> None:
        config = heads[0].config
        self.heads = [head.eval().requires_grad_(False) for head in heads]
        self.tap, self.name = config.tap, name
        self.strength = Strength.within((config.start, config.stop), start=start, stop=stop, **options)

    @property
    def head(self) -> Head:
        """The first head."""
        return self.heads[0]

    @functools.cached_property
    def _fingerprints(self) -> list[str]:
        return [fingerprint(head) for head in self.heads]

    def describe(self) -> dict[str, Any]:
        """Describe the guide as a scorer, see :func:`~guidance.guides.base.describe_scorer`."""
        return {"networks": self._fingerprints}

    def prepare(self, pipe: Pipeline) -> None:
        """Refuse a pipeline that a head does not fit; move the heads to the pipeline's device."""
        schedule, weights = NoiseSchedule.from_scheduler(pipe.scheduler), fingerprint_of(pipe)
        for head in self.heads:
            check_fits(head, denoiser_of(pipe), schedule, weights)
            head.to(device_of(pipe))


class MidBlockGuide(HeadGuide):
    """Push samples along the gradient of a head's objective, taken from the mid-block to the latents.

    The gradient passes only through the encoder half of the UNet: not the up-blocks, the VAE decoder or CLIP.  Several
    heads for one target (with other seeds or data) form a committee: the score is the mean of their scores minus
    ``pessimism`` standard deviations, so that samples are not pushed to where the heads know nothing and disagree.

    Args:
        head: A trained head, see :func:`guidance.load_head`, or several of them.
        guidance_scale: Strength; a negative one pushes away.  With ``normalize="cfg"`` (default) the unit is the
            difference that classifier-free guidance extrapolates.
        objective: "expected", "at_least", "class" ..., see :data:`guidance.heads.objectives.OBJECTIVES`; None takes the
            default of the head's task (the expected rating for a rating head).
        target: Label, index or threshold of the objective, where it needs one.
        normalize, every, space: See :class:`~guidance.guides.base.Strength`.
        start, stop: Fractions of the steps; None takes the head's own range, in which it beats chance.
        pessimism: Standard deviations of a committee to subtract; 0 guides by its mean.

    Raises:
        UserError: If an option is out of range, or the heads of a committee do not fit together.

    Reference:
        J. Whitaker, "Mid-U Guidance: Fast Classifier Guidance for Latent Diffusion Models", 2023.
    """

    def __init__(
        self,
        head: Head | Sequence[Head],
        guidance_scale: float = 1.0,
        *,
        objective: str | None = None,
        target: str | int | float | None = None,
        normalize: str | None = "cfg",
        start: float | None = None,
        stop: float | None = None,
        every: int = 1,
        space: str = "eps",
        pessimism: float = 0.0,
    ) -> None:
        heads = [head] if isinstance(head, Head) else list(head)
        _check_committee(heads, pessimism)
        self.objective = build_objective(heads[0].config, objective, target)
        self._request = {"objective": objective, "target": target}
        self.pessimism = pessimism
        super().__init__(
            heads,
            f"midblock:{heads[0].config.target}",
            guidance_scale=guidance_scale,
            normalize=normalize,
            start=start,
            stop=stop,
            every=every,
            space=space,
        )

    def describe(self) -> dict[str, Any]:
        """Describe the guide as a scorer, see :func:`~guidance.guides.base.describe_scorer`."""
        return super().describe() | self._request | {"pessimism": self.pessimism}

    def score(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Evaluate the objective of the heads' outputs, for example the expected rating in 1..10."""
        if len(self.heads) == 1:
            return self.objective(self.head(h, t))
        scores = torch.stack([self.objective(head(h, t)) for head in self.heads])
        # the gradient of a standard deviation of 0 is not finite
        return scores.mean(0) - self.pessimism * (scores.var(0) + 1e-12).sqrt()


def _check_committee(heads: Sequence[Head], pessimism: float) -> None:
    if not heads:
        raise UserError("Expected at least one head, got none.")
    if not (math.isfinite(pessimism) and (pessimism == 0 or len(heads) > 1)):
        raise UserError(
            f"Expected a finite pessimism, and 0 with a single head, got {pessimism} for {len(heads)}; give more heads."
        )
    for name in ("target", "task", "labels", "tap"):
        values = [getattr(head.config, name) for head in heads]
        if other := [value for value in values if value != values[0]]:
            raise UserError(
                f"Expected heads of one {name} in a committee, got {values[0]!r} and {other[0]!r}; train them alike "
                "but for the seed."
            )
