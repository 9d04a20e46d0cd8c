"""Simulated raters: to try the whole path, and to see how often the intervals cover the true rate.

A rater's utility of the second image over the first is ``difference of quality + noise * e``, e logistic, plus or minus
the position bias; below the tie band it is a tie.  With noise 1 and no ties this is the model of Bradley and Terry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.preference.pairs import Trial, queue
from eval.preference.stats import Interval, clustered_interval
from eval.preference.study import Key, Study
from eval.preference.votes import Vote, VoteStore
from eval.stats.paired import wilson
from eval.stats.tables import markdown
from guidance.testbed.models import IMAGE_SIZE
from guidance.testbed.scenes import parse_caption
from guidance.testbed.truth import truth_score
from guidance.utils.errors import UserError
from guidance.utils.images import to_rgb

_ATTENTIVE = 0.97  # attention checks that one who does not answer at random passes


@dataclasses.dataclass(frozen=True)
class Crowd:
    """Raters who follow a quality with noise.

    Attributes:
        raters: How many.
        noise: Scale of the logistic noise, in units of the quality.
        tie: Half-width of the band of utilities that is a tie.
        position: Added to the utility of the left image.
        random_raters: Share of raters who follow the noise alone, and whom attention checks find.
        skip: Share of pairs that are skipped.
    """

    raters: int = 8
    noise: float = 1.0
    tie: float = 0.3
    position: float = 0.0
    random_raters: float = 0.0
    skip: float = 0.01

    def __post_init__(self) -> None:
        right = self.raters >= 1 and self.noise > 0 and self.tie >= 0
        if not (right and 0 <= self.random_raters <= 1 and 0 <= self.skip < 1):
            raise UserError(
                f"Expected raters from 1, noise above 0, tie from 0, random_raters and skip as shares, got {self}."
            )

    @property
    def careless(self) -> int:
        """Number of raters who answer at random; they come first."""
        return round(self.random_raters * self.raters)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How often intervals held the true rate in simulated studies.

    Attributes:
        interval: "votes" (Wilson's, votes as independent) or "prompts" (clusters).
        prompts, raters, votes: Of a study: prompts drawn, raters of each prompt, votes.
        truth: The rate in the population of prompts.
        covered: Share of studies whose interval held it, with the 95% interval of that share.
        width: Mean width.
    """

    interval: str
    prompts: int
    raters: int
    votes: int
    truth: float
    covered: float
    covered_interval: Interval
    width: float


def prefer(
    difference: Any, swapped: Any, crowd: Crowd, rng: np.random.Generator, careless: Any = False
) -> np.ndarray:
    """Draw votes: 1 for the second image, 0.5 for a tie, 0 for the first."""
    followed = np.where(careless, 0.0, difference) + np.where(swapped, crowd.position, -crowd.position)
    utility = followed + crowd.noise * rng.logistic(size=np.shape(followed))
    return np.where(np.abs(utility) < crowd.tie, 0.5, (utility > 0).astype(float))


def true_rate(differences: np.ndarray, crowd: Crowd) -> float:
    """The rate that infinitely many votes on these pairs would give, sides being drawn at random."""
    share = crowd.careless / crowd.raters
    total = 0.0
    for d, weight in ((np.asarray(differences, np.float64), 1 - share), (np.zeros(1), share)):
        for side in (-crowd.position, crowd.position):
            for band in (-crowd.tie, crowd.tie):
                total += weight / 4 * float(np.mean(1 / (1 + np.exp(-(d + side + band) / crowd.noise))))
    return total


def image_qualities(
    study: Study, files: Mapping[Key, Path], rows: Sequence[Mapping[str, Any]], seed: int
) -> tuple[str, dict[Key, float]]:
    """What simulated raters follow, and its values.

    The truth score of evaluated rows; else that of the images, where they are the testbed's; else a quality drawn at
    random, which rises by half a standard deviation from arm to arm.
    """
    told = {(str(r["arm"]), str(r["prompt_id"]), int(r["seed"])): r.get("truth") for r in rows}
    values = {key: told.get(key) for key in study.digests}
    if all(value is not None for value in values.values()):
        return "the truth score of the evaluation", {key: float(v) for key, v in values.items()}  # type: ignore[arg-type]
    if all(file.is_file() for file in files.values()) and _is_testbed(study, files):
        return "the testbed's truth score of the images", _truth(files)
    rng = np.random.default_rng(seed)
    step = {arm: 0.5 * i for i, arm in enumerate(study.arms)}
    return "a quality drawn at random", {key: float(rng.normal(step[key[0]])) for key in values}


def simulate_votes(
    study: Study, store: VoteStore, quality: Mapping[Key, float], crowd: Crowd, seed: int
) -> int:
    """Let a crowd answer its queues, through the store that the page uses; those who are done are left alone.

    Args:
        study: What is asked.
        store: Of the votes.
        quality: Of each image.
        crowd: Who answers.
        seed: Of the answers.

    Returns:
        Number of answers stored.
    """
    stored, careless = 0, crowd.careless
    for number in range(crowd.raters):
        rater = f"simulated-{number:03d}"
        for trial in queue(len(study.items), study.plan, rater):
            rng = np.random.default_rng([seed, number, trial.index])
            answers = {
                question: _answer(study, trial, quality, crowd, rng, number < careless)
                for question in study.options.questions
            }
            stored += store.append_once(_simulated_vote(study, rater, trial, answers))
    return stored


