"""Two guides at once: how much of each one's own effect is left when both push?"""

from __future__ import annotations

import dataclasses

import numpy as np

from eval.stats.tables import with_interval
from eval.studies.common import Bench, Sampled, StudyConfig, resampled, share, truth_change
from guidance.runs.arms import Arm, guide_arms
from guidance.runs.specs import MidBlockSpec
from guidance.testbed.scenes import ATTRIBUTES
from guidance.utils.config import option


@dataclasses.dataclass
class Config(StudyConfig):
    """What is measured; num_images are spread evenly over the classes."""

    rating_head: str = option("runs/heads/testbed-aesthetic", "rating head")
    class_head: str = option("runs/heads/testbed-colour", "class head")
    rating_scale: float = option(1.0, "scale of the rating guide")
    class_scale: float = option(1.0, "scale of the class guide")


def run(bench: Bench, config: Config) -> list[dict[str, str]]:
    """Guide empty-prompt samples by a rating head, by a class head to each class, and by both.

    Returns:
        One row per arm: change of truth and of class agreement, and both as shares of the guide's own effect.
    """
    attribute = bench.head(config.class_head).config.target
    labels = ATTRIBUTES[attribute]
    parts: dict[str, list[Sampled]] = {}
    for label in labels:
        taste = MidBlockSpec(head=config.rating_head, guidance_scale=config.rating_scale)
        kind = MidBlockSpec(head=config.class_head, target=label, guidance_scale=config.class_scale)
        arms = [Arm("unguided", conditioning="")]
        for name, specs in (("rating", [taste]), ("class", [kind]), ("both", [taste, kind])):
            arms.append(dataclasses.replace(guide_arms(specs, [1.0])[1], name=name, conditioning=""))
        jobs = bench.repeated(f"{attribute}-{label}", config.num_images // len(labels))
        for name, s in bench.sample(f"two/{attribute}-{label}", jobs, arms, cfg_scale=1.0).items():
            parts.setdefault(name, []).append(s)
    whole = {name: _join(part) for name, part in parts.items()}
    wanted = np.repeat(np.arange(len(labels)), config.num_images // len(labels))
    hits = {n: (bench.judges.classify(s.images)[attribute] == wanted).astype(float) for n, s in whole.items()}
    truth = {n: s.truth for n, s in whole.items()}
    return [
        {
            "arm": name,
            "truth, sd [95%]": truth_change(whole["unguided"], s),
            "of the rating guide's": _of_own(truth["unguided"], truth["rating"], truth[name]),
            f"{attribute} agrees, % [95%]": share(hits[name] > 0),
            "of the class guide's": _of_own(hits["unguided"], hits["class"], hits[name]),
            "time": f"{s.seconds / whole['unguided'].seconds:.2f}x",
        }
        for name, s in whole.items()
    ]


def _join(parts: list[Sampled]) -> Sampled:
    return Sampled(np.concatenate([p.images for p in parts]), [r for p in parts for r in p.records])


def _of_own(base: np.ndarray, alone: np.ndarray, together: np.ndarray) -> str:
    """Ratio of mean effects in percent, with a bootstrap interval over images; "-" if there is none alone."""
    rows = resampled(len(base))
    own, left = ((values - base)[rows].mean(1) for values in (alone, together))
    if min(np.mean(own >= 0), np.mean(own <= 0)) > 0.025:  # it may as well have none
        return "-"
    low, high = np.quantile((100 * left / own)[own != 0], [0.025, 0.975])
    ratio = 100 * (together - base).mean() / (alone - base).mean()
    return with_interval(ratio, (float(low), float(high)), ".0f")
