"""Models of votes: strengths of all arms on one scale, and the agreement of metrics with people."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from eval.preference.stats import Interval
from eval.preference.votes import Vote
from eval.stats.paired import prompt_numbers, wilson
from guidance.utils.io import read_json

_PRIOR = 0.5  # tie votes added to each pair of arms that was asked


@dataclasses.dataclass(frozen=True)
class Strength:
    """Strength of an arm on the common scale of all arms.

    Attributes:
        arm: Name.
        log_odds: Log odds of being preferred to the reference arm, whose log odds are 0.
        interval: 95%, prompts as clusters; (0, 0) for the reference.
        rate: The corresponding preference rate over the reference.
    """

    arm: str
    log_odds: float
    interval: Interval
    rate: float


@dataclasses.dataclass(frozen=True)
class MetricAgreement:
    """Agreement of a metric with the majority of raters.

    Attributes:
        metric, title: Column of the rows, and its title.
        first, second, question: What was compared and asked.
        pairs: Pairs with a majority and a difference in the metric.
        agree: Those of them where both prefer the same image.
        share, interval: ``agree / pairs`` with its Wilson interval; NaN without pairs.
    """

    metric: str
    title: str
    first: str
    second: str
    question: str
    pairs: int
    agree: int
    share: float
    interval: Interval


def bradley_terry(votes: Iterable[Vote], arms: Sequence[str], question: str) -> list[Strength]:
    """Fit strengths to the votes on all pairs of arms; ties count half.

    Half a tie is added to each pair of arms that was asked, so that the strength of an arm that always won is finite.

    Args:
        votes: Votes of all raters who count.
        arms: The first is the reference.
        question: What was asked.

    Returns:
        Strengths of the arms that votes connect with the reference, in the order of `arms`.

    Reference:
        Bradley and Terry 1952, Rank analysis of incomplete block designs; Hunter 2004, MM algorithms for generalized
        Bradley-Terry models.
    """
    counted = [v for v in votes if v.kind == "pair" and v.preferred(question) is not None]
    asked = {(v.first, v.second) for v in counted}
    linked = _connected(arms[0], asked)
    names = [arm for arm in arms if arm in linked]
    counted = [v for v in counted if v.first in linked]
    if len(names) < 2:
        return []
    pairs = [(v.first, v.second) for v in counted] + sorted(p for p in asked if p[0] in linked)
    x = np.zeros((len(pairs), len(names)))
    for row, (first, second) in enumerate(pairs):
        x[row, names.index(first)], x[row, names.index(second)] = -1, 1
    x = x[:, 1:]
    y = np.array([v.preferred(question) for v in counted] + [0.5] * (len(pairs) - len(counted)))
    weight = np.array([1.0] * len(counted) + [_PRIOR] * (len(pairs) - len(counted)))
    beta, hessian = _fit(x, y, weight)
    residuals = (weight * (y - _logistic(x @ beta)))[:, None] * x
    error = _errors(residuals[: len(counted)], hessian, [v.prompt_id for v in counted])
    strengths = [Strength(names[0], 0.0, (0.0, 0.0), 0.5)]
    for arm, b, half in zip(names[1:], beta, error, strict=True):
        strengths.append(Strength(arm, float(b), (float(b - half), float(b + half)), float(_logistic(b))))
    return strengths


def metric_agreement(
    votes: Iterable[Vote], rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, tuple[str, str]], question: str
) -> list[MetricAgreement]:
    """Compare the majority's choice on each pair with metrics.

    Args:
        votes: Votes of all raters who count.
        rows: One per image, see :class:`eval.comparison.results.Comparison`.
        metrics: Column -> (title, "higher" or "lower": which is better).
        question: What was asked.
    """
    leaning: dict[tuple[str, str, str, int], float] = {}
    for v in votes:
        value = v.preferred(question)
        if v.kind == "pair" and value is not None:
            key = (v.first, v.second, v.prompt_id, v.seed)
            leaning[key] = leaning.get(key, 0.0) + value - 0.5
    images = {(row["arm"], row["prompt_id"], row["seed"]): row for row in rows}
    agreements = []
    for first, second in dict.fromkeys(key[:2] for key in leaning):
        for metric, (title, better) in metrics.items():
            same = []
            for (a, b, prompt_id, seed), lean in leaning.items():
                low, high = (_value(images.get((arm, prompt_id, seed)), metric) for arm in (a, b))
                if (a, b) != (first, second) or lean == 0 or not np.isfinite([low, high]).all():
                    continue
                change = (high - low) * (-1 if better == "lower" else 1)
                same += [change * lean > 0] if change != 0 else []
            n, k = len(same), sum(same)
            ends = wilson(k, n) if n else (float("nan"), float("nan"))
            share = k / n if n else float("nan")
            agreements.append(MetricAgreement(metric, title, first, second, question, n, k, share, ends))
    return agreements


def read_evaluation(folder: Path) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """Read the rows of `eval.images`, and column -> (title, better) of metrics with a direction; empty without."""
    if not (folder / "rows.parquet").is_file() or not (folder / "summary.json").is_file():
        return [], {}
    import pandas

    listed = read_json(folder / "summary.json").get("image_metrics", [])
    metrics = {m["key"]: (m["title"], m["better"]) for m in listed if m.get("better")}
    table = pandas.read_parquet(folder / "rows.parquet")
    metrics = {key: described for key, described in metrics.items() if key in table}
    return table[["arm", "prompt_id", "seed", *metrics]].to_dict("records"), metrics


def _value(row: Mapping[str, Any] | None, metric: str) -> float:
    value = None if row is None else row.get(metric)
    return float("nan") if value is None else float(value)


def _connected(start: str, edges: set[tuple[str, str]]) -> set[str]:
    found, grown = {start}, True
    while grown:
        near = {arm for edge in edges if found & set(edge) for arm in edge}
        grown, found = not near <= found, found | near
    return found


def _fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximise the likelihood by Newton's method: it is concave, and the added ties keep its maximum finite."""
    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = _logistic(x @ beta)
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x
        step = np.linalg.solve(hessian, x.T @ (weight * (y - p)))
        beta = beta + step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-10:
            break
    return beta, hessian


def _errors(scores: np.ndarray, hessian: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Return half-widths of 95% intervals by the sandwich formula with prompts as clusters."""
    number = prompt_numbers(prompts)
    groups = int(number.max()) + 1
    if groups < 2:
        return np.full(len(hessian), np.inf)
    sums = np.zeros((groups, scores.shape[1]))
    np.add.at(sums, number, scores)
    inverse = np.linalg.inv(hessian)
    covariance = inverse @ (sums.T @ sums * groups / (groups - 1)) @ inverse
    return float(stats.t.ppf(0.975, groups - 1)) * np.sqrt(np.diag(covariance))


def _logistic(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))
