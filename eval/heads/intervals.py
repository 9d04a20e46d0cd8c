"""How sure the measures of a head are: 95% intervals over images, whose noise draws are no further evidence.

Accuracy and retrieval have Wilson intervals with the number of images as n, as if all draws of an image agreed:
on the wide side.  The others are bootstrapped over images.  Every one of them is, to first order, a function of
sums over rows, so that a resample costs a sum of its images' sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from eval.stats.paired import wilson
from guidance.heads.config import HeadConfig
from guidance.training.metrics import by_bin, class_index, expected_rating
from guidance.training.tasks import compare_embeddings, two_class_logits

_RESAMPLES = 1000


class Statistic(NamedTuple):
    """A measure as a function of sums over rows.

    Attributes:
        addends: What each row adds to the sums, (n, k).
        value: Sums (..., k) -> measure (...).
    """

    addends: Float[NDArray[np.float64], "n k"]
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]]


def head_intervals(
    outputs: Float[Tensor, "n outputs"],
    target: Tensor,
    t: Float[Tensor, " n"],
    config: HeadConfig,
    image: NDArray[np.int64],
) -> dict[str, Any]:
    """Return 95% intervals of the measures of a head, over all rows and per timestep bin.

    Args:
        outputs, target, t, config: As :func:`guidance.training.metrics.evaluate_head` takes them.
        image: The image of each row (n,); rows of one image are resampled together.

    Returns:
        ``{"overall": {"accuracy_interval": [low, high], ...}, "bins": [...]}`` like the measures themselves.
    """
    if config.task == "embedding":
        found, _ = compare_embeddings(outputs, target)
        values = {name: x.double().numpy() for name, x in found.items()}

        def statistics(rows: Tensor) -> dict[str, Statistic]:
            return {name: mean_of(x[rows.numpy()]) for name, x in values.items()}
    else:
        logits = two_class_logits(outputs) if config.task == "binary" else outputs

        def statistics(rows: Tensor) -> dict[str, Statistic]:
            return row_statistics(logits[rows], target[rows], config)

    return by_bin(lambda rows: _intervals(statistics(rows), image[rows.numpy()]), t, config)


def row_statistics(outputs: Tensor, target: Tensor, config: HeadConfig) -> dict[str, Statistic]:
    """The measures of a rating, class, binary or regression head as functions of sums."""
    if config.task == "regression":
        score, wanted = outputs[:, 0], target[:, 0]
        mae = mean_of((score - wanted).abs().double().numpy())
        return {"mae": mae, "spearman": rank_correlation(score.numpy(), wanted.numpy())}
    index = class_index(target, config)
    found = {
        "accuracy": mean_of((outputs.argmax(1) == index).double().numpy()),
        "nll": mean_of(F.cross_entropy(outputs, target, reduction="none").double().numpy()),
    }
    if config.task == "rating":
        wanted = target @ torch.arange(1.0, outputs.shape[1] + 1)
        return found | {"spearman": rank_correlation(expected_rating(outputs).numpy(), wanted.numpy())}
    p, present = outputs.double().softmax(1).numpy(), index.unique().tolist()
    if len(present) < 2:
        return found
    against = [1] if config.task == "binary" else present
    return found | {"auc": mean_auc([(p[:, k], index.numpy() == k) for k in against])}


def mean_of(values: NDArray[np.float64]) -> Statistic:
    """The mean of a value per row."""
    return Statistic(np.stack([values, np.ones(len(values))], 1), lambda s: s[..., 0] / s[..., 1])


def rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> Statistic:
    """Spearman's rho, the correlation of ranks; resamples keep the ranks among all rows."""
    x, y = ((r := rankdata(v)) - r.mean() for v in (a, b))

    def value(s: NDArray[np.float64]) -> NDArray[np.float64]:
        mx, my, xx, yy, xy = (s[..., i] / s[..., 5] for i in range(5))
        return (xy - mx * my) / np.sqrt((xx - mx**2) * (yy - my**2))

    return Statistic(np.stack([x, y, x * x, y * y, x * y, np.ones(len(x))], 1), value)


def mean_auc(problems: list[tuple[NDArray[np.float64], NDArray[np.bool_]]]) -> Statistic:
    """The mean area under the ROC curve of several (score, is positive).

    To first order ``A* = mean*(share of negatives below a positive) + mean*(share of positives above a
    negative) - A``, whose variance is DeLong's.

    Reference:
        DeLong et al., "Comparing the Areas under Two or More Correlated ROC Curves", Biometrics 1988.
    """
    columns, areas = [], []
    for score, positive in problems:
        n1, n0 = positive.sum(), (~positive).sum()
        own = np.where(positive, *(_ranks_within(score, chosen) for chosen in (positive, ~positive)))
        below = rankdata(score) - own  # of the other kind, ties count half
        share = np.where(positive, below / n0, 1 - below / n1)
        areas.append(share[positive].mean())
        columns += [share * positive, positive, share * ~positive, ~positive]

    def value(s: NDArray[np.float64]) -> NDArray[np.float64]:
        parts = s.reshape(*s.shape[:-1], len(problems), 4)
        means = parts[..., 0] / parts[..., 1] + parts[..., 2] / parts[..., 3]
        return np.clip((means - np.array(areas)).mean(-1), 0, 1)  # the approximation may overshoot

    return Statistic(np.stack(columns, 1).astype(np.float64), value)


def _ranks_within(score: NDArray[np.float64], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    ranks = np.zeros(len(score))
    ranks[chosen] = rankdata(score[chosen])
    return ranks


def _intervals(statistics: dict[str, Statistic], image: NDArray[np.int64]) -> dict[str, Any]:
    """The intervals of measures that share their rows, hence their resamples."""
    _, unit = np.unique(image, return_inverse=True)
    n = int(unit.max()) + 1
    rng = np.random.default_rng(0)
    addends = np.concatenate([s.addends for s in statistics.values()], axis=1)
    sums = np.stack([np.bincount(unit, column) for column in addends.T], axis=1)
    batch = max(1, min(_RESAMPLES, 2_000_000 // n))  # bounds memory
    draws = [min(batch, _RESAMPLES - i) for i in range(0, _RESAMPLES, batch)]
    resampled = np.concatenate([rng.multinomial(n, np.full(n, 1 / n), size) @ sums for size in draws])
    result, first = {}, 0
    for name, statistic in statistics.items():
        mine = slice(first, first + statistic.addends.shape[1])
        first = mine.stop
        if name in ("accuracy", "retrieval"):
            share = float(statistic.value(sums[:, mine].sum(0)))
            result[f"{name}_interval"] = list(wilson(min(max(share, 0.0), 1.0) * n, n))
        else:
            result[f"{name}_interval"] = _percentiles(statistic.value, resampled[:, mine])
    return result


def _percentiles(value: Callable[..., NDArray[np.float64]], sums: NDArray[np.float64]) -> list[float]:
    """The middle 95% of the resamples for which the measure is defined; NaN where there is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = value(sums)
    found = found[np.isfinite(found)]
    return np.quantile(found, [0.025, 0.975]).tolist() if len(found) else [float("nan")] * 2
