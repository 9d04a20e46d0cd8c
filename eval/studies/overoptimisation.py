"""Overoptimisation: truth against the guiding head's own score, as the scale grows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from eval.features.extractors import PROMPT, Extractor, rating_extractor
from eval.stats.tables import with_interval
from eval.studies.common import Sampled, StudyBench, StudyConfig, guided_arms
from guidance.guides.amortised import AmortisedGuide
from guidance.guides.base import Guide
from guidance.guides.midblock import MidBlockGuide
from guidance.heads import load_head
from guidance.runs.arms import Arm
from guidance.utils.config import option
from guidance.utils.io import atomic_path


@dataclasses.dataclass
class Config(StudyConfig):
    """Options of the study."""

    num_images: int = option(100, "images per arm")
    heads: list[str] = option(
        [f"runs/heads/testbed-aesthetic{s}" for s in ("", "-1", "-2")], "heads of one target; the first guides alone"
    )
    pessimism: list[float] = option([0.0, 1.0], "standard deviations that committees subtract")
    adapter: str | None = option(None, "adapter to compare with them")
    scales: list[float] = option([1.0, 2.0, 4.0, 8.0, 16.0], "guidance scales")
    start: float | None = option(None, "fraction of the steps where guidance begins; null: the head's default")
    cfg_scale: float = option(4.0, "weight of classifier-free guidance")


def run(bench: StudyBench, config: Config) -> list[dict[str, str]]:
    """Sample at growing scales by one head, by committees of heads and by an adapter.

    Returns:
        One row per method and scale: truth and the guiding head's own score of the finished images, both as paired
        changes in standard deviations of the unguided images.  ``overoptimisation.png`` shows them as curves.
    """
    first, *others = config.heads
    specs: dict[str, Guide] = {"one head": MidBlockGuide(head=first, start=config.start)}
    if others:
        for k in config.pessimism:
            label = f"{len(config.heads)} heads, mean" + (f" - {k:g} sd" if k else "")
            specs[label] = MidBlockGuide(head=first, committee=others, pessimism=k, start=config.start)
    if config.adapter:
        specs["adapter"] = AmortisedGuide(adapter=config.adapter, start=config.start)
    arms = {name: guided_arms(name, spec, config.scales) for name, spec in specs.items()}
    every = [Arm("unguided"), *itertools.chain.from_iterable(arms.values())]
    sampled = bench.sample("overoptimisation", bench.captions(), every, cfg_scale=config.cfg_scale)
    rate = rating_extractor(bench.pipe, load_head(first))
    scores = {name: head_scores(rate, s) for name, s in sampled.items()}
    base, rows = sampled["unguided"], []
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for name, arm in ((name, arm) for name, guided in arms.items() for arm in guided):
        s = sampled[arm.name]
        truth = s.change(base, s.truth, base.truth)
        score = s.change(base, scores[arm.name], scores["unguided"])
        scale = arm.descriptions[0]["guidance_scale"]
        curves.setdefault(name, []).append((scale, truth.effect_size, score.effect_size))
        rows.append(
            {
                "guide": name,
                "scale": f"{scale:g}",
                "truth, sd [95%]": with_interval(truth.effect_size, truth.effect_interval),
                "the head's own score, sd [95%]": with_interval(score.effect_size, score.effect_interval),
                "object / colour / time agree": bench.agreement(s),
            }
        )
    if bench.state.is_main_process:
        _plot(bench.folder / "overoptimisation.png", curves)
    return rows


def head_scores(rate: Extractor, sampled: Sampled) -> Float[np.ndarray, " n"]:
    """Score finished images by a head."""
    images = [Image.fromarray(image) for image in sampled.images]
    for image, record in zip(images, sampled.records, strict=True):
        image.info[PROMPT] = record.prompt
    return rate.embed(images)[:, 0].astype(np.float64)


def _plot(file: Path, curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> None:
    """Plot truth (solid) and the head's own score (dashed) against the scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for colour, (name, points) in enumerate(curves.items()):
        scale, truth, score = zip(*points, strict=True)
        axes.plot(scale, truth, "o-", color=f"C{colour}", label=f"{name}: truth")
        axes.plot(scale, score, "x--", color=f"C{colour}", alpha=0.6, label=f"{name}: the head's own score")
    axes.set_xscale("log", base=2)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set(xlabel="guidance scale", ylabel="change, sd of the unguided images")
    axes.legend(fontsize=8)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
