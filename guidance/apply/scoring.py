"""Score every sampling step with a guide, without a gradient."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from guidance.apply.apply import apply_guidance
from guidance.apply.forward import replaced
from guidance.guides.base import ScoringGuide
from guidance.models.denoiser import latent_channels
from guidance.models.types import Pipeline
from guidance.schedule import NoiseSchedule, step_position
from guidance.taps.hooks import X0, X0_THROUGH_UNET, capture, prediction_of
from guidance.taps.lockstep import plain
from guidance.utils.errors import UserError


class StepScorer:
    """Replacement of ``unet.forward`` that scores the conditional part in the first denoiser call of each step.

    Guidance on a GPU runs the unconditional part separately after the conditional one, so later calls are ignored.
    """

    def __init__(self, pipe: Pipeline, guide: ScoringGuide, batch: int) -> None:
        self.pipe, self.guide, self.batch, self.original = pipe, guide, batch, pipe.unet.forward
        self.scores: Tensor | None = None
        self.used: list[int] = []

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        """Noise schedule of the scheduler, read at the first scored call."""
        return NoiseSchedule.from_scheduler(self.pipe.scheduler)

    def __call__(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        if self.scores is not None:
            return self.original(sample, timestep, *args, **kwargs)
        module = [] if self.guide.tap in (X0, X0_THROUGH_UNET) else [self.guide.tap]
        with capture(self.pipe.unet, module) as found:
            output = self.original(sample, timestep, *args, **kwargs)
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1)[:1].float().expand(self.batch)
        with torch.no_grad():
            h = self._conditional(found[self.guide.tap]) if module else self._x0(output, sample, t)
            self.scores = self.guide.score(h, t).float().cpu()
        self.index, self.total, _ = step_position(self.pipe.scheduler, timestep)
        return output

    def take(self) -> tuple[Tensor, int, list[int], int]:
        """Return the scores of the last step, its index, the steps in the guide's range, and the number of steps."""
        assert self.scores is not None
        scores, self.scores = self.scores, None
        s, total = self.guide.strength, self.total
        self.used = self.used or [i for i in range(self.index, total) if s.start <= i / total < s.stop]
        if not self.used:
            raise UserError(
                f"Expected a sampling step in the guide's range {s.start:g}..{s.stop:g}, got none; widen it."
            )
        return scores, self.index, self.used, total

    def _conditional(self, v: Tensor) -> Float[Tensor, "b c y x"]:
        """Return the last part of the batch: the only one if guidance runs the parts in step or separately."""
        return plain(v)[-self.batch :].detach().float().contiguous()

    def _x0(self, output: Any, sample: Tensor, t: Tensor) -> Float[Tensor, "b c y x"]:
        prediction = self._conditional(prediction_of(output))
        c = latent_channels(self.pipe.unet)
        return self.schedule.to_x0(prediction[:, :c], self._conditional(sample)[:, :c], t)


@contextmanager
def scoring(pipe: Pipeline, guide: ScoringGuide, batch: int) -> Iterator[StepScorer]:
    """Score each step of a run inside the ``with`` block; refuse a pipeline that is already guided."""
    with apply_guidance(pipe, ()):
        guide.prepare(pipe)
    scorer = StepScorer(pipe, guide, batch)
    with replaced(pipe.unet, "forward", scorer):
        yield scorer
