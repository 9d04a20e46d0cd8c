"""Measures of predictions, shared by the tasks of heads, and their form for a bootstrap over images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor


def macro_auc(logits: Float[Tensor, "n classes"], index: Int[Tensor, " n"]) -> float:
    """Mean area under the ROC curve over the classes that occur, each against the rest; 0.5 for one class."""
    from torchmetrics.functional.classification import binary_auroc

    p, present = logits.double().softmax(1), index.unique()
    if len(present) < 2:
        return 0.5
    return float(torch.stack([binary_auroc(p[:, k], (index == k).long()) for k in present]).mean())


def auc_and_skill(score: Float[Tensor, " n"], label: Int[Tensor, " n"]) -> dict[str, float]:
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


def rank_measures(
    score: Float[Tensor, " n"], target: Float[Tensor, " n"], compare: Mapping[str, Float[Tensor, " n"]]
) -> dict[str, float]:
    """Spearman's rho of a score with its target and with other columns; ``skill`` is its 95% lower bound."""
    rho = spearman(score, target)
    found = {"spearman": rho} | {f"spearman_{name}": spearman(score, c) for name, c in compare.items()}
    # Fisher's transform; 1.03 is Fieller's correction for ranks
    lower = math.atanh(min(rho, 0.999999)) - 1.96 * 1.03 / math.sqrt(max(len(score) - 3, 1))
    return found | {"skill": math.tanh(lower)}


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation over the rows where ``b`` is finite, 0 where one side is constant."""
    from torchmetrics.functional.regression import spearman_corrcoef

    kept = b.isfinite()
    if kept.sum() < 3 or a[kept].unique().numel() < 2 or b[kept].unique().numel() < 2:
        return 0.0
    return float(spearman_corrcoef(a[kept].double(), b[kept].double()))


def skill_above_chance(share: float, n: int, chance: float) -> float:
    """Lower end of Wilson's 95% interval of a share, rescaled so that chance is 0 and certainty 1."""
    z = 1.96
    centre = share + z * z / (2 * n)
    lower = (centre - z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))) / (1 + z * z / n)
    return (lower - chance) / max(1 - chance, 1e-9)


class Statistic(NamedTuple):
    """A measure as a function of sums over rows, so that a bootstrap resample costs a sum of its images' sums.

    Attributes:
        addends: What each row adds to the sums, (n, k).
        value: Sums (..., k) -> measure (...).
        is_share: The measure is a share of rows: it has Wilson's interval, not a bootstrapped one.
    """

    addends: Float[NDArray[np.float64], "n k"]
    value: Callable[[NDArray[np.float64]], Any]
    is_share: bool = False


def mean_of(values: Tensor, *, is_share: bool = False) -> Statistic:
    """The mean of a value per row."""
    addends = np.stack([values.double().numpy(), np.ones(len(values))], 1)
    return Statistic(addends, lambda s: s[..., 0] / s[..., 1], is_share)


def rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> Statistic:
    """Spearman's rho, the correlation of ranks; resamples keep the ranks among all rows."""
    from scipy.stats import rankdata

    x, y = ((r := rankdata(v)) - r.mean() for v in (a, b))

    def value(s: NDArray[np.float64]) -> Any:
        mx, my, xx, yy, xy = (s[..., i] / s[..., 5] for i in range(5))
        return (xy - mx * my) / np.sqrt((xx - mx**2) * (yy - my**2))

    return Statistic(np.stack([x, y, x * x, y * y, x * y, np.ones(len(x))], 1), value)


def mean_auc(problems: list[tuple[NDArray[np.float64], Bool[np.ndarray, " n"]]]) -> Statistic:
    """The mean area under the ROC curve of several (score, is positive).

    To first order ``A* = mean*(share of negatives below a positive) + mean*(share of positives above a
    negative) - A``, whose variance is DeLong's.

    Reference:
        DeLong et al., "Comparing the Areas under Two or More Correlated ROC Curves", Biometrics 1988.
    """
    from scipy.stats import rankdata

    columns, areas = [], []
    for score, positive in problems:
        n1, n0 = positive.sum(), (~positive).sum()
        within = np.zeros(len(score))
        for kind in (positive, ~positive):
            within[kind] = rankdata(score[kind])
        below = rankdata(score) - within  # rows of the other kind, ties count half
        share = np.where(positive, below / n0, 1 - below / n1)
        areas.append(share[positive].mean())
        columns += [share * positive, positive, share * ~positive, ~positive]

    def value(s: NDArray[np.float64]) -> Any:
        parts = s.reshape(*s.shape[:-1], len(problems), 4)
        means = parts[..., 0] / parts[..., 1] + parts[..., 2] / parts[..., 3]
        return np.clip((means - np.array(areas)).mean(-1), 0, 1)  # the approximation may overshoot

    return Statistic(np.stack(columns, 1).astype(np.float64), value)
