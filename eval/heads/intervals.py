"""95% intervals of a head's measures over images: noise draws of one image are no further evidence.

Shares (accuracy, retrieval) have Wilson intervals with the number of images as n, as if all draws of an image agreed:
on the wide side.  The others are bootstrapped over images.  Every one of them is, to first order, a function of
sums over rows, so that a resample costs a sum of its images' sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from eval.stats.paired import wilson
from guidance.heads.config import HeadConfig
from guidance.heads.measures import Statistic
from guidance.heads.tasks import get_task
from guidance.training.metrics import by_bin

_RESAMPLES = 1000


def head_intervals(
    outputs: Float[Tensor, "n outputs"],
    target: Tensor,
    t: Float[Tensor, " n"],
    config: HeadConfig,
    image: NDArray[np.int64],
) -> dict[str, Any]:
    """Return 95% intervals of the measures of a head, over all rows and per timestep bin.

    Args:
        outputs, target, t, config: As :func:`guidance.training.metrics.evaluate_head` takes them, and returns measures.
        image: The image of each row (n,); rows of one image are resampled together.
    """
    task = get_task(config.task)
    outputs, target = task.by_row(outputs, target)

    def intervals(rows: Tensor) -> dict[str, Any]:
        return _intervals(task.statistics(outputs[rows], target[rows]), image[rows.numpy()])

    return by_bin(intervals, t, config)


def _intervals(statistics: dict[str, Statistic], image: NDArray[np.int64]) -> dict[str, Any]:
    """Return the intervals of measures of the same rows, from the same resamples."""
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
        columns = slice(first, first := first + statistic.addends.shape[1])
        if statistic.is_share:
            share = float(statistic.value(sums[:, columns].sum(0)))
            result[f"{name}_interval"] = list(wilson(min(max(share, 0.0), 1.0) * n, n))
        else:
            result[f"{name}_interval"] = _percentiles(statistic.value, resampled[:, columns])
    return result


def _percentiles(value: Callable[..., NDArray[np.float64]], sums: NDArray[np.float64]) -> list[float]:
    """Return the middle 95% of the resamples in which the measure is defined; NaN if there are none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = value(sums)
    found = found[np.isfinite(found)]
    return np.quantile(found, [0.025, 0.975]).tolist() if len(found) else [float("nan")] * 2
