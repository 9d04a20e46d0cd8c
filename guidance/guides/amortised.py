"""Amortised guidance: an adapter predicts the direction of mid-u guidance, and no gradient is taken at all."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from guidance.guides.base import Strength, unit_rms
from guidance.heads.adapter import Adapter, check_adapter_fits
from guidance.models.denoiser import denoiser_of, device_of, fingerprint_of
from guidance.models.types import Pipeline
from guidance.schedule import NoiseSchedule


class AmortisedGuide:
    """Push samples along the direction that an adapter predicts, at the cost of a tiny network per step.

    ``eps~ = eps - s RMS(eps_cond - eps_uncond) f(x_t, eps, x0, t)``, where f has RMS 1 and points where the teacher's
    score rises.  A positive scale follows the teacher (its heads and their signs are in ``adapter.config.teacher``).

    Args:
        adapter: A trained adapter, see :func:`guidance.heads.adapter.load_adapter`.
        guidance_scale: RMS of the shift in units of the difference that classifier-free guidance works with;
            negative pushes away.
        start, stop: Fractions of the steps; None takes the range in which the teacher guides.
        every: Predict a direction every ``every``-th step and reuse it in between.

    Reference:
        Teacher: J. Whitaker, "Mid-U Guidance: Fast Classifier Guidance for Latent Diffusion Models", 2023.
    """

    tap = "direct"

    def __init__(
        self,
        adapter: Adapter,
        guidance_scale: float = 1.0,
        *,
        start: float | None = None,
        stop: float | None = None,
        every: int = 1,
    ) -> None:
        config = adapter.config
        self.adapter = adapter.eval().requires_grad_(False)
        heads = "+".join(str(part.get("predicts", "head")) for part in config.teacher) or "adapter"
        self.name = f"amortised:{heads}"
        self.strength = Strength.within(
            (config.start, config.stop), start=start, stop=stop, guidance_scale=guidance_scale, every=every
        )

    def prepare(self, pipe: Pipeline) -> None:
        """Refuse a pipeline that the adapter does not fit; move the adapter to the pipeline's device."""
        schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        check_adapter_fits(self.adapter, denoiser_of(pipe), schedule, fingerprint_of(pipe))
        self.adapter.to(device_of(pipe))

    @torch.no_grad()
    def direction(
        self,
        x_t: Float[Tensor, "b c y x"],
        eps: Float[Tensor, "b c2 y x"],
        x0: Float[Tensor, "b c2 y x"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c y x"]:
        """Predict the direction of the denoiser's input in which the teacher's score rises.

        Args:
            x_t: The denoiser's input; any dtype.
            eps: Conditional prediction as noise.
            x0: Clean latents that it implies.
            t: Timesteps.

        Returns:
            float32, RMS 1 per sample.
        """
        return unit_rms(self.adapter(x_t, eps, x0, t))
