"""The report of a study: summary.json, a page of its own, and a section of the page of eval.images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.comparison.report.page import open_template
from eval.comparison.report.svg import INK, RULE, SERIES, plain, svg_axes
from eval.comparison.report.text import MISSING, interval, number, percent
from eval.preference.analysis import analyse
from eval.preference.config import ReportConfig
from eval.preference.study import find_images, load_study
from guidance.utils.errors import UserError
from guidance.utils.io import atomic_path, write_json

_TEMPLATES = Path(__file__).parent / "templates"
_SECTION = re.compile(r'<section id="preference">.*?</section>\n*', re.S)


def report(config: ReportConfig) -> None:
    """Write preference.html and summary.json, and insert the section into the page of eval.images, if it exists."""
    study = load_study(config)
    evaluation = Path(config.evaluation or Path(config.folders[0]) / "eval")
    if config.evaluation and not (evaluation / "rows.parquet").is_file():
        raise UserError(f"Expected the results of eval.images in '{evaluation}', found none; check the path.")
    files = find_images(config.folders, study)
    results = analyse(study, evaluation, attention=config.attention, files=files)
    write_json(study.folder / "summary.json", results)
    _write(study.folder / "preference.html", _render("preference_report.html.j2", results))
    page = evaluation / "report.html"
    if config.join and page.is_file():
        text = _SECTION.sub("", page.read_text(encoding="utf-8"))
        mark = next((mark for mark in ('<section id="cost">', "</main>") if mark in text), "")
        section = _render("preference_section.html.j2", results) + "\n\n"
        _write(page, text.replace(mark, section + mark, 1) if mark else text)
    print(f"{results['votes_cast']} votes by {len(results['raters'])} raters, {results['votes_counted']} counted.")
    for question in results["questions"].values():
        print(f"\n{question['text']}", *map(headline, question["rates"]), sep="\n")
    print(f"\nreport: {study.folder / 'preference.html'}")


def headline(rate: Mapping[str, Any]) -> str:
    """Summarise the votes on two arms in a sentence."""
    first, second, (low, high) = rate["first"], rate["second"], rate["interval"]
    share = f"{percent(rate['rate'], rate['interval'])} of {rate['votes']} votes, ties counted half"
    if rate["votes"] == 0:
        return f"No votes on “{second}” against “{first}”."
    if low > 0.5:
        return f"“{second}” is preferred to “{first}”: {share}."
    if high < 0.5:
        return f"“{first}” is preferred to “{second}”: only {share} for the latter."
    return f"Neither “{second}” nor “{first}” is shown to be preferred: {share} for the former."


def _render(template: str, results: Mapping[str, Any]) -> str:
    helpers = {"headline": headline, "forest": _forest, "percent": percent, "interval": interval, "missing": MISSING}
    return open_template(template, _TEMPLATES).render(**results, **helpers, number=number)


def _forest(rates: Sequence[Mapping[str, Any]], salt: str) -> str:
    """Plot the rates with their intervals, around one half."""
    rates = [rate for rate in rates if rate["prompts"]]
    with svg_axes(4.6, 0.55 + 0.3 * len(rates), salt, "Preference rates with 95% intervals") as (axes, svg):
        axes.axvline(50, color=RULE, linewidth=1.2)
        for row, rate in enumerate(rates):
            axes.plot([100 * end for end in rate["interval"]], [row, row], color=SERIES[0], linewidth=1.6)
            axes.plot([100 * rate["rate"]], [row], "o", color=SERIES[0], markersize=5)
        labels = [plain(f"{rate['second']} vs {rate['first']}", 40) for rate in rates]
        axes.set_yticks(range(len(rates)), labels, color=INK)
        axes.set_ylim(len(rates) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% prefer the first named")
        axes.grid(axis="y", visible=False)
    return svg[0]


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))
