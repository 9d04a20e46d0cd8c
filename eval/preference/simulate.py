"""Simulated raters: a check that the intervals cover the true rate, and a trial of the whole path without people.

A rater's utility of the second image over the first is the difference of their qualities plus logistic noise, plus or
minus the position bias; a small utility is a tie.  Without ties and biases this is the model of Bradley and Terry.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit

from eval.preference.analysis import clustered_interval, read_evaluation
from eval.preference.config import SimulateConfig
from eval.preference.study import Key, Study, open_study, queue
from eval.preference.votes import VoteStore, current_votes, read_lines
from eval.stats.paired import wilson
from eval.stats.tables import markdown
from guidance.utils.errors import UserError

_ATTENTIVE = 0.97  # share of attention checks that an attentive rater passes


def simulate(config: SimulateConfig) -> None:
    """Let simulated raters vote, and check how often the intervals cover the true rate."""
    study = open_study(config)
    if not all(vote.simulated for vote in current_votes(read_lines(study.folder))):
        raise UserError(f"Expected a study without people's votes, got '{study.folder}'; name another: study=.")
    rows, _ = read_evaluation(Path(config.folders[0]) / "eval")
    source, quality = image_qualities(study, rows, config.seed)
    gains = [quality[second] - quality[first] for first, second in (item.keys for item in study.items)]
    stored = simulate_votes(study, gains, config)
    print(f"{stored} answers by {config.raters} simulated raters who follow {source}, in {study.folder}")
    for first, second in study.comparisons:
        asked = [d for d, item in zip(gains, study.items, strict=True) if (item.first, item.second) == (first, second)]
        print(f"true rate of '{second}' over '{first}': {100 * true_rate(asked, config):.1f}%")
    if config.studies:
        print(f"\n{coverage_table(asked, config)}")


def prefer(
    difference: ArrayLike, swapped: ArrayLike, crowd: SimulateConfig, rng: np.random.Generator, careless: ArrayLike
) -> np.ndarray:
    """Draw votes: 1 for the second image, 0.5 for a tie, 0 for the first."""
    mean = np.where(careless, 0.0, difference) + np.where(swapped, crowd.position, -crowd.position)
    utility = mean + crowd.noise * rng.logistic(size=np.shape(mean))
    return np.where(np.abs(utility) < crowd.tie, 0.5, (utility > 0).astype(float))


def true_rate(gains: ArrayLike, crowd: SimulateConfig) -> float:
    """Return the expected rate of votes on these pairs, the sides being drawn at random."""
    offsets = np.add.outer([-crowd.position, crowd.position], [-crowd.tie, crowd.tie])
    attentive, careless = (
        expit(np.add.outer(offsets, np.asarray(d, np.float64)) / crowd.noise).mean() for d in (gains, [0])
    )
    return float(attentive + (careless - attentive) * crowd.careless / crowd.raters)


def image_qualities(study: Study, rows: pd.DataFrame, seed: int) -> tuple[str, dict[Key, float]]:
    """Return the quality that simulated raters follow: the truth score of evaluated rows, or else a random one."""
    if "truth" in rows:
        truth = rows.set_index(["arm", "prompt_id", "seed"]).truth.dropna().to_dict()
        if truth.keys() >= study.images.keys():
            return "the truth score of the evaluation", truth
    rng, level = np.random.default_rng(seed), {arm: 0.5 * i for i, arm in enumerate(study.arms)}
    return "a quality drawn at random", {key: float(rng.normal(level[key[0]])) for key in study.images}


def simulate_votes(study: Study, gains: Sequence[float], crowd: SimulateConfig) -> int:
    """Let a crowd answer its queues through the store that the page uses; return the number of new answers.

    `gains` are the qualities of the second images less those of the first, pair by pair.
    """
    store, stored = VoteStore(study.folder), 0
    for number in range(crowd.raters):
        rater, careless = f"simulated-{number:03d}", number < crowd.careless
        for trial in queue(len(study.items), study.options, rater):
            rng, answers = np.random.default_rng([crowd.seed, number, trial.index]), {}
            for question in study.options.questions:
                if rng.random() < crowd.skip and trial.kind != "check":
                    answers[question] = "skip"
                    continue
                if trial.kind == "check":
                    value = float(rng.random() > (0.5 if careless else _ATTENTIVE))
                else:
                    value = float(prefer(gains[trial.item], trial.swapped, crowd, rng, careless))
                decided = "left" if (value == 1) == trial.swapped else "right"
                answers[question] = "tie" if value == 0.5 else decided
            stored += store.append(study.vote(rater, trial, answers, simulated=True))
    return stored


def check_coverage(
    gains: ArrayLike, crowd: SimulateConfig, *, prompts: int, per_prompt: int, studies: int = 1000
) -> dict[str, tuple[float, float]]:
    """Simulate studies of prompts drawn from a population of `gains`, each with so many raters per prompt.

    Returns:
        By interval, "votes" (Wilson's, votes as independent) and "prompts" (clusters): the share of studies in which it
        holds the true rate, and its mean width.
    """
    rng, truth = np.random.default_rng(crowd.seed), true_rate(gains, crowd)
    clusters, results = np.repeat(np.arange(prompts), per_prompt), []
    for _ in range(studies):
        d = rng.choice(np.asarray(gains), prompts)[clusters]
        careless = rng.random(len(d)) < crowd.careless / crowd.raters
        y = prefer(d, rng.random(len(d)) < 0.5, crowd, rng, careless)
        results.append((wilson(float(y.sum()), len(y)), clustered_interval(y, clusters.tolist())))
    low, high = np.moveaxis(np.array(results), 2, 0)  # each: study, kind of interval
    found = zip(((low <= truth) & (truth <= high)).mean(0).tolist(), (high - low).mean(0).tolist(), strict=True)
    return dict(zip(("votes", "prompts"), found, strict=True))


def coverage_table(gains: ArrayLike, crowd: SimulateConfig) -> str:
    """Check the coverage for few and many prompts and raters; return a table in Markdown."""
    columns = ("prompts", "raters a prompt", "true rate", "interval", "covers in", "mean width")
    rows, truth = [], f"{100 * true_rate(gains, crowd):.1f}%"
    for prompts, per_prompt in ((20, 5), (100, 1), (100, 3), (100, 8), (500, 1)):
        found = check_coverage(gains, crowd, prompts=prompts, per_prompt=per_prompt, studies=crowd.studies)
        for name, (covered, width) in found.items():
            low, high = wilson(round(covered * crowd.studies), crowd.studies)
            held = f"{100 * covered:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
            cells = (str(prompts), str(per_prompt), truth, name, held, f"{100 * width:.1f} points")
            rows.append(dict(zip(columns, cells, strict=True)))
    return markdown(rows)
