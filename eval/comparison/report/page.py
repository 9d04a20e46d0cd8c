"""The HTML report of a comparison: one self-contained file without scripts.

The page shows untrusted text (prompts, names of arms and files): Jinja escapes all of it, matplotlib escapes the plots,
and a content security policy forbids whatever would still try to load or run.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from eval.comparison.report import grids, text
from eval.comparison.report.plots import breakdown_forests, forests, legend, tradeoffs
from eval.comparison.results import Comparison
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
    environment.filters |= {"svg": Markup, "number": text.number, "interval": text.interval}
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
    parts = dict.fromkeys(part.by for part in comparison.breakdowns)
    images = grids.image_grids(comparison, metric, focus, rows=rows, seed=seed)
    shown = sum(len(grid.pairs) for grid in images) * len(comparison.arms)
    return open_template("report.html.j2").render(
        c=comparison,
        text=text,
        decimals=functools.partial(text.metric_decimals, comparison),
        headline=text.headline(comparison),
        tables=text.divide_columns(comparison),
        legend=legend(comparison),
        tradeoffs=tradeoffs(comparison),
        forests=forests(comparison),
        parts={by: breakdown_forests(comparison, by, focus) if focus else [] for by in parts},
        focus=focus,
        grids=images,
        metric=metric,
        metrics=sorted(comparison.image_metrics, key=lambda m: m != metric),
        finite=grids.finite,
        thumbnail=functools.partial(grids.thumbnail, limit=grids.BUDGET // max(shown, 1)),
        missing=text.MISSING,
    )
