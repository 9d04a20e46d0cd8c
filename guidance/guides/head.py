"""What all guides share that score features by a trained head."""

from __future__ import annotations

from typing import Any

from guidance.guides.base import Strength
from guidance.heads import Head, check_fits
from guidance.pipelines import fingerprint
from guidance.schedule import NoiseSchedule


class HeadGuide:
    """A guide with a trained head; what the score is, subclasses say.

    Args:
        head: A trained head; frozen and put in eval mode.
        name: Name of the guide.
        start, stop: Fractions of the steps; None takes the head's own range.
        **options: Other attributes of :class:`~guidance.guides.base.Strength`.

    Raises:
        UserError: If an option is out of range.
    """

    def __init__(
        self, head: Head, name: str, *, start: float | None, stop: float | None, **options: Any
    ) -> None:
        config = head.config
        self.head = head.eval().requires_grad_(False)
        self.tap, self.name = config.tap, name
        self.strength = Strength.within((config.start, config.stop), start=start, stop=stop, **options)

    def prepare(self, pipe: Any) -> None:
        """Refuse a pipeline that the head does not fit; move the head to the pipeline's device."""
        check_fits(self.head, pipe.unet, NoiseSchedule.from_scheduler(pipe.scheduler), fingerprint(pipe.unet))
        self.head.to(pipe.unet.device)
