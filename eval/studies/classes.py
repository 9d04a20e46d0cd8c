"""Class guidance from the empty prompt: a class head makes an unconditional model a class-conditional one."""

from __future__ import annotations

import dataclasses

import numpy as np

from eval.studies.common import StudyBench, StudyConfig, load_class_head, mean_seconds, share
from guidance.guides.midblock import MidBlockGuide
from guidance.runs.arms import Arm, guide_arms
from guidance.utils.config import option


@dataclasses.dataclass
class Config(StudyConfig):
    """Options of the study; num_images are spread evenly over the classes."""

    heads: list[str] = option([f"runs/heads/testbed-{a}" for a in ("object", "colour", "time")], "class heads")
    scales: list[float] = option([1.0], "guidance scales")
    start: float | None = option(None, "fraction of the steps where guidance begins; null: the head's default")


def run(bench: StudyBench, config: Config) -> list[dict[str, str]]:
    """Guide empty-prompt samples to each class of each head's attribute.

    Returns:
        One row per attribute and scale: share of images whose class the judge classifier sees, and the precision of all
        of them (Kynkaanniemi et al. 2019) beside as many rendered scenes.
    """
    rows = []
    for folder in config.heads:
        _, attribute = load_class_head(folder)

        def arms(label: str, folder: str = folder) -> list[Arm]:
            spec = MidBlockGuide(head=folder, objective="class", target=label, start=config.start)
            return guide_arms([spec], config.scales)

        sampled = bench.sample_classes(f"classes/{attribute}", attribute, arms)
        base = mean_seconds(sampled["unguided"])
        for arm, parts in sampled.items():
            hits = bench.class_hits(attribute, parts)
            worst = min(hits, key=lambda label: hits[label].mean())
            rows.append(
                {
                    "attribute": attribute,
                    "arm": arm,
                    "judge agrees, % [95%]": share(np.concatenate(list(hits.values()))),
                    "precision": bench.precision(parts),
                    "worst class": f"{worst} {100 * hits[worst].mean():.0f}",
                    "chance": f"{100 / len(hits):.1f}",
                    "time": f"{mean_seconds(parts) / base:.2f}x",
                }
            )
    return rows
