"""Analysis of a study's votes: preference rates, biases, agreement, strengths of arms, metrics that agree with people.

Votes on one prompt are not independent, whoever casts them: if guidance helps one prompt and not the next, five raters
of twenty prompts say less than one rater of a hundred.  The main interval has prompts as clusters; `simulate` counts
how often it covers the true rate.  The functions read a table of answers to one question, see `answer_table`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit
from scipy.stats import t as student

from eval.preference.config import QUESTIONS, FolderConfig
from eval.preference.study import Key, Study, load_study, queue
from eval.preference.votes import Vote, count_votes, current_votes, read_lines, write_lines
from eval.stats.paired import prompt_numbers, wilson
from guidance.utils.io import atomic_path, read_json

_NONE = (math.nan, math.nan)
_MIN_CHECKS = 3  # before a rater can fail
_MIN_PROMPTS = 8  # of a category that gets a row
_PAIR = ["first", "second", "prompt_id", "seed"]  # columns that identify a pair of images


def export(config: FolderConfig) -> None:
    """Write every line of a study's votes to one file, for ``merge``, and the current votes to a table."""
    folder = load_study(config).folder
    lines = read_lines(folder)
    write_lines(folder / "votes.jsonl", lines)
    table = answer_table(current_votes(lines))
    with atomic_path(folder / "votes.csv") as temporary:
        table.to_csv(temporary, index=False)
    print(f"{len(table)} answers: {folder / 'votes.csv'}, {folder / 'votes.jsonl'}")


def analyse(
    study: Study, evaluation: Path | None = None, *, attention: float = 0.7, files: Mapping[Key, Path] | None = None
) -> dict[str, Any]:
    """Compute everything that the report shows.

    Args:
        study: The study, whose folder holds the votes.
        evaluation: Folder of `eval.images`' results, for the comparison with metrics.
        attention: Share of attention checks that a rater must pass to be counted, if there were three or more.
        files: Image -> file, to count the pairs whose images are gone.
    """
    lines = read_lines(study.folder, study.id)
    cast = current_votes(lines)
    names = dict.fromkeys(vote.rater for vote in cast)
    raters = [_rater(study, name, [vote for vote in cast if vote.rater == name], attention) for name in names]
    failed = [rater["name"] for rater in raters if rater["left_out"]]
    counted = [vote for vote in cast if vote.rater not in failed]
    answers = answer_table(counted)
    rows, metrics = read_evaluation(evaluation) if evaluation else (pd.DataFrame(), {})
    missing = {key for key, file in (files or {}).items() if not file.is_file()}
    return {
        "study": study.id,
        "name": study.folder.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": study.options,
        "arms": study.arms,
        "target": study.options.target,
        "pairs": len(study.items),
        "pairs_lost": sum(not missing.isdisjoint(item.keys) for item in study.items),
        "notes": study.notes,
        "votes_cast": count_votes(cast),
        "votes_counted": count_votes(counted),
        "answers_cast": len(cast),
        "undone": sum(v.answers is None for v in lines),
        "simulated": sum(v.simulated for v in cast),
        "raters_left_out": failed,
        "raters": raters,
        "questions": {
            key: _question(study, key, answers[answers.question == key], rows, metrics)
            for key in study.options.questions
        },
    }


def answer_table(votes: Iterable[Vote]) -> pd.DataFrame:
    """Tabulate votes, a row an answer: their fields, question, choice, and preferred (see `Vote.preferred`)."""
    columns = [*(field.name for field in dataclasses.fields(Vote)), "question", "choice", "preferred"]
    answers = [(vote, *answer) for vote in votes for answer in (vote.answers or {}).items()]
    rows = [[*vote.__dict__.values(), question, choice, vote.preferred(question)] for vote, question, choice in answers]
    return pd.DataFrame(rows, columns=columns).drop(columns="answers").astype({"preferred": float, "seconds": float})


def preference_rate(answers: pd.DataFrame, first: str, second: str) -> dict[str, Any]:
    """Estimate how often the second of two arms is preferred, from the answers on first showings of their pairs.

    Ties count half.  The 95% intervals have prompts as clusters, votes as independent (``vote_interval``), and raters
    as clusters, for the rate of other raters (``rater_interval``, None below three).
    """
    shown = answers[(answers.kind == "pair") & (answers["first"] == first) & (answers.second == second)]
    counted = shown.dropna(subset="preferred")
    y, n, raters = counted.preferred.to_numpy(), len(counted), counted.rater.nunique()
    wins, ties, losses = (int((y == value).sum()) for value in (1.0, 0.5, 0.0))
    return {
        "first": first,
        "second": second,
        "votes": n,
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "skips": len(shown) - n,
        "prompts": counted.prompt_id.nunique(),
        "raters": raters,
        "rate": float(y.mean()) if n else math.nan,
        "interval": clustered_interval(y, counted.prompt_id) if n else _NONE,
        "vote_interval": wilson(wins + ties / 2, n) if n else _NONE,
        "rater_interval": clustered_interval(y, counted.rater) if raters >= 3 else None,
        "design_effect": design_effect(y, counted.prompt_id) if n else math.nan,
    }


