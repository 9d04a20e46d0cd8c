"""What all guides share that score features by a trained head."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from guidance.denoiser import denoiser_of, device_of, fingerprint_of
from guidance.guides.base import Strength
from guidance.heads import Head, check_fits
from guidance.pipelines import fingerprint
from guidance.schedule import NoiseSchedule


class HeadGuide:
    """A guide with a trained head; what the score is, subclasses say.

    Args:
        heads: A trained head, or several that read one tap; frozen and put in eval mode.
        name: Name of the guide.
        start, stop: Fractions of the steps; None takes the range of the first head.
        **options: Other attributes of :class:`~guidance.guides.base.Strength`.

    Raises:
        UserError: If an option is out of range.
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
        return [fingerprint(head) for head in self.heads]  # once, not for each image's record

    def describe(self) -> dict[str, Any]:
        """See :func:`~guidance.guides.base.describe_scorer`."""
        return {"networks": self._fingerprints}

    def prepare(self, pipe: Any) -> None:
        """Refuse a pipeline that a head does not fit; move the heads to the pipeline's device."""
        schedule, weights = NoiseSchedule.from_scheduler(pipe.scheduler), fingerprint_of(pipe)
        for head in self.heads:
            check_fits(head, denoiser_of(pipe), schedule, weights)
            head.to(device_of(pipe))