def check_coverage(
    differences: np.ndarray,
    crowd: Crowd,
    *,
    prompts: int,
    per_prompt: int,
    studies: int = 1000,
    seed: int = 0,
) -> list[Coverage]:
    """Simulate studies and count how often each interval holds the true rate.

    Args:
        differences: Of quality between the images of each pair, in the population that prompts are drawn from.
        crowd: Who answers; its number of raters does not matter.
        prompts: Prompts of a study.
        per_prompt: Raters of each prompt.
        studies: How many.
        seed: Of everything.
    """
    rng = np.random.default_rng(seed)
    crowd = dataclasses.replace(crowd, raters=max(per_prompt, crowd.raters))
    truth = true_rate(differences, crowd)
    clusters = np.repeat(np.arange(prompts), per_prompt)
    held: dict[str, list[bool]] = {"votes": [], "prompts": []}
    widths: dict[str, list[float]] = {"votes": [], "prompts": []}
    for _ in range(studies):
        d = rng.choice(differences, prompts)[clusters]
        careless = rng.random(len(d)) < crowd.careless / crowd.raters
        y = prefer(d, rng.random(len(d)) < 0.5, crowd, rng, careless)
        both = {"votes": wilson(float(y.sum()), len(y)), "prompts": clustered_interval(y, clusters.tolist())}
        for name, (low, high) in both.items():
            held[name].append(low <= truth <= high)
            widths[name].append(high - low)
    return [
        Coverage(
            name,
            prompts,
            per_prompt,
            len(clusters),
            truth,
            float(np.mean(held[name])),
            wilson(sum(held[name]), studies),
            float(np.mean(widths[name])),
        )
        for name in held
    ]


def coverage_table(differences: np.ndarray, crowd: Crowd, *, studies: int = 1000, seed: int = 0) -> str:
    """Check the coverage for few and many prompts and raters; returns a table in Markdown."""
    rows = []
    for prompts, per_prompt in ((20, 5), (100, 1), (100, 3), (100, 8), (500, 1)):
        for found in check_coverage(
            differences, crowd, prompts=prompts, per_prompt=per_prompt, studies=studies, seed=seed
        ):
            covered = [f"{100 * share:.1f}" for share in (found.covered, *found.covered_interval)]
            rows.append(
                {
                    "prompts": str(prompts),
                    "raters a prompt": str(per_prompt),
                    "true rate": f"{100 * found.truth:.1f}%",
                    "interval": found.interval,
                    "covers in": f"{covered[0]}% [{covered[1]}, {covered[2]}]",
                    "mean width": f"{100 * found.width:.1f} points",
                }
            )
    return markdown(rows)


def quality_differences(study: Study, quality: Mapping[Key, float], first: str, second: str) -> np.ndarray:
    """The second image's quality less the first's, of each pair of two arms."""
    asked = [item for item in study.items if (item.first, item.second) == (first, second)]
    return np.array(
        [quality[second, i.prompt_id, i.seed] - quality[first, i.prompt_id, i.seed] for i in asked]
    )


def _answer(
    study: Study,
    trial: Trial,
    quality: Mapping[Key, float],
    crowd: Crowd,
    rng: np.random.Generator,
    careless: bool,
) -> str:
    item = study.items[trial.item]
    if rng.random() < crowd.skip and trial.kind != "check":
        return "skip"
    if trial.kind == "check":
        value = float(rng.random() > (0.5 if careless else _ATTENTIVE))
    else:
        difference = (
            quality[item.second, item.prompt_id, item.seed] - quality[item.first, item.prompt_id, item.seed]
        )
        value = float(prefer(difference, trial.swapped, crowd, rng, careless))
    return "tie" if value == 0.5 else "left" if (value == 1) == trial.swapped else "right"


def _simulated_vote(study: Study, rater: str, trial: Trial, answers: dict[str, str]) -> Vote:
    item = study.items[trial.item]
    place = (
        rater,
        trial.index,
        trial.kind,
        item.prompt_id,
        item.seed,
        item.first,
        item.second,
        trial.swapped,
    )
    return Vote("", 0.0, study.id, *place, answers, seconds=None, simulated=True)


def _is_testbed(study: Study, files: Mapping[Key, Path]) -> bool:
    """Whether captions and images are of the testbed's world."""
    try:
        for item in study.items:
            parse_caption(item.prompt)
    except UserError:
        return False
    with Image.open(next(iter(files.values()))) as image:
        return image.size == (IMAGE_SIZE, IMAGE_SIZE)


def _truth(files: Mapping[Key, Path]) -> dict[Key, float]:
    values = {}
    for key, file in files.items():
        with Image.open(file) as opened:
            values[key] = float(truth_score(np.asarray(to_rgb(opened))[None])[0])
    return values
