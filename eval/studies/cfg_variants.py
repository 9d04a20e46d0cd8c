"""Variants of classifier-free guidance as partners of mid-u guidance: a large weight, tamed in three ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from eval.metrics.frechet import frechet_distance, moments
from eval.studies.common import StudyBench, StudyConfig
from guidance.guides.midblock import MidBlockGuide
from guidance.heads import load_head
from guidance.runs.arms import guide_arms
from guidance.sampling.cfg import ClassifierFree
from guidance.utils.config import option
from guidance.utils.errors import UserError


@dataclasses.dataclass
class Config(StudyConfig):
    """Options of the study."""

    head: str = option("runs/heads/testbed-aesthetic", "rating head that guides, and modulates the weight")
    scale: float = option(2.5, "scale of mid-u guidance")
    start: float | None = option(0.1, "fraction of the steps where it begins; null: the head's default")
    cfg_scale: float = option(3.0, "weight of classifier-free guidance in the base arm")
    high: float = option(6.0, "the larger weight that the variants tame")
    rescale: float = option(0.7, "how far the deviation is pulled back to that of the conditional prediction")
    interval: list[float] = option([0.2, 0.8], "fractions of the steps between which the larger weight holds")
    target: float = option(7.0, "rating whose probability, of at least that, turns the larger weight down")


def run(bench: StudyBench, config: Config) -> list[dict[str, str]]:
    """Sample under each variant, unguided and with mid-u guidance, from the same captions and noise.

    The modulating head is a rating head, because a guide has one target for the whole batch: it cannot wait
    for the class that each caption names.

    Returns:
        One row per variant and arm, all paired with the base, plain guidance of ``cfg_scale`` unguided.  The
        Frechet distance on judge features, to as many rendered scenes of the split, has no interval and is
        biased upwards, the more the fewer the images: compare it within a table only.
    """
    spec = MidBlockGuide(head=config.head, start=config.start)
    arms, jobs = guide_arms([spec], [config.scale]), bench.captions()
    folder = f"cfg_variants/{Path(config.head).name}"  # records do not name the head that modulates
    sampled = {
        (variant, arm): s
        for variant, cfg in _variants(config).items()
        for arm, s in bench.sample(f"{folder}/{variant}", jobs, arms, cfg_scale=cfg).items()
    }
    real = moments(bench.real)
    base = next(iter(sampled.values()))
    return [
        {
            "CFG": variant,
            "arm": arm,
            "truth, sd [95%]": s.truth_change(base),
            "object / colour / time agree": bench.agreement(s),
            "FD-judge": f"{frechet_distance(*real, *moments(bench.judges.features(s.images))):.1f}",
            "drift, grey levels": s.drift(base),
            "time": s.slowdown(base),
        }
        for (variant, arm), s in sampled.items()
    ]


def _variants(config: Config) -> dict[str, ClassifierFree]:
    """Build the variants by name, the base first."""
    if len(config.interval) != 2:
        raise UserError(f"Expected an interval [start, stop], got {config.interval}; for example [0.2, 0.8].")
    start, stop = config.interval
    rating = MidBlockGuide(load_head(config.head), objective="at_least", target=config.target)
    high = config.high
    return {
        f"plain {config.cfg_scale:g}": ClassifierFree(config.cfg_scale),
        f"plain {high:g}": ClassifierFree(high),
        f"{high:g}, rescale {config.rescale:g}": ClassifierFree(high, rescale=config.rescale),
        f"{high:g}, steps {start:g} to {stop:g}": ClassifierFree(high, start=start, stop=stop),
        f"{high:g}, modulated by rating {config.target:g}": ClassifierFree(high, modulate=rating),
    }
