"""Measure a head per timestep bin, fit its temperatures, find the noise levels where it is of use, plot."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from guidance.heads.config import HeadConfig
from guidance.heads.tasks import get_task
from guidance.schedule import NUM_BINS, timestep_bins
from guidance.utils.io import atomic_path

#: The lower end of the 95% interval of the skill must reach this for a bin to count as useful.
CLEAR_SKILL = 0.1

_MIN_ROWS = 50  # fewer rows fit no temperature of their own
_TEMPERATURE_RANGE = (0.05, 20.0)

_PLOTTED = ("accuracy", "auc", "cosine", "retrieval", "spearman", "spearman_truth", "ece", "nll", "mae", "skill")

_NOT_PLOTTED = re.compile("low|high|rows|chance|cosine_other|ece_uncalibrated|spearman_.*|.*_interval")


def fit_temperatures(
    logits: Float[Tensor, "n outputs"], target: Tensor, t: Float[Tensor, " n"], num_train_timesteps: int
) -> list[float]:
    """Fit one temperature per timestep bin by the likelihood of held-out data.

    Returns :data:`NUM_BINS` divisors; bins with few rows take that of all rows.  ``target`` holds class indices (n,) or
    probabilities (n, outputs).

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    overall = _fit_temperature(logits, target)
    bins = timestep_bins(t, num_train_timesteps)
    picked = [bins == i for i in range(NUM_BINS)]
    return [_fit_temperature(logits[p], target[p]) if p.sum() >= _MIN_ROWS else overall for p in picked]


def _fit_temperature(logits: Tensor, target: Tensor) -> float:
    from scipy.optimize import minimize_scalar

    low, high = (math.log(bound) for bound in _TEMPERATURE_RANGE)
    exact = logits.double()
    wanted = target.double() if target.is_floating_point() else target

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(exact / math.exp(log_temperature), wanted))

    return round(math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x), 4)


def apply_temperatures(
    outputs: Float[Tensor, "n outputs"], temperatures: Sequence[float], t: Float[Tensor, " n"], num_train_timesteps: int
) -> Float[Tensor, "n outputs"]:
    """Divide each row by the temperature of its timestep bin; no temperatures leave the rows as they are."""
    if not temperatures:
        return outputs
    return outputs / outputs.new_tensor(temperatures)[timestep_bins(t, num_train_timesteps)][:, None]


def evaluate_head(
    outputs: Float[Tensor, "n outputs"],
    target: Tensor,
    t: Float[Tensor, " n"],
    config: HeadConfig,
    compare: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, Any]:
    """Measure a head over all rows and per timestep bin.

    Args:
        outputs: Outputs of the head: calibrated logits, numbers, or embeddings.
        target: Encoded targets, see :meth:`guidance.heads.tasks.Task.encode`.
        t, config: Timesteps; the head's config, whose task says what is measured.
        compare: Further numeric columns to rank the score against, for example the testbed's truth.

    Returns:
        ``{"overall": {...}, "bins": [{"low", "high", "rows", ...}]}`` with the measures of
        :meth:`guidance.heads.tasks.Task.measure`.
    """
    task = get_task(config.task)
    outputs, target = task.by_row(outputs, target)
    columns = {n: torch.as_tensor(np.asarray(values, np.float64)) for n, values in (compare or {}).items()}

    def measure(rows: Tensor) -> dict[str, Any]:
        return task.measure(outputs[rows], target[rows], {n: column[rows] for n, column in columns.items()})

    return by_bin(measure, t, config)


def by_bin(measure: Callable[[Tensor], dict[str, Any]], t: Tensor, config: HeadConfig) -> dict[str, Any]:
    """Measure all rows, and those of each timestep bin; ``measure`` takes a mask of rows."""
    bins = timestep_bins(t, config.num_train_timesteps)
    edges = [round(i * config.num_train_timesteps / NUM_BINS) for i in range(NUM_BINS + 1)]
    per_bin = [
        {"low": edges[i], "high": edges[i + 1] - 1, "rows": int((bins == i).sum())} | measure(bins == i)
        for i in range(NUM_BINS)
        if (bins == i).sum() > 3
    ]
    everything = torch.ones(len(t), dtype=torch.bool)
    return {"overall": {"rows": len(t)} | measure(everything), "bins": per_bin}


def useful_range(metrics: Mapping[str, Any], num_train_timesteps: int) -> tuple[float, float]:
    """Return (start, stop), the fractions of the sampling steps where a head clearly beats chance.

    The longest run of bins whose skill reaches :data:`CLEAR_SKILL`; sampling starts at the highest t, so
    start 0 is its upper end.  (0, 1) if there is no such bin.

    >>> skills = [0.6, 0.5, 0.4, 0.3, 0.2, 0.2, 0.15, 0.12, 0.05, -0.1]
    >>> bins = [{"low": 100 * i, "high": 100 * i + 99, "skill": s} for i, s in enumerate(skills)]
    >>> useful_range({"bins": bins}, 1000)
    (0.2, 1.0)
    """
    best: list[Mapping[str, Any]] = []
    run: list[Mapping[str, Any]] = []
    for entry in metrics["bins"]:
        run = [*run, entry] if entry["skill"] >= CLEAR_SKILL else []
        best = run if len(run) > len(best) else best
    if not best:
        return 0.0, 1.0
    start = 1 - (best[-1]["high"] + 1) / num_train_timesteps
    return round(start, 4), round(1 - best[0]["low"] / num_train_timesteps, 4)


def plot_metrics(
    metrics: Mapping[str, Mapping[str, Any]], path: str | Path, *, title: str, shaded: tuple[float, float] | None = None
) -> None:
    """Plot each measure against the timestep, a line for each split or head, with intervals; dotted: chance.

    ``metrics`` holds a result of :func:`evaluate_head` by the name of its line; ``NAME_interval`` of a bin is drawn as
    a band.  ``shaded`` are the first and last timestep to mark.
    """
    from matplotlib.figure import Figure

    found = {name for result in metrics.values() for entry in result["bins"] for name in entry}
    names = [name for name in _PLOTTED if name in found]
    names += sorted(name for name in found - {*names} if not _NOT_PLOTTED.fullmatch(name))
    figure = Figure(figsize=(3.6 * max(len(names), 1), 3.2), layout="constrained")
    axes = figure.subplots(1, max(len(names), 1), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=False):
        for i, (label, result) in enumerate(metrics.items()):
            entries = [entry for entry in result["bins"] if name in entry]
            if entries:
                _plot_line(axis, name, label, entries, f"C{i % 10}")
        if shaded:
            axis.axvspan(*shaded, color="tab:green", alpha=0.08)
        axis.set(title=name, xlabel="timestep (noise grows to the right)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _plot_line(axis: Any, name: str, label: str, entries: Sequence[Mapping[str, Any]], color: str) -> None:
    t = [(entry["low"] + entry["high"]) / 2 for entry in entries]
    axis.plot(t, [entry[name] for entry in entries], "o-", color=color, label=label)
    if all(f"{name}_interval" in entry for entry in entries):
        low, high = zip(*(entry[f"{name}_interval"] for entry in entries), strict=True)
        axis.fill_between(t, low, high, color=color, alpha=0.15, linewidth=0)
    if name in ("accuracy", "retrieval"):
        axis.plot(t, [entry["chance"] for entry in entries], ":", color=color)
