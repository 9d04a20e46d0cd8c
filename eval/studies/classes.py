"""Class guidance from the empty prompt: a class head makes an unconditional model a class-conditional one."""

from __future__ import annotations

import dataclasses

from eval.studies.common import StudyBench, StudyConfig, load_class_head, share
from guidance.guides.midblock import MidBlockGuide
from guidance.runs.arms import Arm, guide_arms
from guidance.testbed.scenes import ATTRIBUTES
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
        labels = ATTRIBUTES[attribute]
        for arm, s in sampled.items():
            hits = bench.class_hits(attribute, s)
            shares = dict(zip(labels, hits.reshape(len(labels), -1).mean(1), strict=True))
            worst = min(labels, key=shares.__getitem__)
            rows.append(
                {
                    "attribute": attribute,
                    "arm": arm,
                    "judge agrees, % [95%]": share(hits),
                    "precision": bench.precision(s),
                    "worst class": f"{worst} {100 * shares[worst]:.0f}",
                    "chance": f"{100 / len(labels):.1f}",
                    "time": s.slowdown(sampled["unguided"]),
                }
            )
    return rows
