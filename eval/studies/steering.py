"""Steering against best-of-N at equal network calls, alone and with gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.stats.paired import paired_difference
from eval.stats.tables import with_interval
from eval.studies.common import (
    Bench,
    Sampled,
    StudyConfig,
    agreement,
    class_hits,
    precision,
    share,
    truth_change,
)
from guidance.guides import MidBlockGuide
from guidance.heads import Head
from guidance.runs.arms import Arm, Steering, midblock_arms
from guidance.testbed.scenes import ATTRIBUTES
from guidance.utils.config import option
from guidance.utils.errors import UserError


@dataclasses.dataclass
class Config(StudyConfig):
    """What is measured."""

    head: str = option("runs/heads/testbed-aesthetic", "rating head")
    class_head: str | None = option(
        None, "class head: steer empty-prompt samples to each of its classes instead of by the rating head"
    )
    particles: int = option(4, "particles an image")
    lams: list[float] = option(
        [2.0], "inverse temperatures of Feynman-Kac steering, per rating point or nat of the class"
    )
    scale: float = option(2.4, "guidance scale of the arms with gradients")
    cfg_scale: float = option(4.0, "weight of classifier-free guidance; off with class_head")

    def table_name(self, study: str) -> str:
        """The table towards a head's classes is another one."""
        return study if self.class_head is None else f"{study}-{Path(self.class_head).name}"


def run(bench: Bench, config: Config) -> list[dict[str, str]]:
    """Select among particles by a rating head, by gradients, and by both.

    Particles are drawn with DDIM's eta 1; the arms without them have eta 0.

    Returns:
        One row per arm; truth against plain sampling and against best-of-N.  With ``class_head`` the
        agreement with the class instead, over images of all classes.
    """
    if config.class_head is not None:
        return _towards_classes(bench, config, config.class_head)
    head, particles, best = config.head, config.particles, _best_name(config)
    network = bench.head(head)
    arms = _arms(config, head, network)
    deterministic = _best_of(MidBlockGuide(network), config, eta=0.0)
    arms.insert(2, Arm(f"{best}, eta 0", head=head, steering=deterministic))
    sampled = bench.sample(f"steering-{particles}", bench.captions(), arms, cfg_scale=config.cfg_scale)
    plain, best_of = sampled["unguided"], sampled[best]
    return [
        {
            "arm": arm.name,
            "truth, sd against unguided [95%]": truth_change(plain, sampled[arm.name]),
            f"against {best}": truth_change(best_of, sampled[arm.name]),
            "object / colour / time agree": agreement(bench, sampled[arm.name]),
            "denoiser calls an image": f"{particles if arm.steering else 1}x",
            "time": f"{sampled[arm.name].seconds / plain.seconds:.2f}x",
        }
        for arm in arms
    ]


def _towards_classes(bench: Bench, config: Config, folder: str) -> list[dict[str, str]]:
    """Steer empty-prompt samples to each class of a head.

    All classes start from the same noises.  They, not the images, are the units of the differences; the
    intervals of the shares take images as independent.
    """
    network, best = bench.head(folder), _best_name(config)
    attribute = network.config.target
    if attribute not in ATTRIBUTES:
        raise UserError(
            f"Expected a class head for one of {', '.join(ATTRIBUTES)}, got one for '{attribute}'; give "
            "another class_head."
        )
    sampled = _sample_classes(bench, config, folder, network)
    hits, seconds = {}, {}
    for name, parts in sampled.items():
        hits[name] = np.concatenate([class_hits(bench, attribute, k, s) for k, s in parts.items()])
        seconds[name] = np.mean([s.seconds for s in parts.values()])
    noises = [r.seed for s in sampled["unguided"].values() for r in s.records]
    rows = []
    for name, parts in sampled.items():
        features = bench.judges.features(np.concatenate([s.images for s in parts.values()]))
        selected = next(iter(parts.values())).records[0].steering is not None
        rows.append(
            {
                "arm": name,
                f"judge agrees on the {attribute}, % [95%]": share(hits[name]),
                f"against {best}, points [95%]": _points(hits[best], hits[name], noises),
                "precision": f"{precision(bench.real, features):.2f}",
                "denoiser calls an image": f"{config.particles if selected else 1}x",
                "time": f"{seconds[name] / seconds['unguided']:.2f}x",
            }
        )
    return rows


def _sample_classes(
    bench: Bench, config: Config, folder: str, network: Head
) -> dict[str, dict[str, Sampled]]:
    """Images by arm and label; num_images are spread over the labels."""
    attribute = network.config.target
    labels = ATTRIBUTES[attribute]
    # named after the head, because records do not say which one scores the particles
    where = f"steering-{config.particles}-{Path(folder).name}"
    sampled: dict[str, dict[str, Sampled]] = {}
    for label in labels:
        arms = _arms(config, folder, network, objective="class", target=label)
        arms = [dataclasses.replace(arm, conditioning="") for arm in arms]
        jobs = bench.repeated(f"{attribute}-{label}", config.num_images // len(labels))
        for name, s in bench.sample(where, jobs, arms, cfg_scale=1.0).items():
            sampled.setdefault(name, {})[label] = s
    return sampled


def _arms(config: Config, folder: str, network: Head, **objective: Any) -> list[Arm]:
    """Plain sampling; best of N and steering, alone and with gradients."""
    potential = MidBlockGuide(network, **objective)
    selections = {_best_name(config): _best_of(potential, config)}
    for lam in config.lams:
        selections[f"steered, lam {lam:g}"] = Steering(potential, config.particles, lam=lam)
    pushed = midblock_arms(network, [config.scale], head_path=folder, **objective)[1]
    gradients = dataclasses.replace(pushed, name="gradients")
    return [
        Arm("unguided"),
        *(Arm(name, head=folder, steering=s) for name, s in selections.items()),
        gradients,
        *(
            dataclasses.replace(gradients, name=f"gradients, {name}", steering=s)
            for name, s in selections.items()
        ),
    ]


def _best_of(potential: MidBlockGuide, config: Config, eta: float = 1.0) -> Steering:
    return Steering(potential, config.particles, lam=0.0, threshold=0.0, eta=eta)


def _best_name(config: Config) -> str:
    return f"best of {config.particles}"


def _points(before: np.ndarray, after: np.ndarray, noises: Sequence[int]) -> str:
    """Paired change of a share in percentage points, the noises being the pairs."""
    d = paired_difference(100.0 * before, 100.0 * after, noises)
    return with_interval(d.mean_diff, d.interval, "+.1f")
