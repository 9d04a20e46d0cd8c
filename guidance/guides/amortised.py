"""Amortised guidance: an adapter predicts the direction of mid-u guidance, and no gradient is taken at all."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidance.guides.base import DirectGuide, network_option, register_guide, scale_option

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from guidance.heads.adapter import Adapter
    from guidance.models.types import Pipeline


@register_guide("amortised")
@dataclasses.dataclass(eq=False)
class AmortisedGuide(DirectGuide):
    """Push samples along the direction that an adapter predicts, at the cost of a tiny network per step.

    ``eps~ = eps - s RMS(eps_cond - eps_uncond) f(x_t, eps, x0, t)``, where f has RMS 1 and points where the teacher's
    score rises.  A positive scale follows the teacher (its heads and their signs are in ``adapter.config.teacher``).

    Attributes:
        adapter: A trained adapter or its folder, see :func:`guidance.heads.adapter.load_adapter`.
        guidance_scale: RMS of the shift in units of the difference that classifier-free guidance works with;
            negative pushes away.
        start, stop, every, space: See :class:`~guidance.guides.base.Guide`; None takes the teacher's range.

    Reference:
        Teacher: J. Whitaker, "Mid-U Guidance: Fast Classifier Guidance for Latent Diffusion Models", 2023.
    """

    adapter: Any = network_option("runs/adapters/testbed-aesthetic", "folder of the adapter")
    guidance_scale: float = scale_option()

    @functools.cached_property
    def network(self) -> Adapter:
        """The adapter, loaded, frozen and in eval mode."""
        from guidance.heads.adapter import load_adapter

        adapter = load_adapter(self.adapter) if isinstance(self.adapter, str | Path) else self.adapter
        return adapter.eval().requires_grad_(False)

    @property
    def name(self) -> str:
        heads = "+".join(str(part.get("predicts", "head")) for part in self.network.config.teacher) or "adapter"
        return f"amortised:{heads}"

    def load(self) -> None:
        self.network  # noqa: B018

    def own_range(self) -> tuple[float, float]:
        """Return the range of steps in which the teacher guides."""
        return self.network.config.start, self.network.config.stop

    def networks(self) -> list[str]:
        from guidance.models.denoiser import fingerprint

        return [fingerprint(self.network), *self._teachers()]

    def _teachers(self) -> list[str]:
        return [part["fingerprint"] for part in self.network.config.teacher if "fingerprint" in part]

    def fingerprints(self) -> dict[str, Any]:
        return {"adapter_fingerprint": self.networks()[0], "teacher_fingerprints": self._teachers()}

    def prepare(self, pipe: Pipeline) -> None:
        """Refuse a pipeline that the adapter does not fit; move the adapter to the pipeline's device."""
        from guidance.heads.adapter import check_adapter_fits
        from guidance.models.denoiser import denoiser_of, device_of, fingerprint_of
        from guidance.schedule import NoiseSchedule

        schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        check_adapter_fits(self.network, denoiser_of(pipe), schedule, fingerprint_of(pipe))
        self.network.to(device_of(pipe))

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
        """
        return self.network(x_t, eps, x0, t)

    @property
    def folder(self) -> str:
        return str(self.adapter) if isinstance(self.adapter, str | Path) else ""

    @property
    def where(self) -> str:
        return "none (reads latents and prediction)"

    @property
    def price(self) -> str:
        return "about 1.00 unguided ones (it is predicted: no backward pass)"
