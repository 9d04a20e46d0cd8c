"""Read noise schedules from diffusers schedulers; convert between eps, v, x0 and flow predictions.

Notation: the denoiser sees ``x = alpha x0 + sigma eps`` (after ``scheduler.scale_model_input``), so for variance
preserving (VP) models ``alpha^2 + sigma^2 = 1`` *whatever scheduler samples them*: Euler and LMS divide their
``x0 + sigma_ve eps`` by ``sqrt(1 + sigma_ve^2)`` first.  Flow matching: ``alpha = 1 - sigma``, ``v = eps - x0``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from guidance.utils.errors import UserError, nearest

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


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
        kind: "vp" (variance preserving) or "flow" (rectified flow).
        prediction_type: What the denoiser returns, one of :data:`PREDICTIONS`.
        num_train_timesteps: Timesteps run from 0 (clean) to this minus one.
        log_snr: ``log(alpha^2 / sigma^2)`` per training timestep, float64 on the CPU; None for flow models, whose
            ``sigma`` is ``t / num_train_timesteps`` by definition.
    """

    kind: str
    prediction_type: str
    num_train_timesteps: int
    log_snr: Float[Tensor, " T"] | None = None

    @classmethod
    def from_scheduler(cls, scheduler: Scheduler) -> NoiseSchedule:
        """Read the schedule of any diffusers scheduler.

        Args:
            scheduler: DDIM, DDPM, DPM++, Euler, LMS, Heun, PNDM, UniPC ... or a flow-matching scheduler.

        Raises:
            UserError: If the noise schedule or the prediction type of the scheduler is unknown.
        """
        config = scheduler.config
        total = int(config.get("num_train_timesteps", 1000))
        name = type(scheduler).__name__
        prediction = config.get("prediction_type", "epsilon")
        if "FlowMatch" in name or prediction == "flow_prediction" or config.get("use_flow_sigmas"):
            return cls("flow", "flow_prediction", total)
        if prediction not in PREDICTIONS:
            raise UserError(f"Expected a known prediction type, got '{prediction}'.{nearest(prediction, PREDICTIONS)}")
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
            t: Timesteps 0..num_train_timesteps - 1, a number or shape (b,).

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
        assert self.log_snr is not None
        table = self.log_snr.to(t.device)
        low = t64.floor().long().clamp(0, len(table) - 1)
        high = (low + 1).clamp(max=len(table) - 1)
        log_snr = torch.lerp(table[low], table[high], (t64 - low).clamp(0, 1))
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noise clean data: ``alpha x0 + sigma eps``.

        Args:
            x0, eps: Shape (b, ...).
            t: Timesteps, shape (b,).
        """
        alpha, sigma = self._broadcast(t, x0)
        return alpha * x0 + sigma * eps

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
            case _:  # v = eps - x0, x = (1 - sigma) x0 + sigma eps
                return x + alpha * prediction

    def to_x0(self, prediction: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """Convert the denoiser's output to the clean data it implies; arguments as in :meth:`to_eps`."""
        alpha, sigma = self._broadcast(t, x)
        match self.prediction_type:
            case "epsilon":
                return (x - sigma * prediction) / alpha
            case "v_prediction":
                return alpha * x - sigma * prediction
            case "sample":
                return prediction
            case _:
                return x - sigma * prediction

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
            case _:
                return (eps - x) / alpha

    def shift_factor(self, t: Tensor | float) -> Tensor:
        """Return ``d prediction / d eps`` at fixed ``x``: a unit shift of eps in the model's parameterisation.

        eps: 1; v: ``1 / alpha``; x0: ``-sigma / alpha``; flow: ``1 / (1 - sigma)``, with ``alpha`` kept above 1e-3
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
            case _:
                return 1 / alpha

    def _broadcast(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(torch.as_tensor(t, device=like.device))
        if alpha.ndim:
            shape = "b -> b" + " 1" * (like.ndim - 1)
            alpha, sigma = rearrange(alpha, shape), rearrange(sigma, shape)
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        return alpha.to(dtype), sigma.to(dtype)


def step_position(scheduler: Scheduler, timestep: Tensor | float) -> tuple[int, int, float]:
    """Locate a denoiser call among the sampling steps.

    Args:
        scheduler: A diffusers scheduler whose timesteps are set.
        timestep: Timestep of the call: a number, or a tensor whose first entry counts.

    Returns:
        Index of the nearest sampling step, the number of steps, and the timestep.

    >>> from diffusers import DDIMScheduler
    >>> scheduler = DDIMScheduler(timestep_spacing="trailing")
    >>> scheduler.set_timesteps(4)
    >>> step_position(scheduler, torch.tensor([499, 499]))
    (2, 4, 499.0)
    """
    timesteps = scheduler.timesteps.cpu().double()
    t = float(torch.as_tensor(timestep).reshape(-1)[0])
    return int((timesteps - t).abs().argmin()), len(timesteps), t
