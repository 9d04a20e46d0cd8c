"""The arms of a comparison: unguided sampling, and the same with guides at each scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from guidance.guides.base import Guide, ScoringGuide, describe_scorer
from guidance.runs.records import UNGUIDED
from guidance.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Steering:
    """Options of steering without gradients, see :func:`guidance.sampling.steering.steer_latents`.

    Attributes:
        guide: Scores the particles; its scale is not used.
        particles, potential, lam, threshold, eta: As there; ``threshold=0, lam=0`` is best-of-N.
    """

    guide: ScoringGuide
    particles: int = 4
    potential: str = "diff"
    lam: float = 1.0
    threshold: float = 0.5
    eta: float = 1.0

    def options(self) -> dict[str, Any]:
        """Return all options but the guide."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "guide"}

    def describe(self) -> dict[str, Any]:
        """Describe the steering for a record."""
        return {**describe_scorer(self.guide), **self.options()}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method of a comparison.

    Attributes:
        name: Also the name of its image folder.
        guides: Empty for unguided sampling.
        descriptions: One plain dict per guide, for the records.
        head: Path of the head; "" without one.
        conditioning: Text that the denoiser sees instead of the prompt, "" for none; guides follow the prompt all the
            same.  None: the prompt.
        steering: Particles and how they are selected; None: one sample per image.
    """

    name: str
    guides: tuple[Guide, ...] = ()
    descriptions: tuple[dict[str, Any], ...] = ()
    head: str = ""
    conditioning: str | None = None
    steering: Steering | None = None


def arm_name(scale: float) -> str:
    """Return the name of the arm of a scale.

    >>> [arm_name(s) for s in (0, 1.0, -0.5)]
    ['unguided', 'scale=1', 'scale=-0.5']
    """
    return UNGUIDED if scale == 0 else f"scale={scale:.10g}"


def list_scales(scales: Sequence[float]) -> list[float]:
    """Return the distinct scales in order, 0 first: the unguided images are always sampled."""
    named = {arm_name(scale): float(scale) for scale in scales}
    named.pop(UNGUIDED, None)
    return [0.0, *named.values()]


def guide_arms(guides: Sequence[Guide], scales: Sequence[float]) -> list[Arm]:
    """Make the unguided arm and one per other scale, in which all guides act, each with its own factor of the scale."""
    arms, given = [], guides
    for scale in list_scales(scales):
        guides = [guide.at(scale) for guide in given] if scale else []
        descriptions = [guide.describe() for guide in guides]
        head = next((d["head"] for d in descriptions if "head" in d), "")
        arms.append(Arm(arm_name(scale), tuple(guides), tuple(descriptions), head))
    return arms


def missing_head(scale: float) -> UserError:
    """Return the error of a scale without a head or guide."""
    return UserError(
        f"Expected a head for scale {scale:g}, got none; give one with head=FOLDER (train it with 'accelerate launch "
        "train/head.py') or a guide, or set the scale to 0."
    )


def steered_arms(arms: Sequence[Arm], steering: Steering) -> list[Arm]:
    """Return the unguided arm, steering alone, and steering with the gradients of every other arm."""
    alone = Arm("steered", head=next((arm.head for arm in arms if arm.head), ""), steering=steering)
    guided = [dataclasses.replace(arm, name=f"{arm.name}, steered", steering=steering) for arm in arms[1:]]
    return [arms[0], alone, *guided]
