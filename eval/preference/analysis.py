"""What the votes of a study say, worked out for its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.preference import stats as statistics
from eval.preference.models import bradley_terry, metric_agreement, read_evaluation
from eval.preference.pairs import queue
from eval.preference.stats import Rate
from eval.preference.study import QUESTIONS, Key, Study
from eval.preference.votes import Vote, read_lines, standing
from guidance.utils.errors import UserError

_FEWEST_CHECKS = 3  # before a rater can fail

_FEWEST_PROMPTS = 8  # of a category that gets a row


def analyse(
    study: Study,
    votes_folder: Path,
    evaluation: Path | None = None,
    *,
    attention: float = 0.7,
    files: Mapping[Key, Path] | None = None,
) -> dict[str, Any]:
    """Work out everything that the report says.

    Args:
        study: What was asked.
        votes_folder: Of the votes.
        evaluation: Folder of `eval.images`' results, for the comparison with metrics.
        attention: Raters who pass fewer of their attention checks are left out, if they had three or more.
        files: Image -> file, to count the pairs whose images are gone by now.

    Raises:
        UserError: If there are no votes, or they are of another study.
    """
    lines = read_lines(votes_folder)
    cast = standing(lines)
    if not cast:
        raise UserError(
            f"Expected votes in '{votes_folder}', found none; let raters vote: eval.preference serve."
        )
    other = next((v.study for v in cast if v.study != study.id), None)
    if other is not None:
        raise UserError(
            f"Expected votes of the study {study.id} in '{votes_folder}', got some of {other}; move them out."
        )
    checks = statistics.attention(cast)
    failed = sorted(r for r, (passed, n) in checks.items() if n >= _FEWEST_CHECKS and passed < attention * n)
    votes = [v for v in cast if v.rater not in failed]
    rows, metrics = read_evaluation(evaluation) if evaluation else ([], {})
    questions = {key: _question(study, votes, key, rows, metrics) for key in study.options.questions}
    return {
        "study": study.id,
        "name": study.folder.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": study.options,
        "arms": study.arms,
        "target": study.options.target,
        "pairs": len(study.items),
        "pairs_lost": 0 if files is None else _count_lost(study, files),
        "notes": study.notes,
        "votes_cast": statistics.count_votes(cast),
        "votes_counted": statistics.count_votes(votes),
        "answers_cast": len(cast),
        "undone": sum(v.answers is None for v in lines),
        "simulated": sum(v.simulated for v in cast),
        "raters_left_out": failed,
        "raters": [_rater(study, cast, rater, checks.get(rater), rater in failed) for rater in _raters(cast)],
        "questions": questions,
    }


def _count_lost(study: Study, files: Mapping[Key, Path]) -> int:
    there = {key for key, file in files.items() if file.is_file()}
    sides = [{(arm, i.prompt_id, i.seed) for arm in (i.first, i.second)} for i in study.items]
    return sum(not keys <= there for keys in sides)


def _question(
    study: Study,
    votes: Sequence[Vote],
    question: str,
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    rates = [statistics.preference_rate(votes, a, b, question) for a, b in study.comparisons]
    left, decided, ends = statistics.position_bias(votes, question)
    several = len({arm for pair in study.comparisons for arm in pair}) > 2
    names = sorted(study.arms, key=lambda arm: arm != study.comparisons[0][0])
    return {
        "text": QUESTIONS[question],
        "rates": rates,
        "position": {"left": left, "decided": decided, "interval": ends},
        "between": statistics.agreement_between(votes, question),
        "within": statistics.agreement_within(votes, question),
        "strengths": bradley_terry(votes, names, question) if several else [],
        "metrics": metric_agreement(votes, rows, metrics, question),
        "categories": _categories(study, votes, question),
    }


def _categories(study: Study, votes: Sequence[Vote], question: str) -> list[tuple[str, Rate]]:
    """Rates by category of prompt, where there is more than one category with enough prompts."""
    of = {item.prompt_id: item.category for item in study.items}
    found = []
    for first, second in study.comparisons:
        for category in sorted({c for c in of.values() if c}):
            part = [v for v in votes if of.get(v.prompt_id) == category]
            rate = statistics.preference_rate(part, first, second, question)
            if rate.prompts >= _FEWEST_PROMPTS:
                found.append((category, rate))
    return found if len({category for category, _ in found}) > 1 else []


def _raters(votes: Sequence[Vote]) -> list[str]:
    return list(dict.fromkeys(v.rater for v in votes))


def _rater(
    study: Study, votes: Sequence[Vote], rater: str, checks: tuple[int, int] | None, left_out: bool
) -> dict[str, Any]:
    """One rater: how much, how fast, how attentive, and how often for the second arm, to the first question."""
    own = [v for v in votes if v.rater == rater]
    question = study.options.questions[0]
    preferred = [p for v in own if v.kind == "pair" and (p := v.preferred(question)) is not None]
    left, decided, _ = statistics.position_bias(own, question)
    seconds = sorted(v.seconds for v in own if v.seconds is not None)
    return {
        "name": rater,
        "votes": statistics.count_votes(own),
        "answers": len(own),
        "queue": len(queue(len(study.items), study.plan, rater)),
        "rate": sum(preferred) / len(preferred) if preferred else math.nan,
        "ties": preferred.count(0.5),
        "left": left / decided if decided else math.nan,
        "checks": checks,
        "same": statistics.agreement_within(own, question),
        "seconds": seconds[len(seconds) // 2] if seconds else math.nan,
        "left_out": left_out,
    }
