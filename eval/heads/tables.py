"""Markdown tables and the reliability plot of measured heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from eval.stats.tables import markdown, with_interval
from guidance.utils.io import atomic_path

_COLUMNS = ["rows", "chance", "accuracy", "auc", "spearman", "mae", "cosine", "cosine_other", "retrieval"]
_COLUMNS += ["ece", "ece_uncalibrated", "nll", "skill"]

_BINS = 15  # of the confidence, as in the calibration error


def head_tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table by timestep for each head; of several heads first one that compares them.

    Args:
        results: Head -> ``{"task", "overall", "bins"}``.
    """
    rows = [{"head": name, "task": r["task"]} | r["overall"] for name, r in results.items()]
    parts = [_table(rows, ("head", "task"))] if len(rows) > 1 else []
    for name, result in results.items():
        rows = [{"timesteps": f"{e['low']}-{e['high']}"} | e for e in result["bins"]]
        table = _table([*rows, {"timesteps": "all"} | result["overall"]], ("timesteps",))
        parts.append(f"{name} ({result['task']})\n\n{table}")
    return "\n\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """A table of the measures that any of the rows has."""
    measured = dict.fromkeys(name for row in rows for name in row if not name.endswith("_interval"))
    measures = [name for name in _COLUMNS if name in measured]
    measures += [name for name in measured if name not in (*measures, *labels, "low", "high")]
    cells = [{label: row[label] for label in labels} | {m: _cell(row, m) for m in measures} for row in rows]
    return markdown(cells)


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return "-"
    interval = row.get(f"{name}_interval")
    if interval is not None and np.isfinite(interval).all():
        return with_interval(row[name], interval, ".3f")
    return f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name])


def reliability(logits: Float[Tensor, "n outputs"], index: Tensor) -> list[dict[str, float]]:
    """Compare the confidence in the most probable class with how often it is right, in bins of equal width.

    Returns:
        ``{"confidence", "accuracy", "rows"}`` for each bin that has rows; the mean difference, weighted by
        rows, is the expected calibration error.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    confidence, chosen = logits.softmax(1).max(1)
    correct = (chosen == index).double()
    bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
    found = []
    for rows in (bins == k for k in bins.unique()):
        means = {"confidence": float(confidence[rows].double().mean()), "accuracy": float(correct[rows].mean())}
        found.append(means | {"rows": int(rows.sum())})
    return found


def plot_reliability(heads: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]], path: Path) -> None:
    """Plot accuracy against confidence, a panel for each head and a line for each of its curves.

    Args:
        heads: Head -> name of a curve -> result of :func:`reliability`.
        path: PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(heads), 3.6), layout="constrained")
    axes = figure.subplots(1, len(heads), squeeze=False)[0]
    for axis, (name, curves) in zip(axes, heads.items(), strict=True):
        axis.plot([0, 1], [0, 1], "k:", linewidth=1)
        for label, bins in curves.items():
            x, y, rows = (np.array([b[key] for b in bins]) for key in ("confidence", "accuracy", "rows"))
            (line,) = axis.plot(x, y, label=label, alpha=0.7)
            axis.scatter(x, y, 8 + 120 * rows / rows.sum(), color=line.get_color())
        axis.set(title=name, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle("Reliability; areas: share of rows")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
