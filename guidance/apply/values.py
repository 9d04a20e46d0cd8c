"""Values of a guided denoiser call: the call, what guides want there, what is recorded and observed of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from guidance.models.layouts import Parts
from guidance.schedule import NoiseSchedule, SolverStep, StepPlan


@dataclasses.dataclass
class StepRecord:
    """Scores, gradients and shifts of one denoiser call.

    Attributes:
        t: Timestep.
        scores: Guide name -> score of each sample, (b,), float32 on the CPU.
        grad_norm: L2 norm of each sample's gradient with respect to the input, scales included, (b,); of the first
            group of guides if there are several.
        shift_rms: RMS of each sample's shift in eps units, (b,).
        finite: Whether each sample's gradients were finite; the others were left unguided, (b,).
        step: Number of the solver step.
    """

    t: float
    scores: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    grad_norm: Tensor | None = None
    shift_rms: Tensor | None = None
    finite: Tensor | None = None
    step: int = 0

    @property
    def skipped(self) -> int:
        """Number of samples left unguided because their gradient was not finite."""
        return 0 if self.finite is None else int((~self.finite).sum())


class GuidanceHandle:
    """What happened in the run so far, as yielded by :func:`guidance.apply_guidance`.

    Attributes:
        records: One :class:`StepRecord` per denoiser call in which a gradient was taken.
        steps: Solver steps.
        gradients: Denoiser calls in which a gradient (or a direction) was taken.
        pushes: Denoiser calls whose prediction was shifted, and solver steps whose latents were moved.
        skipped: Samples x steps left unguided because their gradient was not finite; of all runs, the others of the
            last one.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.begin()

    def begin(self) -> None:
        """Begin a new run."""
        self.records: list[StepRecord] = []
        self.steps = self.gradients = self.pushes = 0


class Arguments(NamedTuple):
    """Arguments of a denoiser call, or of one part of it.

    Attributes:
        x_t: What the denoiser sees: latents, in some models beside others.
        t: Timestep, as the sampler gives it.
        others: All other arguments by name.
    """

    x_t: Tensor
    t: Any
    others: dict[str, Any]


class Call(NamedTuple):
    """One denoiser call.

    Attributes:
        whole: Its arguments, of all parts of classifier-free guidance.
        each: Those of each part.
        parts: Layout of the parts in the batch.
        x_t: What the denoiser sees in the conditional part.
        times: Timesteps of one part's samples.
        step: Place in the run.
        schedule: Noise schedule.
        sigma: ``sigma_t`` of each sample's input, (b, 1, 1, 1).
        factor: ``d prediction / d eps`` likewise, see :meth:`~guidance.schedule.NoiseSchedule.shift_factor`.
    """

    whole: Arguments
    each: tuple[Arguments, ...]
    parts: Parts
    x_t: Float[Tensor, "b c y x"]
    times: Float[Tensor, " b"]
    step: SolverStep
    schedule: NoiseSchedule
    sigma: Tensor
    factor: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Guides that share one backward pass, or need none.

    Attributes:
        direct: Whether the guides return directions, so that no gradient is taken.
        normalized: Whether the scale is portable.
        space: "eps" or "x".
        start, stop: Fractions of the steps in which they are active.
        every: Steps from one gradient to the next.
        guides, names, taps: The guides, their names, and their taps ("" of one that returns directions).
    """

    direct: bool
    normalized: bool
    space: str
    start: float
    stop: float
    every: int
    guides: tuple[Any, ...]
    names: tuple[str, ...]
    taps: tuple[str, ...]


class Gradient(NamedTuple):
    """What the guides of a group want at the latents of a solver step.

    Attributes:
        direction: Of RMS 1 where the scale is portable, else the gradient with the scales; 0 where it is not finite.
        size: RMS of the shift in units of the reference, where the scale is portable.
        norm: L2 norm of the gradient with the scales, (b,), float32 on the CPU.
        finite: Whether the gradient is finite, (b,).
        scores: Guide name -> (b,).
        step: Number of the solver step.
    """

    direction: Float[Tensor, "b c y x"]
    size: Tensor
    norm: Tensor
    finite: Tensor
    scores: dict[str, Tensor]
    step: int


@dataclasses.dataclass(eq=False)
class Run:
    """State of one sampling run: it begins when the scheduler's timesteps are set, and nothing outlives it.

    Attributes:
        scheduler, schedule, plan: The scheduler, and what is read of it.
        last: Place of the last call.
        held: The last gradient of each group.
        push: Shift of the latents that the scheduler's next step adds, in its own units.
    """

    scheduler: Any
    schedule: NoiseSchedule
    plan: StepPlan
    last: SolverStep = dataclasses.field(default_factory=lambda: SolverStep(-1, 1, True, -1))
    held: dict[Group, Gradient] = dataclasses.field(default_factory=dict)
    push: Tensor | None = None


#: Before the first call.
NO_RUN = Run(None, NoiseSchedule("vp", "epsilon", 0), StepPlan(torch.empty(0), (), ()))


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """What an observer sees of a denoiser call: its conditional part.

    Attributes:
        x_t: The denoiser's input.
        t: Timesteps, (b,).
        latents: The latents in it, float32 or float64.
        prediction: The denoiser's, unshifted and without learned variances, likewise.
        features: Features by tap, of the taps that the observer names.
        shift: Shift of all guides in eps units, at factor 1; None without one.
        step, schedule: Place in the run, and the noise schedule.
    """

    x_t: Float[Tensor, "b c y x"]
    t: Float[Tensor, " b"]
    latents: Float[Tensor, "b c2 y x"]
    prediction: Float[Tensor, "b c2 y x"]
    features: dict[str, Tensor]
    shift: Tensor | None
    step: SolverStep
    schedule: NoiseSchedule

    @functools.cached_property
    def eps(self) -> Float[Tensor, "b c2 y x"]:
        """The noise that the prediction implies."""
        return self.schedule.to_eps(self.prediction, self.latents, self.t)

    @functools.cached_property
    def x0(self) -> Float[Tensor, "b c2 y x"]:
        """The clean latents that the prediction implies."""
        return self.schedule.to_x0(self.prediction, self.latents, self.t)


@runtime_checkable
class Observer(Protocol):
    """Sees every denoiser call, and changes nothing; ``taps`` are those whose features it is shown."""

    @property
    def taps(self) -> Sequence[str]:
        """Taps to read."""

    def __call__(self, seen: Observation) -> None:
        """Look at a call."""
