"""Configuration of a head, saved beside its weights."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from guidance.heads.tasks import get_task
from guidance.schedule import NUM_BINS
from guidance.taps.hooks import split_taps
from guidance.utils.errors import UserError

FORMAT_VERSION = 1


@dataclasses.dataclass
class HeadConfig:
    """A head's network, what it predicts, and what it was trained on.

    Attributes:
        kind: Architecture, a key of :data:`guidance.heads.networks.HEADS`.
        in_channels: Channels of the features, of all modules of the tap together.
        outputs: Numbers per sample: classes, or 1 for regression and binary.
        time_conditioned: Whether the timestep is an input of the head.
        hidden: Width of the network; 256 in the report.
        target: Dataset column the head predicts.
        task: Meaning of the outputs, a key of :data:`guidance.heads.tasks.TASKS`.
        labels: Names of the outputs ("1" ... "10" for ratings).
        tap: Module whose output is read, or several joined by "+", see :func:`guidance.taps.hooks.join_maps`.
        tap_channels: Channels of each of several modules, in their order; empty for one.
        base_model, base_fingerprint: Name of the diffusion model, and
            :func:`guidance.models.denoiser.fingerprint` of its weights.
        prediction_type, num_train_timesteps: Its parameterisation and number of timesteps.
        timesteps: Lowest and highest timestep trained on, inclusive.
        noise: "random" (features of noised latents) or "none" (of clean latents at t = 0).
        caption: "caption" or "empty": the prompt the features were computed with.
        clip, clip_fingerprint: Name and weights' fingerprint of the CLIP whose image embeddings an embedding head
            predicts; "" for other heads.
        start, stop: Fractions of the sampling steps (0 is the first, at the highest t) between which the head beats
            chance.
        temperature: One divisor of the logits per timestep bin (:data:`NUM_BINS`); empty for none.
        metrics: Headline results on held-out data.
        format_version: Version of this format.
    """

    kind: str
    in_channels: int
    outputs: int = 10
    time_conditioned: bool = True
    hidden: int = 256
    target: str = "rating"
    task: str = "rating"
    labels: list[str] = dataclasses.field(default_factory=lambda: [str(k) for k in range(1, 11)])
    tap: str = "mid_block"
    base_model: str = ""
    base_fingerprint: str = ""
    prediction_type: str = "epsilon"
    num_train_timesteps: int = 1000
    timesteps: list[int] = dataclasses.field(default_factory=lambda: [0, 999])
    noise: Literal["random", "none"] = "random"
    caption: Literal["caption", "empty"] = "caption"
    clip: str = ""
    clip_fingerprint: str = ""
    start: float = 0.0
    stop: float = 1.0
    temperature: list[float] = dataclasses.field(default_factory=list)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    tap_channels: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if get_task(self.task).labelled and len(self.labels) != self.outputs:
            raise UserError(
                f"Expected one label per output, got {len(self.labels)} labels for {self.outputs} outputs; "
                "set labels and outputs to the same length."
            )
        if self.temperature and (len(self.temperature) != NUM_BINS or min(self.temperature) <= 0):
            raise UserError(f"Expected {NUM_BINS} positive temperatures or none, got {self.temperature}.")
        if not 0 <= self.start < self.stop <= 1:
            raise UserError(f"Expected 0 <= start < stop <= 1, got start={self.start}, stop={self.stop}.")
        taps = split_taps(self.tap)
        if len(self.channels) != len(taps) or sum(self.channels) != self.in_channels:
            raise UserError(
                f"Expected the channels of each of {len(taps)} taps, {self.in_channels} in all, got "
                f"tap_channels={self.tap_channels} for '{self.tap}'; list them in the order of the taps."
            )

    @property
    def channels(self) -> list[int]:
        """Channels of each module of the tap, in their order."""
        return self.tap_channels or [self.in_channels]
