"""Write a comparison: summary.json, rows.csv, rows.parquet, the report, and a Weights & Biases run."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pandas

from eval.comparison.report.page import write_report
from eval.comparison.results import Comparison
from eval.stats.tables import markdown, with_interval
from guidance.utils.io import atomic_path, read_json, write_json
from guidance.utils.tracking import wandb_is_configured


def write_comparison(
    comparison: Comparison, folder: Path, *, key: str = "", sort_by: str | None = None
) -> dict[str, Any]:
    """Write rows.csv, rows.parquet, report.html and, last, summary.json, which marks the others as complete.

    The summary, which is returned, has the ``key`` of inputs and options; ``sort_by`` picks the report's examples.
    """
    table = pandas.DataFrame(comparison.rows)
    with atomic_path(folder / "rows.csv") as temporary:
        table.to_csv(temporary, index=False)
    with atomic_path(folder / "rows.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    write_report(comparison, folder / "report.html", sort_by=sort_by)
    found = {k: v for k, v in dataclasses.asdict(comparison).items() if k != "rows"}
    found |= {"columns": list(comparison.rows[0]), "table": headline_table(comparison), "key": key}
    write_json(folder / "summary.json", found)
    return dict(read_json(folder / "summary.json"))  # as a second run reads it


def headline_table(comparison: Comparison) -> str:
    """Tabulate the arms in Markdown: means of the baseline, then paired differences with 95% intervals."""
    rows = []
    for arm in comparison.arms:
        row = {"arm": arm.name}
        for m in comparison.image_metrics:
            d, mean = comparison.delta(m.key, arm.name), comparison.mean(m.key, arm.name)
            text = "-" if mean is None else f"{mean:.3g}"
            row[m.title] = text if d is None else with_interval(d.paired.mean_diff, d.paired.interval, "+.3g")
        for s in comparison.set_metrics:
            v = comparison.set_value(s.key, arm.name)
            p = "" if v is None or v.p_holm is None else f" (p {v.p_holm:.3f})"
            row[s.title] = "-" if v is None else f"{v.value:.4g}{p}"
        rows.append(row)
    return markdown(rows)


def log_to_wandb(comparison: Comparison, folder: Path) -> None:
    """Log the summary and a table with one row an image to W&B, offline without an account; never raises."""
    try:
        import wandb

        mode: Any = None if wandb_is_configured() else "offline"
        run = wandb.init(project="midblock-guidance", name=comparison.title, dir=folder, mode=mode, job_type="eval")
        table = pandas.DataFrame(comparison.rows)
        run.log({"rows": wandb.Table(dataframe=table)})
        for d in comparison.deltas:
            run.summary[f"{d.arm}/{d.metric}"] = d.paired.mean_diff
        for v in comparison.set_values:
            run.summary[f"{v.arm}/{v.metric}"] = v.value
        run.log({"report": wandb.Html((folder / "report.html").read_text(encoding="utf-8"))})
        run.finish()
    except Exception as error:  # a failing tracker must not cost the evaluation
        warnings.warn(f"Tracking failed ({type(error).__name__}: {error}); the files are written.", stacklevel=2)
