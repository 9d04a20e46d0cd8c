"""Discriminator guidance: does pushing towards what a head takes for real bring the samples closer to the world?"""

from __future__ import annotations

import dataclasses

import numpy as np

from eval.frechet import frechet_distance, moments
from eval.precision_recall import precision_recall
from eval.studies.common import Bench, StudyConfig, agreement
from guidance.arms import guide_arms
from guidance.guide_specs import MidBlockSpec
from guidance.options import option
from guidance.prompts import Prompt
from guidance.run import list_jobs
from guidance.testbed.scenes import scenes

_APART = 100_000  # scenes whose captions are sampled lie this far from those of the reference, and blocks from blocks


@dataclasses.dataclass
class Config(StudyConfig):
    """What is measured; num_images per block and arm are compared with as many rendered scenes."""

    head: str = option("runs/heads/testbed-discriminator", "discriminator head")
    scales: list[float] = option([1.0], "weights of its log-odds' gradient (Kim et al. 2023: 1 to 2)")
    start: float | None = option(None, "fraction of the steps where guidance begins; null: the head's own")
    stop: float | None = option(None, "fraction of the steps where guidance ends; null: the head's own")
    cfg_scales: list[float] = option([1.0, 2.0], "weights of classifier-free guidance")
    blocks: int = option(3, "disjoint blocks of captions and noises")


def run(bench: Bench, config: Config) -> list[dict[str, str]]:
    """Sample captions of scenes at each CFG weight, unguided and with the discriminator's raw gradient.

    Returns:
        One row per CFG weight and scale: the Frechet distance on judge features of each block, and their mean.
    """
    split, n = config.split, config.num_images
    real = bench.real
    half = len(real) // 2
    floor = frechet_distance(*moments(real[:half]), *moments(real[half:]))
    rows = []
    for cfg in config.cfg_scales:
        spec = MidBlockSpec(
            start=config.start, stop=config.stop, head=config.head, objective="binary", normalize=None
        )
        found: dict[str, list[tuple[float, float, float, str, float]]] = {}
        for block in range(config.blocks):
            captions = [s.caption for s in scenes(split, n, start=_APART * (block + 1))]
            prompts = [Prompt(f"scene{block}-{i:05d}", text) for i, text in enumerate(captions)]
            jobs = list_jobs(prompts, 1, config.seed + 1000 * _APART * block)
            arms = guide_arms([spec], config.scales)
            for name, s in bench.sample(f"discriminator/cfg{cfg:g}", jobs, arms, cfg_scale=cfg).items():
                features = bench.judges.features(s.images)
                pr = precision_recall(real, features)
                fd = frechet_distance(*moments(real), *moments(features))
                found.setdefault(name, []).append(
                    (fd, pr.precision, pr.recall, agreement(bench, s), s.seconds)
                )
        base = found["unguided"]
        for name, measured in found.items():
            distance, precision, recall = (np.array([m[i] for m in measured]) for i in range(3))
            change = 100 * (distance / np.array([m[0] for m in base]) - 1)
            rows.append(
                {
                    "CFG": f"{cfg:g}",
                    "arm": name,
                    "FD-judge": f"{distance.mean():.1f} ({', '.join(f'{x:.1f}' for x in distance)})",
                    "change": f"{change.mean():+.0f}% ({', '.join(f'{x:+.0f}' for x in change)})",
                    "precision / recall": f"{precision.mean():.2f} / {recall.mean():.2f}",
                    "object / colour / time agree": measured[0][3],
                    "time": f"{measured[0][4] / base[0][4]:.2f}x",
                }
            )
    return [
        *rows,
        {**dict.fromkeys(rows[0], ""), "arm": "two halves of the scenes", "FD-judge": f"{floor:.1f}"},
    ]
