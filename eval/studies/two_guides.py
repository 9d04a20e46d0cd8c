"""Two guides at once: how much of its effect does each keep when both push?"""

from __future__ import annotations

import dataclasses

import numpy as np

from eval.stats.tables import with_interval
from eval.studies.common import StudyBench, StudyConfig, load_class_head, resampled, share
from guidance.guides.midblock import MidBlockGuide
from guidance.runs.arms import Arm, guide_arms
from guidance.utils.config import option


@dataclasses.dataclass
class Config(StudyConfig):
    """Options of the study; num_images are spread evenly over the classes."""

    rating_head: str = option("runs/heads/testbed-aesthetic", "rating head")
    class_head: str = option("runs/heads/testbed-colour", "class head")
    rating_scale: float = option(1.0, "scale of the rating guide")
    class_scale: float = option(1.0, "scale of the class guide")


def run(bench: StudyBench, config: Config) -> list[dict[str, str]]:
    """Guide empty-prompt samples by a rating head, by a class head to each class, and by both.

    Returns:
        One row per arm: change of truth and of class agreement, and both as shares of each guide's effect alone.
    """
    _, attribute = load_class_head(config.class_head)
    rating = MidBlockGuide(head=config.rating_head, guidance_scale=config.rating_scale)

    def arms(label: str) -> list[Arm]:
        kind = MidBlockGuide(head=config.class_head, target=label, guidance_scale=config.class_scale)
        specs = {"rating": [rating], "class": [kind], "both": [rating, kind]}
        guided = [dataclasses.replace(guide_arms(s, [1.0])[1], name=name) for name, s in specs.items()]
        return [Arm("unguided"), *guided]

    sampled = bench.sample_classes(f"two/{attribute}-{{label}}", attribute, arms)
    truth = {name: s.truth for name, s in sampled.items()}
    hits = {name: bench.class_hits(attribute, s).astype(float) for name, s in sampled.items()}
    base = sampled["unguided"]
    return [
        {
            "arm": name,
            "truth, sd [95%]": s.truth_change(base),
            "of the rating guide's": _retained(truth["unguided"], truth["rating"], truth[name]),
            f"{attribute} agrees, % [95%]": share(hits[name] > 0),
            "of the class guide's": _retained(hits["unguided"], hits["class"], hits[name]),
            "time": s.slowdown(base),
        }
        for name, s in sampled.items()
    ]


def _retained(base: np.ndarray, alone: np.ndarray, together: np.ndarray) -> str:
    """Format the ratio of mean effects in percent, with a bootstrap interval; "-" if the guide alone has no effect."""
    rows = resampled(len(base))
    single, joint = ((values - base)[rows].mean(1) for values in (alone, together))
    if min(np.mean(single >= 0), np.mean(single <= 0)) > 0.025:  # the interval of its effect contains 0
        return "-"
    low, high = np.quantile((100 * joint / single)[single != 0], [0.025, 0.975])
    ratio = 100 * (together - base).mean() / (alone - base).mean()
    return with_interval(ratio, (float(low), float(high)), ".0f")
