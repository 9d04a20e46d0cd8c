"""Simulated raters: a check that the intervals cover the true rate, and a trial of the whole path without people.

A rater's utility of the second image over the first is the difference of their qualities plus logistic noise, plus or
minus the position bias; a small utility is a tie.  Without ties and biases this is the model of Bradley and Terry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from eval.preference.config import Crowd
from eval.preference.pairs import Item, Key, Trial, queue
from eval.preference.stats import clustered_interval
from eval.preference.study import Study
from eval.preference.votes import VoteStore
from eval.stats.paired import wilson
from eval.stats.tables import markdown

_ATTENTIVE = 0.97  # share of attention checks that an attentive rater passes


def prefer(
    difference: ArrayLike, swapped: ArrayLike, crowd: Crowd, rng: np.random.Generator, careless: ArrayLike = False
) -> np.ndarray:
    """Draw votes: 1 for the second image, 0.5 for a tie, 0 for the first."""
    mean = np.where(careless, 0.0, difference) + np.where(swapped, crowd.position, -crowd.position)
    utility = mean + crowd.noise * rng.logistic(size=np.shape(mean))
    return np.where(np.abs(utility) < crowd.tie, 0.5, (utility > 0).astype(float))


def true_rate(differences: ArrayLike, crowd: Crowd) -> float:
    """Return the expected rate of votes on these pairs, the sides being drawn at random."""
    share = crowd.careless / crowd.raters
    total = 0.0
    for d, weight in ((np.asarray(differences, np.float64), 1 - share), (np.zeros(1), share)):
        for side in (-crowd.position, crowd.position):
            for band in (-crowd.tie, crowd.tie):
                total += weight / 4 * float(np.mean(1 / (1 + np.exp(-(d + side + band) / crowd.noise))))
    return total


def image_qualities(study: Study, rows: Sequence[Mapping[str, Any]], seed: int) -> tuple[str, dict[Key, float]]:
    """Return the name and the values of the quality that simulated raters follow.

    It is the truth score of evaluated rows, or else random, rising by half a standard deviation from arm to arm.
    """
    truth = {(str(r["arm"]), str(r["prompt_id"]), int(r["seed"])): r.get("truth") for r in rows}
    values = {key: truth.get(key) for key in study.digests}
    known = {key: float(value) for key, value in values.items() if value is not None}
    if len(known) == len(values):
        return "the truth score of the evaluation", known
    rng = np.random.default_rng(seed)
    mean = {arm: 0.5 * i for i, arm in enumerate(study.arms)}
    return "a quality drawn at random", {key: float(rng.normal(mean[key[0]])) for key in values}


def quality_difference(quality: Mapping[Key, float], item: Item) -> float:
    """Return the second image's quality less the first's."""
    first, second = item.keys
    return quality[second] - quality[first]


def simulate_votes(study: Study, store: VoteStore, quality: Mapping[Key, float], crowd: Crowd, seed: int) -> int:
    """Let a crowd answer its queues through the store that the page uses; returns the number of new answers."""
    stored = 0
    for number in range(crowd.raters):
        rater, careless = f"simulated-{number:03d}", number < crowd.careless
        for trial in queue(len(study.items), study.options, rater):
            rng = np.random.default_rng([seed, number, trial.index])
            difference = quality_difference(quality, study.items[trial.item])
            answers = {q: _answer(trial, difference, crowd, rng, careless) for q in study.options.questions}
            stored += store.append(study.vote(rater, trial, answers, simulated=True)) is not None
    return stored


def check_coverage(
    differences: ArrayLike, crowd: Crowd, *, prompts: int, per_prompt: int, studies: int = 1000, seed: int = 0
) -> dict[str, list[tuple[bool, float]]]:
    """Simulate studies, and tell whether each interval holds the true rate.

    Args:
        differences: Of quality between the images of each pair, in the population that prompts are drawn from.
        crowd: Model of the raters; their number does not matter.
        prompts: Prompts per study.
        per_prompt: Raters per prompt.
        studies: Number of studies.
        seed: Random seed.

    Returns:
        By interval, "votes" (Wilson's, votes as independent) and "prompts" (clusters): whether it holds the rate, and
        its width, for each study.
    """
    rng = np.random.default_rng(seed)
    crowd = dataclasses.replace(crowd, raters=max(per_prompt, crowd.raters))
    truth, clusters = true_rate(differences, crowd), np.repeat(np.arange(prompts), per_prompt)
    results: dict[str, list[tuple[bool, float]]] = {"votes": [], "prompts": []}
    for _ in range(studies):
        d = rng.choice(np.asarray(differences), prompts)[clusters]
        careless = rng.random(len(d)) < crowd.careless / crowd.raters
        y = prefer(d, rng.random(len(d)) < 0.5, crowd, rng, careless)
        both = {"votes": wilson(float(y.sum()), len(y)), "prompts": clustered_interval(y, clusters.tolist())}
        for name, (low, high) in both.items():
            results[name].append((low <= truth <= high, high - low))
    return results


def coverage_table(differences: ArrayLike, crowd: Crowd, *, studies: int, seed: int) -> str:
    """Check the coverage for few and many prompts and raters; returns a table in Markdown."""
    rows = []
    for prompts, per_prompt in ((20, 5), (100, 1), (100, 3), (100, 8), (500, 1)):
        results = check_coverage(differences, crowd, prompts=prompts, per_prompt=per_prompt, studies=studies, seed=seed)
        truth = true_rate(differences, dataclasses.replace(crowd, raters=max(per_prompt, crowd.raters)))
        for name, found in results.items():
            covered, width = np.array(found).T
            low, high = wilson(covered.sum(), studies)
            rows.append(
                {
                    "prompts": str(prompts),
                    "raters a prompt": str(per_prompt),
                    "true rate": f"{100 * truth:.1f}%",
                    "interval": name,
                    "covers in": f"{100 * covered.mean():.1f}% [{100 * low:.1f}, {100 * high:.1f}]",
                    "mean width": f"{100 * width.mean():.1f} points",
                }
            )
    return markdown(rows)


def _answer(trial: Trial, difference: float, crowd: Crowd, rng: np.random.Generator, careless: bool) -> str:
    if rng.random() < crowd.skip and trial.kind != "check":
        return "skip"
    if trial.kind == "check":
        value = float(rng.random() > (0.5 if careless else _ATTENTIVE))
    else:
        value = float(prefer(difference, trial.swapped, crowd, rng, careless))
    return "tie" if value == 0.5 else "left" if (value == 1) == trial.swapped else "right"
