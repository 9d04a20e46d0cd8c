"""Steering against best-of-N at equal network calls, alone and with gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from eval.stats.paired import paired_difference
from eval.stats.tables import with_interval
from eval.studies.common import StudyBench, StudyConfig, load_class_head, share
from guidance.guides import MidBlockGuide
from guidance.heads import Head, load_head
from guidance.runs.arms import Arm, Steering, guide_arms
from guidance.utils.config import option


@dataclasses.dataclass
class Config(StudyConfig):
    """Options of the study."""

    head: str = option("runs/heads/testbed-aesthetic", "rating head")
    class_head: str | None = option(
        None, "class head: steer empty-prompt samples to each of its classes instead of by the rating head"
    )
    particles: int = option(4, "particles per image")
    lams: list[float] = option(
        [2.0], "inverse temperatures of Feynman-Kac steering, per rating point or nat of the class"
    )
    scale: float = option(2.4, "guidance scale of the arms with gradients")
    cfg_scale: float = option(4.0, "weight of classifier-free guidance; off with class_head")

    def table_name(self, study: str) -> str:
        """Return the name of the table; steering towards classes adds the head's."""
        return study if self.class_head is None else f"{study}-{Path(self.class_head).name}"


def run(bench: StudyBench, config: Config) -> list[dict[str, str]]:
    """Select among particles by a rating head, by gradients, and by both.

    Particles are drawn with DDIM's eta 1; the arms without them have eta 0.

    Returns:
        One row per arm; truth against plain sampling and against best-of-N.  With ``class_head`` the
        agreement with the class instead, over images of all classes.
    """
    if config.class_head is not None:
        return _steer_to_classes(bench, config, config.class_head)
    best, network = _best_name(config), load_head(config.head)
    arms = _arms(config, config.head, network)
    deterministic = _best_of(MidBlockGuide(network), config, eta=0.0)
    arms.insert(2, Arm(f"{best}, eta 0", head=config.head, steering=deterministic))
    sampled = bench.sample(f"steering-{config.particles}", bench.captions(), arms, cfg_scale=config.cfg_scale)
    return [
        {
            "arm": name,
            "truth, sd against unguided [95%]": s.truth_change(sampled["unguided"]),
            f"against {best}": s.truth_change(sampled[best]),
            "object / colour / time agree": bench.agreement(s),
            "denoiser calls an image": f"{config.particles if s.records[0].steering else 1}x",
            "time": s.slowdown(sampled["unguided"]),
        }
        for name, s in sampled.items()
    ]


def _steer_to_classes(bench: StudyBench, config: Config, folder: str) -> list[dict[str, str]]:
    """Steer empty-prompt samples to each class of a head.

    All classes start from the same noises, which are therefore the units of the paired differences; the intervals of
    the shares take images as independent.
    """
    network, attribute = load_class_head(folder)
    best = _best_name(config)
    # named after the head, because records do not say which one scores the particles
    images = f"steering-{config.particles}-{Path(folder).name}"
    sampled = bench.sample_classes(
        images, attribute, lambda label: _arms(config, folder, network, objective="class", target=label)
    )
    hits = {name: bench.class_hits(attribute, s) for name, s in sampled.items()}
    noises = [r.seed for r in sampled["unguided"].records]
    rows = []
    for name, s in sampled.items():
        points = paired_difference(100.0 * hits[best], 100.0 * hits[name], noises)
        rows.append(
            {
                "arm": name,
                f"judge agrees on the {attribute}, % [95%]": share(hits[name]),
                f"against {best}, points [95%]": with_interval(points.mean_diff, points.interval, "+.1f"),
                "precision": bench.precision(s),
                "denoiser calls an image": f"{config.particles if s.records[0].steering else 1}x",
                "time": s.slowdown(sampled["unguided"]),
            }
        )
    return rows


def _arms(config: Config, folder: str, network: Head, **objective: Any) -> list[Arm]:
    """Return plain sampling, best of N and steering, alone and with gradients."""
    potential = MidBlockGuide(network, **objective)
    selections = {_best_name(config): _best_of(potential, config)}
    selections |= {f"steered, lam {lam:g}": Steering(potential, config.particles, lam=lam) for lam in config.lams}
    guided = guide_arms([MidBlockGuide(folder, **objective)], [config.scale])[1]
    guided = dataclasses.replace(guided, name="gradients")
    return [
        Arm("unguided"),
        *(Arm(name, head=folder, steering=s) for name, s in selections.items()),
        guided,
        *(dataclasses.replace(guided, name=f"gradients, {n}", steering=s) for n, s in selections.items()),
    ]


def _best_of(potential: MidBlockGuide, config: Config, eta: float = 1.0) -> Steering:
    return Steering(potential, config.particles, lam=0.0, threshold=0.0, eta=eta)


def _best_name(config: Config) -> str:
    return f"best of {config.particles}"
