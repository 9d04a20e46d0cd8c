"""Analyse the votes of a study for its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.preference import stats
from eval.preference.config import QUESTIONS
from eval.preference.models import bradley_terry, metric_agreement, read_evaluation
from eval.preference.pairs import Key, queue
from eval.preference.study import Study
from eval.preference.votes import Vote, check_votes, count_votes, current_votes, read_lines

_MIN_CHECKS = 3  # before a rater can fail

_MIN_PROMPTS = 8  # of a category that gets a row


def analyse(
    study: Study, evaluation: Path | None = None, *, attention: float = 0.7, files: Mapping[Key, Path] | None = None
) -> dict[str, Any]:
    """Compute everything that the report shows.

    Args:
        study: The study, whose folder holds the votes.
        evaluation: Folder of `eval.images`' results, for the comparison with metrics.
        attention: Share of attention checks that a rater must pass to be counted, if there were three or more.
        files: Image -> file, to count the pairs whose images are gone.

    Raises:
        UserError: If there are no votes, or they are of another study.
    """
    lines = read_lines(study.folder)
    cast = current_votes(lines)
    check_votes(cast, study.id, study.folder)
    checks = stats.attention(cast)
    failed = sorted(r for r, (passed, n) in checks.items() if n >= _MIN_CHECKS and passed < attention * n)
    votes = [v for v in cast if v.rater not in failed]
    rows, metrics = read_evaluation(evaluation) if evaluation else ([], {})
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
        "votes_counted": count_votes(votes),
        "answers_cast": len(cast),
        "undone": sum(v.answers is None for v in lines),
        "simulated": sum(v.simulated for v in cast),
        "raters_left_out": failed,
        "raters": [
            _rater(study, cast, rater, checks.get(rater), rater in failed)
            for rater in dict.fromkeys(v.rater for v in cast)
        ],
        "questions": {key: _question(study, votes, key, rows, metrics) for key in study.options.questions},
    }


def _question(
    study: Study, votes: Sequence[Vote], question: str, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]
) -> dict[str, Any]:
    rates = [stats.preference_rate(votes, a, b, question) for a, b in study.comparisons]
    left, decided, ends = stats.position_bias(votes, question)
    several = len({arm for pair in study.comparisons for arm in pair}) > 2
    names = sorted(study.arms, key=lambda arm: arm != study.comparisons[0][0])
    return {
        "text": QUESTIONS[question],
        "rates": rates,
        "position": {"left": left, "decided": decided, "interval": ends},
        "between": stats.agreement_between(votes, question),
        "within": stats.agreement_within(votes, question),
        "strengths": bradley_terry(votes, names, question) if several else [],
        "metrics": metric_agreement(votes, rows, metrics, question),
        "categories": _categories(study, votes, question),
    }


def _categories(study: Study, votes: Sequence[Vote], question: str) -> list[tuple[str, stats.Rate]]:
    """Compute rates by category of prompt, if more than one category has enough prompts."""
    categories = {item.prompt_id: item.category for item in study.items}
    rates = []
    for first, second in study.comparisons:
        for category in sorted({c for c in categories.values() if c}):
            part = [v for v in votes if categories.get(v.prompt_id) == category]
            rate = stats.preference_rate(part, first, second, question)
            if rate.prompts >= _MIN_PROMPTS:
                rates.append((category, rate))
    return rates if len({category for category, _ in rates}) > 1 else []


def _rater(
    study: Study, votes: Sequence[Vote], rater: str, checks: tuple[int, int] | None, left_out: bool
) -> dict[str, Any]:
    """Summarise a rater: votes, speed, attention, and preference for the second arm in the first question."""
    votes = [v for v in votes if v.rater == rater]
    question = study.options.questions[0]
    preferred = [p for v in votes if v.kind == "pair" and (p := v.preferred(question)) is not None]
    left, decided, _ = stats.position_bias(votes, question)
    seconds = sorted(v.seconds for v in votes if v.seconds is not None)
    return {
        "name": rater,
        "votes": count_votes(votes),
        "answers": len(votes),
        "queue": len(queue(len(study.items), study.options, rater)),
        "rate": sum(preferred) / len(preferred) if preferred else math.nan,
        "ties": preferred.count(0.5),
        "left": left / decided if decided else math.nan,
        "checks": checks,
        "same": stats.agreement_within(votes, question),
        "seconds": seconds[len(seconds) // 2] if seconds else math.nan,
        "left_out": left_out,
    }
