"""Score every sampling step with a guide, without a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from guidance.apply.values import Observation
from guidance.guides.base import ScoringGuide
from guidance.taps.hooks import X0, X0_THROUGH_UNET
from guidance.utils.errors import UserError


class StepScorer:
    """An observer that scores the conditional part at the first denoiser call of each solver step.

    Args:
        guide: Scores; prepared for the pipeline.
        prompts: Prompt of each sample, for a guide that follows it.

    Attributes:
        scores: Scores of the last step, (b,), float32 on the CPU.
        step: Number of the last step.
        used: Numbers of the run's steps in the guide's range, from the first observed one on.
    """

    def __init__(self, guide: ScoringGuide, prompts: Sequence[str] | None = None) -> None:
        self.guide, self.prompts = guide, None if prompts is None else tuple(prompts)
        self.taps = [] if guide.tap in (X0, X0_THROUGH_UNET) else [guide.tap]
        self.scores: Tensor | None = None
        self.step, self.total = -1, 0
        self.used: list[int] = []

    @torch.no_grad()
    def __call__(self, seen: Observation) -> None:
        """Score a call."""
        if not seen.step.first:
            return
        h = seen.features[self.guide.tap] if self.taps else seen.x0
        prompts = (self.prompts,) if self.guide.needs_prompts else ()
        with torch.autocast(h.device.type, enabled=False):
            self.scores = self.guide.score(h, seen.t, *prompts).float().cpu()
        self.step, self.total = seen.step.number, seen.step.total
        start, stop = self.guide.interval
        self.used = self.used or [i for i in range(self.step, self.total) if start <= i / self.total < stop]
        if not self.used:
            raise UserError(f"Expected a sampling step in the guide's range {start:g}..{stop:g}, got none; widen it.")
