"""What a guide is: a dataclass whose fields are its options, in Python, on the command line and in records alike.

A guide scores features at a tap (:class:`ScoringGuide`) or returns a direction itself (:class:`DirectGuide`); each
method has a file beside this one, and :mod:`guidance.apply` turns guides into a shift of the denoiser's output.  These
files import torch only where they compute, so that ``--help`` and ``--explain`` are instant.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from guidance.utils.config import option
from guidance.utils.errors import UserError
from guidance.utils.io import read_json

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from guidance.models.types import Pipeline

#: A guide that is off, takes a gradient, or reuses the direction of the last one.
OFF, FRESH, KEPT = "off", "fresh", "kept"

#: Guides by the name under which command lines, YAML files and records know them.
GUIDES: dict[str, type[Guide]] = {}


def register_guide(method: str) -> Callable[[type[Guide]], type[Guide]]:
    """Enter a guide in :data:`GUIDES`; ``--guide METHOD:option=value`` then builds it."""

    def enter(cls: type[Guide]) -> type[Guide]:
        cls.method = method
        GUIDES[method] = cls
        return cls

    return enter


def scale_option() -> Any:
    """Return the field ``guidance_scale``, which follows what a guide is made of."""
    return option(1.0, "strength; negative pushes away, 0 is off; with scales: a factor of them")


def network_option(default: Any, help: str, *, kind: Any = str) -> Any:
    """Return the field of a network: an object in Python, its folder or hub id on the command line."""
    return option(default, help, kind=kind, network=True)


@dataclasses.dataclass(kw_only=True, eq=False)
class Guide:
    """A push on a sample; subclasses add options, of which ``guidance_scale`` is one.

    Attributes:
        guidance_scale: Factor of the gradient; a negative one pushes away, 0 does nothing.
        normalize: "cfg" makes the scale portable: per sample, the shift's RMS is ``guidance_scale`` times the RMS of
            ``eps_cond - eps_uncond`` (of eps itself without classifier-free guidance).  None: the raw gradient,
            ``eps - guidance_scale * sigma_t * grad log p`` (Dhariwal and Nichol 2021, algorithm 2).
        start, stop: Fractions of the solver steps; 0 is the first step (pure noise), 1 the end.  None: the range in
            which the guide's trained part is of use, or all steps.
        every: Take a gradient every ``every``-th solver step and reuse the direction of the last shift in between.
        space: "eps" shifts the prediction; "x" moves the latents between steps, ``x <- x + s grad`` (the mid-u
            report's form; its total strength grows with the number of steps, and ``normalize`` must be None).

    Raises:
        UserError: If an option is out of range.
    """

    method: ClassVar[str] = ""

    normalize: Literal["cfg"] | None = option("cfg", "cfg: portable scale; null: raw gradient")
    start: float | None = option(None, "fraction of the steps where guidance begins; null: the guide's own")
    stop: float | None = option(None, "fraction of the steps where guidance ends; null: the guide's own")
    every: int = option(1, "take a gradient every so many steps")
    space: Literal["eps", "x"] = option("eps", "what is shifted: the prediction or the latents")

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"Expected a finite guidance_scale, got {self.guidance_scale}; 0 turns the guide off.")
        if self.normalize not in ("cfg", None):
            raise UserError(f"Expected normalize 'cfg' or None, got {self.normalize!r}.")
        if self.space not in ("eps", "x"):
            raise UserError(f"Expected space 'eps' or 'x', got {self.space!r}.")
        if self.space == "x" and self.normalize is not None:
            raise UserError("Expected normalize=None with space='x', which has no portable scale; or use space='eps'.")
        if self.every < 1:
            raise UserError(f"Expected every >= 1, got {self.every}; 1 takes a gradient at each step.")
        self.check_interval()

    def check_interval(self) -> None:
        """Refuse fractions out of order."""
        start, stop = self.start or 0.0, 1.0 if self.stop is None else self.stop
        if not 0 <= start < stop <= 1:
            raise UserError(f"Expected 0 <= start < stop <= 1, got start={self.start}, stop={self.stop}.")

    # ---- for subclasses ---------------------------------------------------------------------------------------
    @property
    def guidance_scale(self) -> float:
        """A field of every subclass (:func:`scale_option`), behind what the guide is made of."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Name in records of steps."""
        return self.method or type(self).__name__

    def load(self) -> None:
        """Load what the options name; other methods may rely on it."""

    def prepare(self, pipe: Pipeline) -> None:
        """Check that the guide fits the pipeline (UserError if not) and move to its device."""

    def networks(self) -> list[str]:
        """Return fingerprints of the networks that guide, which must not grade the images."""
        return []

    def own_range(self) -> tuple[float, float]:
        """Return ``start`` and ``stop`` where they are not given."""
        return 0.0, 1.0

    # ---- steps ------------------------------------------------------------------------------------------------
    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """``start`` and ``stop``, those of the trained part where they are not given."""
        start, stop = self.own_range() if None in (self.start, self.stop) else (0.0, 1.0)
        found = start if self.start is None else self.start, stop if self.stop is None else self.stop
        if not found[0] < found[1]:
            raise UserError(f"Expected 0 <= start < stop <= 1, got start={found[0]}, stop={found[1]}.")
        return found

    def phases(self, num_steps: int, first: int = 0) -> list[str]:
        """Return the phase of each step of a run, see :func:`step_phases`."""
        start, stop = self.interval if self.guidance_scale != 0 else (1.0, 1.0)
        return step_phases(start, stop, self.every, num_steps, first)

    # ---- copies and records -----------------------------------------------------------------------------------
    def at(self, scale: float) -> Guide:
        """Return the guide with its scale times another one; both share what is loaded."""
        self.load()
        other = copy.copy(self)
        vars(other)["guidance_scale"] = self.guidance_scale * scale
        return other

    def within(self, start: float | None, stop: float | None) -> Guide:
        """Return the guide with another interval where one is given; both share what is loaded."""
        self.load()
        other = copy.copy(self)
        other.start = self.start if start is None else start
        other.stop = self.stop if stop is None else stop
        vars(other).pop("interval", None)
        other.check_interval()
        return other

    def options(self, *, networks: bool = True) -> dict[str, Any]:
        """Return the options as plain data, by name; without ``networks`` only those that are not one."""
        fields = [f for f in dataclasses.fields(self) if networks or not f.metadata.get("network")]
        return {f.name: _plain(getattr(self, f.name)) for f in fields}

    def describe(self) -> dict[str, Any]:
        """Describe the guide for a record: method, name, all options with their final values, fingerprints."""
        self.load()
        start, stop = self.interval
        named = {"method": self.method, "name": self.name}
        return named | self.options() | {"start": start, "stop": stop} | self.fingerprints()

    def fingerprints(self) -> dict[str, Any]:
        """Return the fingerprints of a record."""
        return {"networks": self.networks()}

    # ---- words ------------------------------------------------------------------------------------------------
    def explain(self, num_steps: int) -> str:
        """Describe tap, active steps, cost, and in a second line the options, without loading a model."""
        start = self.trained.get("start", 0.0) if self.start is None else self.start
        stop = self.trained.get("stop", 1.0) if self.stop is None else self.stop
        phases = step_phases(start, stop, self.every, num_steps)
        when = f"pushes in {num_steps - phases.count(OFF)} of {num_steps} steps"
        if KEPT in phases:
            when += f", with a new direction in {phases.count(FRESH)}"
        cost = f"a guided step costs {self.price}"
        if self.step_cost is not None:
            average = 1 + (self.step_cost - 1) * phases.count(FRESH) / num_steps
            cost += f", steps on average {average:.2f}"
        options = ", ".join(f"{name}={value}" for name, value in self.options().items())
        return f"{self.method}: tap {self.where}; {when}; {cost}\n    {options}"

    @property
    def price(self) -> str:
        """Cost of a step with a gradient, in words."""
        return "what its gradient takes (not counted)"

    @property
    def step_cost(self) -> float | None:
        """Cost of a step with a gradient in unguided steps; None if unknown."""
        return None

    @property
    def where(self) -> str:
        """Tap of the guide and its purpose, in words."""
        return str(getattr(self, "tap", "none (reads latents and prediction)"))

    @property
    def folder(self) -> str:
        """Folder of the guide's trained part; "" without one."""
        return ""

    @functools.cached_property
    def trained(self) -> dict[str, Any]:
        """Config of the trained part; empty if it is not on this disk."""
        file = Path(self.folder) / "config.json"
        return read_json(file) if self.folder and file.is_file() else {}


class ScoringGuide(Guide):
    """A guide that scores features at a tap; the gradient of the score is its push.

    ``tap`` is the name of a module of the denoiser, or :data:`guidance.taps.hooks.X0` (the features are the x0
    prediction of the conditional part, in the model's latent space; the gradient stops there, as in MPGD), or
    :data:`guidance.taps.hooks.X0_THROUGH_UNET` (the same with the exact gradient).

    A guide with ``needs_prompts`` is given the samples' prompts as a third argument of ``score``.
    """

    tap: Any  # str, or a property
    needs_prompts: Any = False  # bool, or a property

    def score(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"], *prompts: Any) -> Float[Tensor, " b"]:
        """Score features at timesteps ``t``, differentiably, in float32 or float64; larger is better."""
        raise NotImplementedError


class DirectGuide(Guide):
    """A guide that returns directions of the latents itself, so that no gradient is taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize is None:
            raise UserError(f"Expected normalize='cfg' with {self.name}, whose directions have no size, got None.")

    def direction(
        self,
        x_t: Float[Tensor, "b c y x"],
        eps: Float[Tensor, "b c2 y x"],
        x0: Float[Tensor, "b c2 y x"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c2 y x"]:
        """Return the direction in which to push, of any size; ``x_t`` has more channels in inpainting models."""
        raise NotImplementedError


def describe_scorer(guide: ScoringGuide) -> dict[str, Any]:
    """Describe a guide that only scores, for a record: its name, its networks and its own options."""
    common = {f.name for f in dataclasses.fields(Guide)} | {"guidance_scale"}
    own = {k: v for k, v in guide.options(networks=False).items() if k not in common}
    return {"guide": guide.name, "networks": guide.networks()} | own


def step_phases(start: float, stop: float, every: int, num_steps: int, first: int = 0) -> list[str]:
    """Return the phase of each step ``first .. num_steps - 1``.

    Args:
        start, stop: Fractions of the steps where the guide is active: ``start <= step / num_steps < stop``.
        every: The guide takes a gradient in its first step and in each step whose number is a multiple of this.
        num_steps: Steps from pure noise.
        first: First step of the run; above 0 if it starts from an image that is noised part of the way.

    >>> step_phases(0.5, 1.0, 2, 8)
    ['off', 'off', 'off', 'off', 'fresh', 'kept', 'fresh', 'kept']
    """
    phases: list[str] = []
    for i in range(first, num_steps):
        if not start <= i / num_steps < stop:
            phases.append(OFF)
        else:
            phases.append(FRESH if i % every == 0 or FRESH not in phases else KEPT)
    return phases


def _plain(value: Any) -> Any:
    """Return a value as records hold it; an image by a digest."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tobytes"):
        return hashlib.sha256(value.tobytes()).hexdigest()[:16]
    return ""  # a network: its fingerprint is beside it
