"""The arms of a comparison: plain sampling, and the same with guides at each scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from guidance.guides.base import Guide, describe_scorer
from guidance.heads.networks import Head
from guidance.heads.objectives import Target
from guidance.runs.records import UNGUIDED
from guidance.runs.specs import GuideSpec, MidBlockSpec
from guidance.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Steering:
    """Steering without gradients, see :func:`guidance.sampling.steering.steer_latents` for the options.

    Attributes:
        guide: What scores the particles; its scale is not used.
        particles, potential, lam, threshold, eta: As there; ``threshold=0, lam=0`` is best-of-N.
    """

    guide: Guide
    particles: int = 4
    potential: str = "diff"
    lam: float = 1.0
    threshold: float = 0.5
    eta: float = 1.0

    def options(self) -> dict[str, Any]:
        """All but the guide."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "guide"}

    def describe(self) -> dict[str, Any]:
        """What a record says of it."""
        return {**describe_scorer(self.guide), **self.options()}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method of a comparison.

    Attributes:
        name: Also the name of its image folder.
        guides: Empty for plain sampling.
        descriptions: One plain dict per guide, for the records.
        head: Path of the head; "" without one.
        conditioning: What the denoiser is told instead of the prompt, "" to leave it unconditional; guides follow the
            prompt all the same.  None: the prompt.
        steering: Particles and what selects among them; None: one sample an image.
    """

    name: str
    guides: tuple[Guide, ...] = ()
    descriptions: tuple[dict[str, Any], ...] = ()
    head: str = ""
    conditioning: str | None = None
    steering: Steering | None = None


def arm_name(scale: float) -> str:
    """Name the arm of a scale.

    >>> [arm_name(s) for s in (0, 1.0, -0.5)]
    ['unguided', 'scale=1', 'scale=-0.5']
    """
    return UNGUIDED if scale == 0 else f"scale={scale:.10g}"


def list_scales(scales: Sequence[float]) -> list[float]:
    """Return the scales in order, each once, 0 first: the unguided images are always sampled.

    Raises:
        UserError: If a scale is not a finite number.
    """
    for scale in scales:
        if not math.isfinite(scale):
            raise UserError(f"Expected finite scales, got {scale}; 0 samples without guidance.")
    named = {arm_name(scale): float(scale) for scale in scales}
    named.pop(UNGUIDED, None)
    return [0.0, *named.values()]


def midblock_arms(
    head: Head | None,
    scales: Sequence[float],
    *,
    head_path: str = "",
    objective: str | None = None,
    target: Target = None,
    normalize: str | None = "cfg",
    start: float | None = None,
    stop: float | None = None,
    every: int = 1,
    space: str = "eps",
) -> list[Arm]:
    """Make the unguided arm and one of :class:`MidBlockGuide` per other scale; arguments as there.

    Raises:
        UserError: If an option is out of range, or a scale other than 0 comes without a head.
    """
    if head is None and list_scales(scales) != [0]:
        raise UserError(
            f"Expected a head for scale {list_scales(scales)[1]:g}, got none; give one with head=FOLDER (train it "
            "with 'accelerate launch train/head.py'), or set scales=[0]."
        )
    options: dict[str, Any] = {
        "objective": objective,
        "target": target,
        "normalize": normalize,
        "space": space,
    }
    spec = MidBlockSpec(head=head_path, start=start, stop=stop, every=every, **options)
    if head is not None:
        spec.loaded = [head]
    return guide_arms([spec], scales)


def guide_arms(specs: Sequence[GuideSpec], scales: Sequence[float]) -> list[Arm]:
    """Make the unguided arm and one per other scale, in which all guides push, each by its own factor of the scale.

    Raises:
        UserError: If an option is out of range, or a part of a guide cannot be loaded.
    """
    arms = []
    for scale in list_scales(scales):
        guides = [spec.build(scale * spec.guidance_scale) for spec in specs] if scale else []
        described = [spec.describe(guide) for spec, guide in zip(specs, guides, strict=False)]
        head = next((d["head"] for d in described if "head" in d), "")
        arms.append(Arm(arm_name(scale), tuple(guides), tuple(described), head))
    return arms


def steered_arms(arms: Sequence[Arm], steering: Steering) -> list[Arm]:
    """The unguided arm, steering alone, and steering with the gradients of every other arm."""
    alone = Arm("steered", head=next((arm.head for arm in arms if arm.head), ""), steering=steering)
    pushed = [dataclasses.replace(arm, name=f"{arm.name}, steered", steering=steering) for arm in arms[1:]]
    return [arms[0], alone, *pushed]
