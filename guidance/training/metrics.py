"""How good a head is, per timestep bin; temperatures; and the range of noise where it is of use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from guidance.heads.config import NUM_BINS, HeadConfig, timestep_bins
from guidance.training.tasks import compare_embeddings, two_class_logits
from guidance.utils.io import atomic_path

#: The lower end of the 95% interval of the skill must reach this for a bin to count as useful.
CLEAR_SKILL = 0.1

_MIN_ROWS = 50  # fewer rows fit no temperature of their own

_TEMPERATURE_RANGE = (0.05, 20.0)

_PLOTTED = (
    "accuracy",
    "auc",
    "cosine",
    "retrieval",
    "spearman",
    "spearman_truth",
    "ece",
    "nll",
    "mae",
    "skill",
)


def fit_temperatures(
    logits: Float[Tensor, "n outputs"], target: Tensor, t: Float[Tensor, " n"], num_train_timesteps: int
) -> list[float]:
    """Fit one temperature per timestep bin by the likelihood of held-out data.

    Args:
        logits: Uncalibrated outputs.
        target: Class indices (n,) or probabilities (n, outputs).
        t: Timesteps.
        num_train_timesteps: Range of t.

    Returns:
        :data:`NUM_BINS` divisors; bins with few rows take that of all rows.

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
    outputs: Float[Tensor, "n outputs"],
    temperatures: Sequence[float],
    t: Float[Tensor, " n"],
    num_train_timesteps: int,
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
        target: As :func:`guidance.training.tasks.encode_targets` gives it.
        t: Timesteps.
        config: The head's config.
        compare: Further numeric columns to rank the score against, for example the testbed's truth.

    Returns:
        ``{"overall": {...}, "bins": [{"low", "high", "rows", ...}]}``.  Ratings and classes: accuracy, chance
        (the share of the most frequent class), ece, nll.  Ratings and numbers: spearman of the score with the
        target and ``spearman_NAME`` with the compared columns.  Regression: mae.  Classes and binary: auc, of
        classes the mean over those that occur, each against the rest.  Binary besides: what classes have.
        Embeddings: see :func:`guidance.training.tasks.compare_embeddings`.  ``skill`` is the lower end of a
        95% interval of Spearman's rho, of 2 auc - 1 for a binary head, or, for classes and embeddings, of
        (accuracy - chance) / (1 - chance).
    """
    if config.task == "embedding":
        found, candidates = compare_embeddings(outputs, target)
        return by_bin(lambda rows: _mean_comparison(found, rows, candidates), t, config)
    if config.task == "binary":
        outputs = two_class_logits(outputs)
    compared = {
        name: torch.as_tensor(np.asarray(values, np.float64)) for name, values in (compare or {}).items()
    }

    def measure(rows: Tensor) -> dict[str, Any]:
        return _measure(outputs[rows], target[rows], config, {n: c[rows] for n, c in compared.items()})

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


def _mean_comparison(found: Mapping[str, Tensor], rows: Tensor, candidates: int) -> dict[str, Any]:
    result = {name: float(values[rows].double().mean()) for name, values in found.items()}
    chance, lower = 1 / candidates, _wilson_lower(result["retrieval"], int(rows.sum()))
    return result | {"chance": chance, "skill": (lower - chance) / max(1 - chance, 1e-9)}


def _measure(
    outputs: Tensor, target: Tensor, config: HeadConfig, compare: dict[str, Tensor]
) -> dict[str, Any]:
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    result: dict[str, Any] = {}
    n = len(outputs)
    if config.task != "regression":
        index, classes = class_index(target, config), outputs.shape[1]
        accuracy = float(MulticlassAccuracy(classes, average="micro")(outputs, index))
        chance = float(index.bincount(minlength=classes).max()) / n
        result = {
            "accuracy": accuracy,
            "chance": chance,
            "ece": float(MulticlassCalibrationError(classes, n_bins=15)(outputs.softmax(1), index)),
            "nll": float(F.cross_entropy(outputs, target)),
        }
        if config.task == "binary":
            return result | _ranking(outputs[:, 1] - outputs[:, 0], index)
        if config.task == "class":
            lower = _wilson_lower(accuracy, n)
            auc = _macro_auc(outputs, index)
            return result | {"auc": auc, "skill": (lower - chance) / max(1 - chance, 1e-9)}
        score, wanted = expected_rating(outputs), target @ torch.arange(1.0, classes + 1)
    else:
        score, wanted = outputs[:, 0], target[:, 0]
        result["mae"] = float((score - wanted).abs().mean())
    rho = _spearman(score, wanted)
    result |= {"spearman": rho} | {f"spearman_{name}": _spearman(score, c) for name, c in compare.items()}
    # Fisher's transform; 1.03 is Fieller's correction for ranks
    return result | {
        "skill": math.tanh(math.atanh(min(rho, 0.999999)) - 1.96 * 1.03 / math.sqrt(max(n - 3, 1)))
    }


def class_index(target: Tensor, config: HeadConfig) -> Tensor:
    """The class (n,) that counts as right, of targets as :func:`guidance.training.tasks.encode_targets` gives.

    A rating between two counts as the nearer one.
    """
    if config.task in ("class", "binary"):
        return target
    return expected_rating(target.clamp(min=1e-30).log()).round().long() - 1


def _macro_auc(logits: Tensor, index: Tensor) -> float:
    """Mean area under the ROC curve over the classes that occur, each against the rest; 0.5 for one class."""
    from torchmetrics.functional.classification import binary_auroc

    p, present = logits.double().softmax(1), index.unique()
    if len(present) < 2:
        return 0.5
    return float(torch.stack([binary_auroc(p[:, k], (index == k).long()) for k in present]).mean())


def _ranking(score: Tensor, label: Tensor) -> dict[str, float]:
    """Area under the ROC curve, and the lower end of its 95% interval as skill (0 at 0.5, 1 at 1).

    Reference:
        Hanley and McNeil, "The Meaning and Use of the Area under a ROC Curve", Radiology 1982.
    """
    from torchmetrics.functional.classification import binary_auroc

    n1, n0 = int((label == 1).sum()), int((label == 0).sum())
    if not n1 or not n0:
        return {"auc": 0.5, "skill": -1.0}
    auc = float(binary_auroc(score.double().sigmoid(), label))
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    variance = auc * (1 - auc) + (n1 - 1) * (q1 - auc * auc) + (n0 - 1) * (q2 - auc * auc)
    return {"auc": auc, "skill": 2 * (auc - 1.96 * math.sqrt(max(variance, 0) / (n1 * n0))) - 1}


def expected_rating(logits: Float[Tensor, "n ratings"]) -> Float[Tensor, " n"]:
    """The mean of the ratings 1, 2, ... under the probabilities of a rating head."""
    return logits.softmax(1) @ torch.arange(1.0, logits.shape[1] + 1)


def _spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation, 0 where one side is constant."""
    from torchmetrics.functional.regression import spearman_corrcoef

    kept = b.isfinite()
    if kept.sum() < 3 or a[kept].unique().numel() < 2 or b[kept].unique().numel() < 2:
        return 0.0
    return float(spearman_corrcoef(a[kept].double(), b[kept].double()))


def _wilson_lower(share: float, n: int, z: float = 1.96) -> float:
    centre = share + z * z / (2 * n)
    return (centre - z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))) / (1 + z * z / n)


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
    metrics: Mapping[str, Mapping[str, Any]],
    path: str | Path,
    *,
    title: str,
    shaded: tuple[float, float] | None = None,
) -> None:
    """Plot each measure against the timestep, a line each, with its intervals; dotted: chance.

    Args:
        metrics: Name of a line (a split, a head) -> result of :func:`evaluate_head`; ``NAME_interval`` of a
            bin is drawn as a band.
        path: PNG file.
        title: Title of the figure.
        shaded: Timesteps to mark, from and to; None for none.
    """
    from matplotlib.figure import Figure

    found = {name for result in metrics.values() for entry in result["bins"] for name in entry}
    names = [name for name in _PLOTTED if name in found]
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
