"""Mid-u guidance (Whitaker 2023): the gradient of a small head on mid-block activations."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from guidance.guides.base import Strength
from guidance.heads import Head, check_fits
from guidance.objectives import build_objective
from guidance.schedule import NoiseSchedule


class MidBlockGuide:
    """Push samples along the gradient of a head's objective, taken from the mid-block to the latents.

    The gradient passes the encoder half of the UNet only: not the up-blocks, the VAE decoder or CLIP.

    Args:
        head: A trained head, see :func:`guidance.load_head`.
        guidance_scale: Strength; negative pushes away.  With ``normalize="cfg"`` (default) 1 means: as large as
            the difference that classifier-free guidance works with.
        objective: "expected", "at_least", "class" ..., see :data:`guidance.objectives.OBJECTIVES`; None takes the
            default of the head's task (the expected rating for a rating head).
        target: Label, index or threshold of the objective, where it needs one.
        normalize, every, space: See :class:`~guidance.guides.base.Strength`.
        start, stop: Fractions of the steps; None takes the head's own range, where it beats chance.

    Reference:
        J. Whitaker, "Mid-U Guidance: Fast Classifier Guidance for Latent Diffusion Models", 2023.
    """

    def __init__(
        self,
        head: Head,
        guidance_scale: float = 1.0,
        *,
        objective: str | None = None,
        target: str | int | float | None = None,
        normalize: str | None = "cfg",
        start: float | None = None,
        stop: float | None = None,
        every: int = 1,
        space: str = "eps",
    ) -> None:
        config = head.config
        self.head = head.eval().requires_grad_(False)
        self.tap = config.tap
        self.name = f"midblock:{config.target}"
        self.objective = build_objective(config, objective, target)
        self.strength = Strength(
            guidance_scale=guidance_scale,
            normalize=normalize,
            start=config.start if start is None else start,
            stop=config.stop if stop is None else stop,
            every=every,
            space=space,
        )

    def prepare(self, pipe: Any) -> None:
        """Refuse a pipeline that the head does not fit; move the head to the pipeline's device."""
        from guidance.pipelines import fingerprint

        check_fits(self.head, pipe.unet, NoiseSchedule.from_scheduler(pipe.scheduler), fingerprint(pipe.unet))
        self.head.to(pipe.unet.device)

    def score(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The objective of the head's output, for example the expected rating in 1..10."""
        return self.objective(self.head(h, t))
