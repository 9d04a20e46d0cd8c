"""The HTML report of a comparison: one self-contained file without scripts.

The page shows untrusted text (prompts, names of arms and files): Jinja escapes all of it, matplotlib escapes the plots,
and a content security policy forbids whatever would still try to load or run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from eval.comparison.report import text
from eval.comparison.report.grids import image_grids
from eval.comparison.report.plots import breakdown_forests, forests, legend, tradeoffs
from eval.comparison.results import ArmSummary, Comparison
from guidance.utils.io import atomic_path

_TEMPLATES = Path(__file__).parent / "templates"


def open_template(name: str, folder: Path = _TEMPLATES) -> Template:
    """Open a template of a folder, which may include this package's; its variables are escaped."""
    environment = Environment(
        loader=FileSystemLoader([folder, _TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": Markup, "number": text.number}
    return environment.get_template(name)


def write_report(comparison: Comparison, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write the report as one HTML file; options as for `render`."""
    # a lone surrogate, which JSON lets through, must not stop the report
    page = render(comparison, **options).encode("utf-8", "replace")
    with atomic_path(path) as temporary:
        temporary.write_bytes(page)
    return Path(path)


def render(
    comparison: Comparison, *, sort_by: str | None = None, arm: str | None = None, rows: int = 6, seed: int = 0
) -> str:
    """Return the report as HTML; the same comparison and images give the same text.

    Args:
        comparison: The results.
        sort_by: Image metric whose change orders the pairs of the grids; None takes that of the headline.
        arm: Arm whose change it is; None takes the guided arm of the largest scale.
        rows: Maximum of pairs in each grid.
        seed: Of the grid of random pairs.

    Raises:
        UserError: If `sort_by` or `arm` is not in the comparison.
    """
    metric = text.primary_metric(comparison, sort_by)
    focus = text.focus_arm(comparison, arm)
    headline, *qualifications = text.headline(comparison)
    return open_template("report.html.j2").render(
        c=comparison,
        headline=headline,
        qualifications=qualifications,
        tables=text.headline_tables(comparison),
        legend=legend(comparison),
        tradeoffs=tradeoffs(comparison),
        forests=forests(comparison),
        breakdowns=_breakdowns(comparison, focus),
        focus=focus,
        grids=image_grids(comparison, metric, focus, rows=rows, seed=seed),
        ratios={a.name: text.time_ratio(comparison, a.name) for a in comparison.arms},
        provenance=_readable(comparison.provenance),
        missing=text.MISSING,
    )


def _breakdowns(comparison: Comparison, focus: ArmSummary | None) -> list[dict[str, Any]]:
    """Return, for each column that divides the prompts, the plots of one arm and a table of all arms."""
    found = []
    titles = {metric.key: metric.title for metric in comparison.image_metrics}
    for by in dict.fromkeys(b.by for b in comparison.breakdowns):
        rows = []
        for part in (b for b in comparison.breakdowns if b.by == by):
            digits = text.metric_decimals(comparison, part.metric)
            rows.append(
                {
                    "value": part.value or text.MISSING,
                    "metric": titles.get(part.metric, part.metric),
                    "arm": part.arm,
                    "n": part.n_prompts,
                    "difference": text.number(part.difference, digits, signed=True),
                    "interval": text.interval(part.interval, digits),
                }
            )
        plots = breakdown_forests(comparison, by, focus) if focus else []
        found.append({"by": by, "rows": rows, "plots": plots})
    return found


def _readable(value: Any) -> Any:
    """Prepare provenance for the page: mappings stay, lists of plain values become one line, the rest text."""
    if isinstance(value, Mapping):
        return {str(key): _readable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [_readable(entry) for entry in value]
        if any(isinstance(entry, Mapping) for entry in entries):
            return {str(i + 1): entry for i, entry in enumerate(entries)}
        return ", ".join(entries) or text.MISSING
    return text.MISSING if value is None or value == "" else str(value)
