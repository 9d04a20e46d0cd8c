"""Read noise schedules from diffusers schedulers; convert between eps, v, x0 and flow predictions.

Notation: the denoiser sees ``x = alpha x0 + sigma eps`` (after ``scheduler.scale_model_input``), so for variance
preserving (VP) models ``alpha^2 + sigma^2 = 1`` *whatever scheduler samples them*: Euler and LMS divide their
``x0 + sigma_ve eps`` by ``sqrt(1 + sigma_ve^2)`` first.  Flow matching: ``alpha = 1 - sigma``, ``v = eps - x0``.
EDM and continuous Euler hand the denoiser ``t = log(sigma_ve) / 4`` (Karras et al. 2022, table 1).

A run is counted in *solver steps*, not in denoiser calls: a second-order step is two calls.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from guidance.utils.errors import UserError, nearest

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")

NUM_BINS = 10  # equal bins of the timesteps, for the temperatures and metrics of heads


@runtime_checkable
class Scheduler(Protocol):
    """A scheduler of diffusers; its ``timesteps`` are read once they are set."""

    config: Any

    if TYPE_CHECKING:

        @classmethod
        def from_config(cls, config: Any, **options: Any) -> Any: ...
        def __getattr__(self, name: str) -> Any: ...


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """``alpha_t`` and ``sigma_t`` of the denoiser's input, and conversions between parameterisations.

    Attributes:
        kind: "vp" (variance preserving, by training timestep), "flow" (rectified flow) or "edm" (variance preserving,
            ``t = log(sigma_ve) / 4``).
        prediction_type: What the denoiser returns, one of :data:`PREDICTIONS`, or "edm": EDM's ``F``, which is -v.
        num_train_timesteps: Timesteps of "vp" run from 0 (clean) to this minus one; those of "flow" up to this.
        log_snr: ``log(alpha^2 / sigma^2)`` per training timestep, float64 on the CPU; of "vp" only.
        data_scale: Standard deviation of the data that is 1 in the denoiser's input: EDM's ``sigma_data``.
    """

    kind: str
    prediction_type: str
    num_train_timesteps: int
    log_snr: Float[Tensor, " T"] | None = None
    data_scale: float = 1.0

    @classmethod
    def from_scheduler(cls, scheduler: Scheduler) -> NoiseSchedule:
        """Read the schedule of any diffusers scheduler.

        Args:
            scheduler: DDIM, DDPM, DPM++, Euler, LMS, Heun, PNDM, UniPC ..., EDM, or a flow-matching scheduler.

        Raises:
            UserError: If the noise schedule or the prediction type of the scheduler is unknown.
        """
        config = scheduler.config
        total = int(config.get("num_train_timesteps", 1000))
        name = type(scheduler).__name__
        prediction = config.get("prediction_type", "epsilon")
        if "FlowMatch" in name or prediction == "flow_prediction":
            return cls("flow", "flow_prediction", total)
        if prediction not in PREDICTIONS:
            raise UserError(f"Expected a known prediction type, got '{prediction}'.{nearest(prediction, PREDICTIONS)}")
        if name.startswith("EDM"):
            prediction = "edm" if prediction == "epsilon" else prediction
            return cls("edm", prediction, total, data_scale=float(config.get("sigma_data", 0.5)))
        if config.get("timestep_type") == "continuous" and prediction == "v_prediction":
            return cls("edm", prediction, total)
        if config.get("use_flow_sigmas"):
            if prediction == "v_prediction":
                raise UserError(f"Expected {name} with flow sigmas to predict flow_prediction, got v_prediction.")
            return cls("flow", prediction, total)
        abar = getattr(scheduler, "alphas_cumprod", None)
        if abar is None:
            raise UserError(
                f"Expected a scheduler with a noise schedule (alphas_cumprod or flow matching), got {name}; "
                "use for example DDIMScheduler.from_config(pipe.scheduler.config)."
            )
        abar = abar.detach().double().cpu().clamp(1e-12, 1 - 1e-12)
        return cls("vp", prediction, total, abar.log() - (1 - abar).log())

    def alpha_sigma(self, t: Tensor | float | int) -> tuple[Tensor, Tensor]:
        """Return ``(alpha, sigma)`` of the denoiser's input at timestep ``t``.

        Fractional timesteps (Euler with ``linspace`` spacing) interpolate log-SNR linearly.

        Args:
            t: Timesteps as the denoiser is given them, a number or shape (b,).

        Returns:
            Two float64 tensors of the shape of ``t``, on its device (CPU for numbers).

        >>> from diffusers import DDIMScheduler
        >>> alpha, sigma = NoiseSchedule.from_scheduler(DDIMScheduler()).alpha_sigma(500)
        >>> float(alpha**2 + sigma**2)
        1.0
        """
        t = torch.as_tensor(t)
        t64 = t.double()
        if self.kind == "flow":
            sigma = (t64 / self.num_train_timesteps).clamp(0, 1)
            return 1 - sigma, sigma
        if self.kind == "edm":
            log_snr = 2 * math.log(self.data_scale) - 8 * t64
        else:
            assert self.log_snr is not None
            table = self.log_snr.to(t.device)
            low = t64.floor().long().clamp(0, len(table) - 1)
            high = (low + 1).clamp(max=len(table) - 1)
            log_snr = torch.lerp(table[low], table[high], (t64 - low).clamp(0, 1))
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def require_timesteps(self, what: str) -> None:
        """Refuse a schedule whose timesteps are not those of training, which heads and adapters are given."""
        if self.kind == "edm":
            raise UserError(
                f"Expected a scheduler with the timesteps of training for {what}, got one with t = log(sigma) / 4 "
                "(EDM or continuous); use for example scheduler='dpm++', or a guide without a trained part."
            )

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noise clean data: ``alpha x0 + sigma eps``.

        Args:
            x0, eps: Shape (b, ...).
            t: Timesteps, shape (b,).
        """
        alpha, sigma = self._broadcast(t, x0)
        return alpha * (x0 / self.data_scale) + sigma * eps

    def to_eps(self, prediction: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """Convert the denoiser's output to the noise it implies.

        Args:
            prediction: Denoiser output, shape (b, ...).
            x: Denoiser input of the same shape.
            t: Timestep(s), a number or (b,).
        """
        alpha, sigma = self._broadcast(t, x)
        match self.prediction_type:
            case "epsilon":
                return prediction
            case "v_prediction":  # v = alpha eps - sigma x0  (Salimans and Ho 2022)
                return alpha * prediction + sigma * x
            case "sample":
                return (x - alpha * prediction) / sigma
            case "edm":  # x0 = alpha x + sigma F  (Karras et al. 2022, equation 7)
                return sigma * x - alpha * prediction
            case _:  # v = eps - x0, x = (1 - sigma) x0 + sigma eps
                return x + alpha * prediction

    def to_x0(self, prediction: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """Convert the denoiser's output to the clean data it implies; arguments as in :meth:`to_eps`."""
        alpha, sigma = self._broadcast(t, x)
        match self.prediction_type:
            case "epsilon":
                x0 = (x - sigma * prediction) / alpha
            case "v_prediction":
                x0 = alpha * x - sigma * prediction
            case "sample":
                x0 = prediction
            case "edm":
                x0 = alpha * x + sigma * prediction
            case _:
                x0 = x - sigma * prediction
        return x0 * self.data_scale if self.data_scale != 1 else x0

    def from_eps(self, eps: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """Express noise in the denoiser's own parameterisation: the inverse of :meth:`to_eps`."""
        alpha, sigma = self._broadcast(t, x)
        match self.prediction_type:
            case "epsilon":
                return eps
            case "v_prediction":
                return (eps - sigma * x) / alpha
            case "sample":
                return (x - sigma * eps) / alpha
            case "edm":
                return (sigma * x - eps) / alpha
            case _:
                return (eps - x) / alpha

    def shift_factor(self, t: Tensor | float) -> Tensor:
        """Return ``d prediction / d eps`` at fixed ``x``: a unit shift of eps in the model's parameterisation.

        eps: 1; v, flow: ``1 / alpha``; x0: ``-sigma / alpha``; EDM: ``-1 / alpha``, with ``alpha`` kept above 1e-3
        near pure noise, where flow models have ``alpha = 0``.

        Args:
            t: Timestep(s), a number or (b,).

        Returns:
            float64 tensor of the shape of ``t``.
        """
        alpha, sigma = self.alpha_sigma(t)
        alpha = alpha.clamp(min=1e-3)
        match self.prediction_type:
            case "epsilon":
                return torch.ones_like(alpha)
            case "sample":
                return -sigma / alpha
            case "edm":
                return -1 / alpha
            case _:
                return 1 / alpha

    def _broadcast(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(torch.as_tensor(t, device=like.device))
        if alpha.ndim:
            shape = "b -> b" + " 1" * (like.ndim - 1)
            alpha, sigma = rearrange(alpha, shape), rearrange(sigma, shape)
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        return alpha.to(dtype), sigma.to(dtype)


def timestep_bins(t: Tensor, num_train_timesteps: int) -> Tensor:
    """Return the bin of each timestep: :data:`NUM_BINS` equal bins of 0 .. num_train_timesteps - 1."""
    return (t * NUM_BINS / num_train_timesteps).long().clamp(0, NUM_BINS - 1)


class SolverStep(NamedTuple):
    """Place of a denoiser call in a run.

    Attributes:
        number, total: Which solver step, counted from pure noise, and of how many.
        first: Whether the call begins the step; later ones of a second-order step start from the same latents.
        position: Index of the call among the scheduler's timesteps.
    """

    number: int
    total: int
    first: bool
    position: int


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """Solver steps of a run, from the scheduler's own timesteps.

    Schedulers of order 2 (Heun, KDPM2, DPM++ SDE) call the denoiser twice a step but the last; PNDM repeats its first
    step (four calls each with Runge-Kutta steps); DPM++ singlestep begins a step at each call of order 1.

    Attributes:
        timesteps: The scheduler's tensor of timesteps: another tensor means another run.
        times: The same as numbers.
        numbers: Solver step of each of them.
    """

    timesteps: Tensor
    times: tuple[float, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, scheduler: Scheduler) -> StepPlan:
        """Read the plan of a scheduler whose timesteps are set.

        >>> from diffusers import HeunDiscreteScheduler
        >>> scheduler = HeunDiscreteScheduler()
        >>> scheduler.set_timesteps(3)
        >>> StepPlan.of(scheduler).numbers
        (0, 0, 1, 1, 2)
        """
        if scheduler.timesteps is None:
            name = type(scheduler).__name__
            raise UserError(f"Expected timesteps of {name}, got none; call set_timesteps(...) first.")
        times = tuple(torch.as_tensor(scheduler.timesteps).double().tolist())
        order = range(len(times))
        if orders := getattr(scheduler, "order_list", None):  # DPM++ singlestep
            numbers = [sum(o == 1 for o in orders[1 : i + 1]) for i in order]
        elif (prk := getattr(scheduler, "prk_timesteps", None)) is not None:  # PNDM
            rest = sorted(set(times[len(prk) :]), reverse=True)
            numbers = [i // 4 if i < len(prk) else len(prk) // 4 + rest.index(times[i]) for i in order]
        else:
            numbers = [i // getattr(scheduler, "order", 1) for i in order]
        return cls(scheduler.timesteps, times, tuple(numbers))

    def locate(self, scheduler: Scheduler, timestep: Tensor | float) -> SolverStep:
        """Locate a denoiser call.

        Args:
            scheduler: The scheduler, which knows what it has done of the run.
            timestep: Timestep of the call: a number, or a tensor whose first entry counts.

        Raises:
            UserError: If the timestep is none of the scheduler's.

        >>> from diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler(timestep_spacing="trailing")
        >>> scheduler.set_timesteps(4)
        >>> StepPlan.of(scheduler).locate(scheduler, torch.tensor([499, 499]))
        SolverStep(number=2, total=4, first=True, position=2)
        """
        t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        index = self._find(scheduler, t)
        first, number = _begins_step(scheduler, index), self.numbers[index]
        if not first and hasattr(scheduler, "prk_timesteps") and index >= len(scheduler.prk_timesteps):
            number -= 1  # PNDM's second call, at the timestep of the next step
        return SolverStep(max(number, 0), self.numbers[-1] + 1, first, index)

    def begin(self, timestep: Tensor | float, calls: int | None = None) -> int:
        """Return the index of a run's first call.

        Args:
            timestep: Its timestep, which may stand there more than once.
            calls: Calls of the run, all that are left if it does not end early; None if unknown.
        """
        last = None if calls is None else len(self.times) - calls
        if last is not None and 0 <= last < len(self.times) and self.times[last] == float(timestep):
            return last
        return self.times.index(float(timestep))

    def _find(self, scheduler: Scheduler, t: float) -> int:
        """Return the index of a timestep: the scheduler's own where it has one, since timesteps may repeat."""
        distances = [abs(time - t) for time in self.times]
        nearest_one = min(distances, default=math.inf)
        if nearest_one > 1e-4 + 4e-3 * abs(t):  # half precision rounds timesteps
            raise UserError(
                f"Expected one of the {len(self.times)} timesteps of {type(scheduler).__name__}, got {t:g}; call "
                "scheduler.set_timesteps(...) before sampling, and give the denoiser the scheduler's own timesteps."
            )
        for own in (getattr(scheduler, name, None) for name in ("step_index", "begin_index", "counter")):
            if own is not None and own < len(distances) and distances[own] == nearest_one:
                return int(own)
        return distances.index(nearest_one)


def _begins_step(scheduler: Scheduler, index: int) -> bool:
    """Tell whether the scheduler's next step starts from the latents that it is given, not from ones it has kept."""
    if orders := getattr(scheduler, "order_list", None):
        order = orders[index]
        return order == 1 or scheduler.model_outputs[1 - order] is None
    if (prk := getattr(scheduler, "prk_timesteps", None)) is not None:
        return scheduler.counter % 4 == 0 if scheduler.counter < len(prk) else scheduler.counter != 1
    return bool(getattr(scheduler, "state_in_first_order", True))