def clustered_interval(y: np.ndarray, clusters: Iterable[Hashable]) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share of votes (1, 0.5 or 0) at their effective number.

    The number of independent votes that would have the variance of sums over clusters goes into Wilson's formula, with
    Student's quantile for the number of clusters.  Ties reduce the variance accordingly.

    Reference:
        Korn and Graubard 1998, Confidence intervals for proportions with small expected number of positive counts
        estimated from survey data; Dean and Pagano 2015, on intervals of proportions in clustered surveys.
    """
    p, groups = float(np.mean(y)), len({*clusters})
    if groups < 2:
        return 0.0, 1.0
    variance = design_effect(y, clusters) * float(np.var(y)) / (len(y) - 1)
    # the variance of equal votes is uninformative: each cluster counts as one vote
    n = p * (1 - p) / variance if variance > 0 else groups
    t = float(student.ppf(0.975, groups - 1))
    centre = (p * n + t * t / 2) / (n + t * t)
    half = t / (n + t * t) * math.sqrt(n * p * (1 - p) + t * t / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def design_effect(y: np.ndarray, clusters: Iterable[Hashable]) -> float:
    """Return the variance of the mean with clusters over that of independent votes; 1 where it is undefined."""
    sums = np.bincount(prompt_numbers([*clusters]), y - np.mean(y))  # of residuals
    groups, n = len(sums), len(y)
    if groups < 2 or np.ptp(y) == 0:
        return 1.0
    return float(groups / (groups - 1) * (sums**2).sum() / n**2 * (n - 1) / np.var(y))


def position_bias(answers: pd.DataFrame) -> dict[str, Any]:
    """Count the answers for the left image, which is either arm's at random, and all decided ones."""
    choices = list(answers.choice[answers.kind != "check"])
    left, n = choices.count("left"), choices.count("left") + choices.count("right")
    return {"left": left, "decided": n, "interval": wilson(left, n) if n else _NONE}


def agreement(answers: pd.DataFrame, *, within: bool = False) -> dict[str, Any]:
    """Measure the agreement of raters on the pairs that several of them saw, or that one saw twice (`within`).

    ``same`` is the share of equal answers among all pairs of answers, ``alpha`` Krippendorff's.
    """
    kinds, unit = (["pair", "repeat"], ["rater", *_PAIR]) if within else (["pair"], _PAIR)
    counted = answers[answers.kind.isin(kinds)].dropna(subset="preferred")
    units = [list(values) for _, values in counted.groupby(unit).preferred if len(values) > 1]
    same = [a == b for values in units for a, b in itertools.combinations(values, 2)]
    share = float(np.mean(same)) if same else math.nan
    return {"pairs": len(units), "same": share, "alpha": krippendorff_alpha(units)}


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> float:
    """Measure agreement on an interval scale (0, 0.5 for a tie, 1): 1 is full, 0 that of chance (Krippendorff 2011).

    >>> krippendorff_alpha([[0, 0], [1, 1], [1, 1]]), krippendorff_alpha([[0, 1], [1, 0]])
    (1.0, -0.5)
    """
    paired = [np.asarray(values, np.float64) for values in units if len(values) > 1]
    pooled = np.concatenate([np.empty(0), *paired])
    if len(np.unique(pooled)) < 2:
        return math.nan
    # the sum of squared differences over ordered pairs of m values is 2 m^2 times their variance
    observed = sum(2 * len(v) ** 2 * v.var() / (len(v) - 1) for v in paired) / len(pooled)
    return 1 - float(observed / (2 * len(pooled) * pooled.var() / (len(pooled) - 1)))


