"""The report of a study: summary.json, a page of its own, and a section of the page of eval.images."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.comparison.report.page import open_template
from eval.comparison.report.svg import INK, RULE, SERIES, plain, svg_axes
from eval.comparison.report.text import MISSING, interval, number, percent
from eval.preference.config import QUESTIONS
from eval.preference.page import TEMPLATES
from eval.preference.stats import Agreement, Rate
from guidance.utils.io import atomic_path, write_json

_SECTION = re.compile(r'<section id="preference">.*?</section>\n*', re.S)


def write_preference(results: Mapping[str, Any], folder: Path, page: Path | None = None) -> Path:
    """Write preference.html and summary.json, and insert the section into the page of eval.images, if it exists.

    Args:
        results: From :func:`eval.preference.analysis.analyse`.
        folder: Folder to write to.
        page: Page of eval.images.

    Returns:
        The path of preference.html.
    """
    write_json(folder / "summary.json", results)
    report = folder / "preference.html"
    _write(report, open_template("preference_report.html.j2", TEMPLATES).render(**_view(results)))
    if page is not None and page.is_file():
        _write(page, join_report(page.read_text(encoding="utf-8"), results))
    return report


def join_report(page: str, results: Mapping[str, Any]) -> str:
    """Insert the section of this study into a report's HTML before its costs, replacing an earlier one."""
    section = open_template("preference_section.html.j2", TEMPLATES).render(**_view(results))
    text = _SECTION.sub("", page)
    before, mark, after = text.partition('<section id="cost">')
    if not mark:
        before, mark, after = text.partition("</main>")
    return f"{before}{section}\n\n{mark}{after}" if mark else page


def headline(rate: Rate) -> str:
    """Summarise the votes on two arms in a sentence."""
    low, high = rate.interval
    if rate.n == 0:
        return f"No votes on “{rate.second}” against “{rate.first}”."
    share = f"{percent(rate.rate, rate.interval)} of {rate.n} votes, ties counted half"
    if low > 0.5:
        return f"“{rate.second}” is preferred to “{rate.first}”: {share}."
    if high < 0.5:
        return f"“{rate.first}” is preferred to “{rate.second}”: only {share} for the latter."
    return f"Neither “{rate.second}” nor “{rate.first}” is shown to be preferred: {share} for the former."


def caveats(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what a reader must know before believing the numbers, as (kind, sentence)."""
    listed = [("pairing", note) for note in results["notes"]]
    if results["pairs_lost"]:
        lost = f"{results['pairs_lost']} of {results['pairs']}"
        text = f"Of {lost} pairs an image is gone by now; they are no longer asked."
        listed.append(("images gone", text))
    if results["simulated"]:
        text = f"{results['simulated']} of {results['answers_cast']} answers are a program's, not people's."
        listed.append(("simulated", text))
    if results["raters_left_out"]:
        names = ", ".join(results["raters_left_out"])
        listed.append(("left out", f"Raters who failed attention checks are not counted: {names}."))
    for i, (key, question) in enumerate(results["questions"].items()):
        rates = question["rates"]
        low, high = question["position"]["interval"]
        if low > 0.5 or high < 0.5:
            side = "left" if low > 0.5 else "right"
            text = f"“{QUESTIONS[key]}”: raters lean to the {side} image, whatever it is; random sides make it noise."
            listed.append(("position", text))
        short = [r for r in rates if r.n < results["target"]]
        if short and i == 0:
            text = f"{len(short)} of {len(rates)} pairs of arms have fewer votes than {results['target']}."
            warning = "Stopping as soon as a result looks clear makes false ones more frequent."
            listed.append(("few votes", f"{text} {warning}"))
        narrow = [r for r in rates if 0 < r.prompts < 20]
        if narrow:
            text = f"Votes on fewer than 20 prompts (“{narrow[0].second}”) say little about others."
            listed.append(("prompts", text))
    return listed


def _view(results: Mapping[str, Any]) -> dict[str, Any]:
    """Format the results for the templates."""
    questions = []
    for key, question in results["questions"].items():
        rates = question["rates"]
        left, decided, ends = (question["position"][k] for k in ("left", "decided", "interval"))
        questions.append(
            {
                "text": question["text"],
                "headlines": [headline(rate) for rate in rates],
                "rates": [_rate_cells(rate) for rate in rates],
                "plot": _forest(rates, f"{results['study']} {key}"),
                "position": percent(left / decided, ends) if decided else MISSING,
                "decided": decided,
                "between": _agreement_text(question["between"]),
                "within": _agreement_text(question["within"]),
                "strengths": question["strengths"],
                "metrics": _metric_table(question),
                "categories": [(category, _rate_cells(rate)) for category, rate in question["categories"]],
            }
        )
    helpers = {"share": _share, "number": number, "percent": percent, "interval": interval, "missing": MISSING}
    return {**results, "questions": questions, "caveats": caveats(results), **helpers}


def _metric_table(question: Mapping[str, Any]) -> dict[str, Any]:
    """Arrange metrics as columns, and pairs of arms as rows in the order of the rates."""
    rows = [
        {"first": r.first, "second": r.second, "cells": cells}
        for r in question["rates"]
        if (cells := [m for m in question["metrics"] if (m.first, m.second) == (r.first, r.second)])
    ]
    return {"titles": [m.title for m in rows[0]["cells"]] if rows else [], "rows": rows}


def _rate_cells(rate: Rate) -> dict[str, Any]:
    return dataclasses.asdict(rate) | {
        "n": rate.n,
        "shown": percent(rate.rate, rate.interval),
        "by_votes": percent(rate.rate, rate.vote_interval),
        "by_raters": percent(rate.rate, rate.rater_interval) if rate.rater_interval else MISSING,
        "effect": number(rate.design_effect, 2),
        "mark": "▲" if rate.interval[0] > 0.5 else "▼" if rate.interval[1] < 0.5 else "",
    }


def _agreement_text(agreement: Agreement) -> str:
    if not agreement.pairs:
        return MISSING
    return f"{_share(agreement.same)} same, α = {number(agreement.alpha, 2)} ({agreement.pairs} pairs)"


def _share(value: float) -> str:
    return MISSING if not math.isfinite(value) else f"{100 * value:.0f}%"


def _forest(rates: Sequence[Rate], salt: str) -> str:
    """Plot the rates with their intervals, around one half."""
    shown = [rate for rate in rates if rate.n]
    if not shown:
        return ""
    with svg_axes(4.6, 0.55 + 0.3 * len(shown), salt, "Preference rates with 95% intervals") as (axes, svg):
        axes.axvline(50, color=RULE, linewidth=1.2)
        for row, rate in enumerate(shown):
            low, high = (100 * end for end in rate.interval)
            axes.plot([low, high], [row, row], color=SERIES[0], linewidth=1.6)
            axes.plot([100 * rate.rate], [row], "o", color=SERIES[0], markersize=5)
        labels = [plain(f"{rate.second} vs {rate.first}", 40) for rate in shown]
        axes.set_yticks(range(len(shown)), labels, color=INK)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% prefer the first named")
        axes.grid(axis="y", visible=False)
    return svg[0]


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))
