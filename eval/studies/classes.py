"""Class guidance from the empty prompt: a class head makes an unconditional model a class-conditional one."""

from __future__ import annotations

import dataclasses

import numpy as np

from eval.studies.common import Bench, Sampled, StudyConfig, class_hits, precision, share
from guidance.runs.arms import arm_name, guide_arms
from guidance.runs.specs import MidBlockSpec
from guidance.testbed.scenes import ATTRIBUTES
from guidance.utils.config import option


@dataclasses.dataclass
class Config(StudyConfig):
    """What is measured; num_images are spread evenly over the classes."""

    heads: list[str] = option(
        [f"runs/heads/testbed-{a}" for a in ("object", "colour", "time")], "class heads"
    )
    scales: list[float] = option([1.0], "guidance scales")
    start: float | None = option(None, "fraction of the steps where guidance begins; null: the head's own")


def run(bench: Bench, config: Config) -> list[dict[str, str]]:
    """Guide empty-prompt samples to each class of each head's attribute.

    Returns:
        One row per attribute and scale: share of images whose class the judge classifier sees, and the precision of all
        of them (Kynkaanniemi et al. 2019) beside as many rendered scenes.
    """
    rows = []
    for folder in config.heads:
        head = bench.head(folder)
        attribute = head.config.target
        sampled: dict[str, dict[str, Sampled]] = {}
        for label in ATTRIBUTES[attribute]:
            spec = MidBlockSpec(head=folder, objective="class", target=label, start=config.start)
            arms = [dataclasses.replace(arm, conditioning="") for arm in guide_arms([spec], config.scales)]
            jobs = bench.repeated(f"{attribute}-{label}", config.num_images // len(ATTRIBUTES[attribute]))
            sampled[label] = bench.sample(f"classes/{attribute}", jobs, arms, cfg_scale=1.0)
        base = np.mean([s["unguided"].seconds for s in sampled.values()])
        for name in map(arm_name, [0.0, *config.scales]):
            hits = {label: class_hits(bench, attribute, label, s[name]) for label, s in sampled.items()}
            features = bench.judges.features(np.concatenate([s[name].images for s in sampled.values()]))
            worst = min(hits, key=lambda label: hits[label].mean())
            seconds = np.mean([s[name].seconds for s in sampled.values()])
            rows.append(
                {
                    "attribute": attribute,
                    "arm": name,
                    "judge agrees, % [95%]": share(np.concatenate(list(hits.values()))),
                    "precision": f"{precision(bench.real, features):.2f}",
                    "worst class": f"{worst} {100 * hits[worst].mean():.0f}",
                    "chance": f"{100 / len(hits):.1f}",
                    "time": f"{seconds / base:.2f}x",
                }
            )
    return rows