def bradley_terry(answers: pd.DataFrame, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Fit strengths (Bradley and Terry 1952) of all arms that answers connect with the first one, the reference.

    Ties count half; half a tie is added to each pair of arms that was asked, so that the strength of an arm that always
    won is finite.  Intervals (95%) are by the sandwich formula with prompts as clusters.
    """
    counted = answers[answers.kind == "pair"].dropna(subset="preferred")
    edges = [[arms.index(arm) for arm in counted[side]] for side in ("first", "second")]
    graph = coo_array((np.ones(len(counted)), edges), shape=(len(arms), len(arms)))
    part = connected_components(graph, directed=False)[1]
    names = [arm for arm, number in zip(arms, part, strict=True) if number == part[0]]
    if len(names) < 2:
        return []
    counted = counted[counted["first"].isin(names)]
    asked = counted.drop_duplicates(["first", "second"]).assign(preferred=0.5)
    pairs, n = pd.concat([counted, asked]), len(counted)
    x = np.stack([(pairs.second == arm) * 1.0 - (pairs["first"] == arm) for arm in names], axis=1)[:, 1:]
    y, weight = pairs.preferred.to_numpy(), np.repeat([1.0, 0.5], [n, len(asked)])[:, None]
    beta = np.zeros(len(names) - 1)
    for _ in range(50):  # Newton's method on a concave likelihood, with steps of at most 2
        p = expit(x @ beta)
        scores = weight * (y - p)[:, None] * x
        inverse = np.linalg.inv(x.T @ (x * weight * (p * (1 - p))[:, None]))
        step = inverse @ scores.sum(0)
        beta += step / max(1.0, np.abs(step).max() / 2)
    clusters = prompt_numbers([*counted.prompt_id])
    groups = clusters.max() + 1
    sums = np.eye(groups)[clusters].T @ scores[:n]
    covariance = inverse @ sums.T @ sums @ inverse * groups / max(1, groups - 1)
    half = student.ppf(0.975, groups - 1) * np.sqrt(np.diag(covariance)) if groups > 1 else np.full(len(beta), math.inf)
    strengths = zip(names, [0.0, *beta.tolist()], [0.0, *half.tolist()], strict=True)
    return [{"arm": a, "log_odds": b, "interval": (b - h, b + h), "rate": float(expit(b))} for a, b, h in strengths]


def metric_agreement(
    answers: pd.DataFrame, rows: pd.DataFrame, metrics: Mapping[str, tuple[str, str]]
) -> list[dict[str, Any]]:
    """Compare the majority's choice on each pair with metrics, where both have one; see `read_evaluation`."""
    counted = answers[answers.kind == "pair"].dropna(subset="preferred")
    lean = counted.assign(lean=counted.preferred - 0.5).groupby(_PAIR, sort=False).lean.sum().reset_index()
    found = []
    for metric, (title, better) in metrics.items():
        values = rows.set_index(["arm", "prompt_id", "seed"])[metric]
        low, high = (
            values.reindex(pd.MultiIndex.from_frame(lean[[side, "prompt_id", "seed"]])).to_numpy(float)
            for side in ("first", "second")
        )
        lean["same"] = (high - low) * (-1 if better == "lower" else 1) * lean.lean
        for (first, second), same in lean.groupby(["first", "second"], sort=False).same:
            k, n = int((same > 0).sum()), int((same > 0).sum() + (same < 0).sum())
            row = {"metric": metric, "title": title, "first": first, "second": second, "pairs": n, "agree": k}
            found.append(row | {"share": k / n if n else math.nan, "interval": wilson(k, n) if n else _NONE})
    return found


def read_evaluation(folder: Path) -> tuple[pd.DataFrame, dict[str, tuple[str, str]]]:
    """Read the rows of `eval.images`, and column -> (title, better) of metrics with a direction; empty without."""
    if not (folder / "rows.parquet").is_file() or not (folder / "summary.json").is_file():
        return pd.DataFrame(), {}
    table = pd.read_parquet(folder / "rows.parquet")
    listed = [m for m in read_json(folder / "summary.json").get("image_metrics", []) if m["key"] in table]
    return table, {m["key"]: (m["title"], m["better"]) for m in listed if m.get("better")}


def _question(
    study: Study, question: str, answers: pd.DataFrame, rows: pd.DataFrame, metrics: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    several = len({arm for pair in study.comparisons for arm in pair}) > 2
    names = sorted(study.arms, key=lambda arm: arm != study.comparisons[0][0])
    category = answers.prompt_id.map({item.prompt_id: item.category for item in study.items})
    by_category = [
        (name, rate)
        for pair in study.comparisons
        for name in sorted({*category} - {""})
        if (rate := preference_rate(answers[category == name], *pair))["prompts"] >= _MIN_PROMPTS
    ]
    return {
        "text": QUESTIONS[question],
        "rates": [preference_rate(answers, *pair) | {"question": question} for pair in study.comparisons],
        "position": position_bias(answers),
        "between": agreement(answers),
        "within": agreement(answers, within=True),
        "strengths": bradley_terry(answers, names) if several else [],
        "metrics": [found | {"question": question} for found in metric_agreement(answers, rows, metrics)],
        "categories": by_category if len({name for name, _ in by_category}) > 1 else [],
    }


def _rater(study: Study, name: str, votes: Sequence[Vote], attention: float) -> dict[str, Any]:
    """Summarise a rater: votes, speed, attention, and preference for the second arm in the first question."""
    passed = [all(v.preferred(q) == 0 for q in v.answers or {}) for v in votes if v.kind == "check"]
    answers = answer_table(votes)
    answers = answers[answers.question == study.options.questions[0]]
    preferred, bias = answers.preferred[answers.kind == "pair"], position_bias(answers)
    return {
        "name": name,
        "votes": count_votes(votes),
        "answers": len(votes),
        "queue": len(queue(len(study.items), study.options, name)),
        "rate": float(preferred.mean()),
        "ties": int((preferred == 0.5).sum()),
        "left": bias["left"] / bias["decided"] if bias["decided"] else math.nan,
        "checks": (sum(passed), len(passed)) if passed else None,
        "same": agreement(answers, within=True),
        "seconds": float(answers.seconds.median()),
        "left_out": len(passed) >= _MIN_CHECKS and sum(passed) < attention * len(passed),
    }
