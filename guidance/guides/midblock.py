"""Mid-u guidance (Whitaker 2023): the gradient of a small head on mid-block activations."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from guidance.guides.head import HeadGuide
from guidance.heads import Head
from guidance.objectives import build_objective


class MidBlockGuide(HeadGuide):
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
        self.objective = build_objective(head.config, objective, target)
        super().__init__(
            head,
            f"midblock:{head.config.target}",
            guidance_scale=guidance_scale,
            normalize=normalize,
            start=start,
            stop=stop,
            every=every,
            space=space,
        )

    def score(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The objective of the head's output, for example the expected rating in 1..10."""
        return self.objective(self.head(h, t))
