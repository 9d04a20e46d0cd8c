"""Statistics of votes: preference rates with intervals, position bias, agreement, sample size.

Votes on one prompt are not independent, whoever casts them: if guidance helps one prompt and not the next, five
raters of twenty prompts say less than one rater of a hundred.  The main interval has prompts as clusters;
``python -m eval.preference simulate studies=1000`` shows how often each one covers the true rate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from eval.preference.votes import Vote
from eval.stats.paired import prompt_numbers, wilson
from guidance.utils.errors import UserError

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Rate:
    """Share of answers that preferred the second arm's image.

    Attributes:
        first, second: Arms.
        question: What was asked.
        wins, ties, losses: Votes for the second arm, for neither, for the first.
        skips: Pairs that were skipped.
        prompts, raters: Numbers of prompts and raters of these votes.
        rate: ``(wins + ties / 2) / (wins + ties + losses)``; NaN without votes.
        interval: 95%, prompts as clusters.
        vote_interval: Wilson's, as if votes were independent.
        rater_interval: Raters as clusters, for the rate of other raters; None with fewer than 3.
        design_effect: Variance of the rate with prompts as clusters over that of independent votes.
    """

    first: str
    second: str
    question: str
    wins: int
    ties: int
    losses: int
    skips: int
    prompts: int
    raters: int
    rate: float
    interval: Interval
    vote_interval: Interval
    rater_interval: Interval | None
    design_effect: float

    @property
    def n(self) -> int:
        """Number of votes."""
        return self.wins + self.ties + self.losses


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of answers to the same pair.

    Attributes:
        pairs: Pairs with two or more answers.
        same: Share of equal answers among all pairs of answers; NaN without any.
        alpha: Krippendorff's, see :func:`krippendorff_alpha`.
    """

    pairs: int
    same: float
    alpha: float


def preference_rate(votes: Iterable[Vote], first: str, second: str, question: str) -> Rate:
    """Estimate how often the second of two arms is preferred, from the votes on first showings of their pairs."""
    shown = [v for v in votes if (v.kind, v.first, v.second) == ("pair", first, second)]
    counted = [v for v in shown if v.preferred(question) is not None]
    y = np.array([v.preferred(question) for v in counted], np.float64)
    prompts, raters = [v.prompt_id for v in counted], [v.rater for v in counted]
    nan = float("nan")
    return Rate(
        first=first,
        second=second,
        question=question,
        wins=int((y == 1).sum()),
        ties=int((y == 0.5).sum()),
        losses=int((y == 0).sum()),
        skips=len(shown) - len(counted),
        prompts=len(set(prompts)),
        raters=len(set(raters)),
        rate=float(y.mean()) if len(y) else nan,
        interval=clustered_interval(y, prompts) if len(y) else (nan, nan),
        vote_interval=wilson(float(y.sum()), len(y)) if len(y) else (nan, nan),
        rater_interval=clustered_interval(y, raters) if len(set(raters)) >= 3 else None,
        design_effect=design_effect(y, prompts) if len(y) else nan,
    )


