"""Mid-block guidance, and the base class of all guides that score features with a trained head."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidance.guides.base import ScoringGuide, network_option, register_guide, scale_option
from guidance.utils.config import option
from guidance.utils.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from guidance.heads.networks import Head
    from guidance.models.types import Pipeline

_MID_BLOCK_COST = 1.19  # of a step with a gradient from the mid-block, in unguided steps


class HeadGuide(ScoringGuide):
    """A guide with trained heads; subclasses have a field ``head`` and define the score."""

    head: Any

    @functools.cached_property
    def heads(self) -> list[Head]:
        """The heads, loaded, frozen and in eval mode."""
        from guidance.heads.networks import load_head

        given = self.head if isinstance(self.head, Sequence) and not isinstance(self.head, str) else [self.head]
        found = [load_head(h) if isinstance(h, str | Path) else h for h in (*given, *self.further_heads())]
        return [head.eval().requires_grad_(False) for head in found]

    def further_heads(self) -> Sequence[Any]:
        """Return heads beside ``head``."""
        return ()

    @property
    def is_loaded(self) -> bool:
        """Whether the head is at hand, and not the name of one."""
        return "heads" in vars(self) or not isinstance(self.head, str | Path)

    @property
    def tap(self) -> str:
        """Tap of the heads."""
        return self.heads[0].config.tap

    @functools.cached_property
    def _fingerprints(self) -> list[str]:
        from guidance.models.denoiser import fingerprint

        return [fingerprint(head) for head in self.heads]

    def networks(self) -> list[str]:
        return self._fingerprints

    def own_range(self) -> tuple[float, float]:
        """Return the range of steps in which the first head beats chance."""
        return self.heads[0].config.start, self.heads[0].config.stop

    def prepare(self, pipe: Pipeline) -> None:
        """Refuse a pipeline that a head does not fit; move the heads to the pipeline's device."""
        from guidance.heads.networks import check_fits
        from guidance.models.denoiser import denoiser_of, device_of, fingerprint_of
        from guidance.schedule import NoiseSchedule

        self.load()
        schedule, weights = NoiseSchedule.from_scheduler(pipe.scheduler), fingerprint_of(pipe)
        for head in self.heads:
            check_fits(head, denoiser_of(pipe), schedule, weights)
            head.to(device_of(pipe))

    @property
    def folder(self) -> str:
        return str(self.head) if isinstance(self.head, str | Path) else ""

    @property
    def where(self) -> str:
        if not self.trained:
            return f"as its head says (no '{self.folder}' on this disk)"
        head = self.trained
        return f"{head['tap']} of {head['base_model'] or 'its model'}, for {head['target']} (task {head['task']})"

    @property
    def step_cost(self) -> float | None:
        return None if "up_blocks" in self.trained.get("tap", "") else _MID_BLOCK_COST

    @property
    def price(self) -> str:
        if self.step_cost is None:
            return f"more than the {_MID_BLOCK_COST:.2f} unguided ones of a guide on the mid-block"
        return f"about {self.step_cost:.2f} unguided ones (counted, Stable Diffusion at 512 px with CFG)"


@register_guide("midblock")
@dataclasses.dataclass(eq=False)
class MidBlockGuide(HeadGuide):
    """Push samples along the gradient of a head's objective, taken from the mid-block to the latents.

    The gradient passes only through the encoder half of the UNet: not the up-blocks, the VAE decoder or CLIP.  Several
    heads for one target (with other seeds or data) form a committee: the score is the mean of their scores minus
    ``pessimism`` standard deviations, so that samples are not pushed to where the heads know nothing and disagree.

    Attributes:
        head: A trained head or its folder, see :func:`guidance.load_head`, or several of them.
        guidance_scale: Strength; a negative one pushes away.  With ``normalize="cfg"`` (default) the unit is the
            difference that classifier-free guidance extrapolates.
        objective: "expected", "at_least", "class" ..., see :data:`guidance.heads.objectives.OBJECTIVES`; None takes the
            default of the head's task (the expected rating for a rating head).
        target: Label, index or threshold of the objective, where it needs one.
        committee: Further heads.
        pessimism: Standard deviations of a committee to subtract; 0 guides by its mean.
        normalize, start, stop, every, space: See :class:`~guidance.guides.base.Guide`.

    Raises:
        UserError: If an option is out of range, or the heads of a committee do not fit together.

    Reference:
        J. Whitaker, "Mid-U Guidance: Fast Classifier Guidance for Latent Diffusion Models", 2023.
    """

    head: Any = network_option("runs/heads/testbed-aesthetic", "folder of the head")
    guidance_scale: float = scale_option()
    _: dataclasses.KW_ONLY
    objective: str | None = option(
        None, "expected, at_least, class, regression, binary; null: by the head's task (of ratings: expected)"
    )
    target: Any = option(None, "label or threshold of the objective, where it needs one", kind=str | None)
    committee: Any = network_option([], "folders of further heads, of other seeds", kind=list[str])
    pessimism: float = option(0.0, "standard deviations of the committee to subtract from its mean")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.pessimism):
            raise UserError(f"Expected a finite pessimism, got {self.pessimism}.")
        if self.is_loaded:
            self.load()

    def further_heads(self) -> Sequence[Any]:
        return self.committee

    @property
    def name(self) -> str:
        return f"midblock:{self.heads[0].config.target}"

    def load(self) -> None:
        """Load the heads, and check that they fit together and have the objective."""
        _check_committee(self.heads, self.pessimism)
        self.score_of  # noqa: B018

    @functools.cached_property
    def score_of(self) -> Callable[[Tensor], Tensor]:
        """Objective of the heads' outputs."""
        from guidance.heads.objectives import build_objective

        return build_objective(self.heads[0].config, self.objective, self.target)

    def fingerprints(self) -> dict[str, Any]:
        first, *others = self.networks()
        return {"head_fingerprint": first, "committee_fingerprints": others}

    def score(self, h: Float[Tensor, "b c y x"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Evaluate the objective of the heads' outputs, for example the expected rating in 1..10."""
        scores = [self.score_of(head(h, t)) for head in self.heads]
        if len(scores) == 1:
            return scores[0]
        mean = sum(scores[1:], scores[0]) / len(scores)
        variance = sum((s - mean).square() for s in scores) / (len(scores) - 1)
        # the gradient of a standard deviation of 0 is not finite
        return mean - self.pessimism * (variance + 1e-12).sqrt()


def _check_committee(heads: Sequence[Head], pessimism: float) -> None:
    if not heads:
        raise UserError("Expected at least one head, got none.")
    if pessimism and len(heads) == 1:
        raise UserError(f"Expected a pessimism of 0 with a single head, got {pessimism}; give more heads.")
    for name in ("target", "task", "labels", "tap"):
        values = [getattr(head.config, name) for head in heads]
        if other := [value for value in values if value != values[0]]:
            raise UserError(
                f"Expected heads of one {name} in a committee, got {values[0]!r} and {other[0]!r}; train them alike "
                "but for the seed."
            )