def clustered_interval(y: Float[np.ndarray, " n"], clusters: Sequence[Hashable]) -> Interval:
    """Return Wilson's 95% interval of a share at the effective number of votes.

    The variance of the mean is that of sums over clusters; the number of independent votes that would have the same
    variance goes into Wilson's formula, with Student's quantile for the number of clusters.  Ties count half, and
    reduce the variance accordingly.

    Args:
        y: Votes: 1, 0.5 or 0.
        clusters: Cluster of each vote, its prompt for example.

    Reference:
        Korn and Graubard 1998, Confidence intervals for proportions with small expected number of positive counts
        estimated from survey data; Dean and Pagano 2015, Evaluating confidence interval methods for binomial
        proportions in clustered surveys.
    """
    p, groups = float(np.mean(y)), len(set(clusters))
    if groups < 2:
        return 0.0, 1.0
    variance = _cluster_variance(y, clusters)
    # the variance of equal votes is uninformative: each cluster counts as one vote
    effective = p * (1 - p) / variance if variance > 0 and 0 < p < 1 else float(groups)
    t = float(stats.t.ppf(0.975, groups - 1))
    centre = (p * effective + t * t / 2) / (effective + t * t)
    half = t / (effective + t * t) * math.sqrt(effective * p * (1 - p) + t * t / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def design_effect(y: Float[np.ndarray, " n"], clusters: Sequence[Hashable]) -> float:
    """Return the variance of the mean with clusters over that of independent votes; 1 where it is undefined."""
    independent = float(np.var(y)) / max(1, len(y) - 1)
    if independent == 0 or len(set(clusters)) < 2:
        return 1.0
    return _cluster_variance(y, clusters) / independent


def position_bias(votes: Iterable[Vote], question: str) -> tuple[int, int, Interval]:
    """Count the answers for the left image and all decided ones; returns them and the share's Wilson interval.

    Sides are drawn at random, so that without a bias the share is a half whichever arm is better.
    """
    choices = [(v.answers or {}).get(question) for v in votes if v.kind != "check"]
    left, n = choices.count("left"), choices.count("left") + choices.count("right")
    return left, n, wilson(left, n) if n else (float("nan"), float("nan"))


def agreement_between(votes: Iterable[Vote], question: str) -> Agreement:
    """Measure how raters agree on the pairs that several of them voted on."""
    return _agreement(_answers(votes, question, ("pair",), by_rater=False))


def agreement_within(votes: Iterable[Vote], question: str) -> Agreement:
    """Measure how raters agree with themselves on the pairs that they were shown twice."""
    return _agreement(_answers(votes, question, ("pair", "repeat"), by_rater=True))


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> float:
    """Measure agreement on an interval scale (0, 0.5 for a tie, 1), corrected for chance; NaN if all values are equal.

    1: full agreement, 0: as if drawn at random, below 0: less than that.

    Args:
        units: The values given to each unit; units with one value do not count.

    Reference:
        Krippendorff 2011, Computing Krippendorff's alpha-reliability.

    >>> krippendorff_alpha([[0, 0], [1, 1], [1, 1]]), krippendorff_alpha([[0, 1], [1, 0]])
    (1.0, -0.5)
    """
    paired = [np.asarray(values, np.float64) for values in units if len(values) > 1]
    if not paired:
        return float("nan")
    pooled = np.concatenate(paired)
    # the sum of squared differences over ordered pairs of m values is 2 m^2 times their variance
    observed = sum(2 * len(v) ** 2 * v.var() / (len(v) - 1) for v in paired) / len(pooled)
    expected = 2 * len(pooled) * pooled.var() / (len(pooled) - 1)
    return 1 - float(observed / expected) if expected > 0 else float("nan")


def attention(votes: Iterable[Vote]) -> dict[str, tuple[int, int]]:
    """Count attention checks by rater: (passed, all); a tie or a skip does not pass."""
    found: dict[str, tuple[int, int]] = {}
    for vote in votes:
        if vote.kind == "check" and vote.answers:
            passed, n = found.get(vote.rater, (0, 0))
            is_passed = all(vote.preferred(question) == 0 for question in vote.answers)
            found[vote.rater] = passed + is_passed, n + 1
    return found


def votes_needed(rate: float, power: float = 0.8) -> int:
    """Return the number of independent, decided votes that distinguish a preference rate from one half at level 5%.

    Args:
        rate: The true rate, other than 0.5.
        power: Power of the two-sided test.

    Reference:
        Fleiss, Levin and Paik 2003, Statistical methods for rates and proportions, section 2.5.

    >>> votes_needed(0.55), votes_needed(0.6), votes_needed(0.55, power=0.9)
    (783, 194, 1047)
    """
    if not (0 < rate < 1 and rate != 0.5 and 0.05 < power < 1):
        raise UserError(
            f"Expected a rate to detect other than 0.5, and a power above 0.05, both below 1, got {rate} and {power}; "
            "detect=0.55 and power=0.8 are usual."
        )
    root = stats.norm.ppf(0.975) * 0.5 + stats.norm.ppf(power) * math.sqrt(rate * (1 - rate))
    return math.ceil((root / (rate - 0.5)) ** 2)


def _cluster_variance(y: Float[np.ndarray, " n"], clusters: Sequence[Hashable]) -> float:
    """Return the variance of the mean, from sums of residuals over clusters."""
    sums = np.bincount(prompt_numbers(clusters), np.asarray(y) - np.mean(y))
    return float(len(sums) / (len(sums) - 1) * (sums**2).sum() / len(y) ** 2)


def _answers(votes: Iterable[Vote], question: str, kinds: tuple[str, ...], *, by_rater: bool) -> list[list[float]]:
    units: dict[Hashable, list[float]] = {}
    for v in votes:
        value = v.preferred(question)
        if v.kind in kinds and value is not None:
            unit = (v.rater if by_rater else "", v.prompt_id, v.seed, v.first, v.second)
            units.setdefault(unit, []).append(value)
    return [values for values in units.values() if len(values) > 1]


def _agreement(units: list[list[float]]) -> Agreement:
    same = [a == b for values in units for a, b in itertools.combinations(values, 2)]
    return Agreement(len(units), float(np.mean(same)) if same else float("nan"), krippendorff_alpha(units))
