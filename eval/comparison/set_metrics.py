"""Metrics with one value a set of images, for every arm of a comparison: values, disjoint blocks, permutation tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from eval.comparison.results import SetMetric, SetValue
from eval.metrics.feature_sets import unit_rows
from eval.metrics.frechet import frechet_distance, moments
from eval.metrics.inception_score import inception_score
from eval.metrics.kernels import Kernel, cmmd, cubic_kernel, mmd_squared, rbf_kernel
from eval.metrics.precision_recall import covered, radii
from eval.stats.paired import holm, prompt_numbers
from eval.stats.permutation import mmd_permutation_test, permutation_test

BLOCKS = 3

NEIGHBOURS = 3  # of precision and recall

#: Widest features whose Frechet distance is tested: two eigenproblems a permutation, 10 ms at 128, 200 ms at 512.
WIDEST_TEST = 256

#: Most images whose recall is tested: all distances among two arms are held, 64 MB at 2,000.
MOST_TESTED = 2000

Rows = Float[np.ndarray, "n d"]

Prompts = Sequence[str]


@dataclasses.dataclass(frozen=True)
class SetStatistic:
    """A set metric, ready to be computed.

    Attributes:
        metric: What it is.
        rows: Arm -> rows it is computed from, the baseline first.
        value: Of the rows of an arm.
        test: p-value of baseline rows, an arm's rows and prompts; None where no test is run.
    """

    metric: SetMetric
    rows: Mapping[str, Rows]
    value: Callable[[Rows], float]
    test: Callable[[Rows, Rows, Prompts], float | None] | None


def frechet_statistic(
    rows: Mapping[str, Rows], mu: np.ndarray, sigma: np.ndarray, title: str, reference: str, permutations: int
) -> SetStatistic:
    """Frechet distance to a reference."""

    def value(x: Rows) -> float:
        return frechet_distance(
            torch.as_tensor(mu), torch.as_tensor(sigma), *map(torch.as_tensor, moments(x))
        )

    def test(a: Rows, b: Rows, prompts: Prompts) -> float:
        both = np.concatenate([a, b])
        return _test_rows(lambda i: value(both[i]), len(a), prompts, permutations)

    note = f"Frechet distance of {len(mu)} features to {reference}; biased upwards at small n."
    metric = SetMetric("fd", title, "lower", note)
    return SetStatistic(metric, rows, value, test if len(mu) <= WIDEST_TEST else None)


def kernel_statistic(
    rows: Mapping[str, Rows], real: Rows, title: str, reference: str, permutations: int
) -> SetStatistic:
    """Kernel distance (KID's estimator on all rows at once), times 1000."""
    target = torch.as_tensor(real).double()

    def value(x: Rows) -> float:
        return 1000 * mmd_squared(target, torch.as_tensor(x).double(), cubic_kernel).unbiased

    note = f"1000 times the unbiased MMD with kernel (x.y/d + 1)^3 to {reference}; 0 for equal distributions."
    return SetStatistic(
        SetMetric("kd", title, "lower", note), rows, value, _mmd_test(real, cubic_kernel, permutations)
    )


def cmmd_statistic(
    rows: Mapping[str, Rows], real: Rows, title: str, reference: str, permutations: int
) -> SetStatistic:
    """CMMD of embeddings of a CLIP, the published (biased) form."""
    unit = {arm: unit_rows(x).numpy() for arm, x in rows.items()}
    note = f"1000 times the squared MMD of CLIP embeddings under a Gaussian kernel (sigma 10) to {reference}."
    test = _mmd_test(unit_rows(real).numpy(), rbf_kernel, permutations)
    return SetStatistic(SetMetric("cmmd", title, "lower", note), unit, lambda x: cmmd(real, x).biased, test)


def precision_statistic(
    rows: Mapping[str, Rows], real: Rows, label: str, reference: str, permutations: int, k: int = NEIGHBOURS
) -> SetStatistic:
    """Share of generated images within the manifold of real ones."""
    target = torch.as_tensor(real).double()
    radius = radii(target, k)
    inside = {
        arm: covered(torch.as_tensor(x).double(), target, radius).double()[:, None].numpy()
        for arm, x in rows.items()
    }

    def test(a: Rows, b: Rows, prompts: Prompts) -> float:
        both = np.concatenate([a, b])[:, 0]
        return _test_rows(lambda i: float(both[i].mean()), len(a), prompts, permutations)

    note = f"Share of images within the manifold of {reference} (k = {k}): how many look real."
    metric = SetMetric("precision", f"precision ({label})", "higher", note)
    return SetStatistic(metric, inside, lambda x: float(x.mean()), test)


def recall_statistic(
    rows: Mapping[str, Rows], real: Rows, label: str, reference: str, permutations: int, k: int = NEIGHBOURS
) -> SetStatistic:
    """Share of real images within the manifold of generated ones."""
    target = torch.as_tensor(real).double()

    def test(a: Rows, b: Rows, prompts: Prompts) -> float | None:
        if len(a) > MOST_TESTED:
            return None
        both = torch.as_tensor(np.concatenate([a, b])).double()
        among, across = torch.cdist(both, both).float(), torch.cdist(both, target).float()

        def recall(rows: Int[np.ndarray, " n"]) -> float:
            i = torch.as_tensor(rows)
            radius = among[i].index_select(1, i).topk(k + 1, dim=1, largest=False).values[:, -1:]
            return float((across[i] <= radius).any(0).double().mean())

        return _test_rows(recall, len(a), prompts, permutations)

    def value(x: Rows) -> float:
        centres = torch.as_tensor(x).double()
        return float(covered(target, centres, radii(centres, k)).double().mean())

    note = f"Share of {reference} within the manifold of the images (k = {k}): how much of it is reached."
    metric = SetMetric("recall", f"recall ({label})", "higher", note)
    return SetStatistic(metric, rows, value, test)


def inception_statistic(rows: Mapping[str, Rows], label: str, permutations: int) -> SetStatistic:
    """Inception score of class probabilities, in one split."""

    def value(x: Rows) -> float:
        return inception_score(x, splits=1).mean

    def test(a: Rows, b: Rows, prompts: Prompts) -> float:
        both = np.concatenate([a, b])
        return _test_rows(lambda i: value(both[i]), len(a), prompts, permutations)

    note = (
        "exp of the mean KL of class probabilities from their mean, in one split: sharp and varied classes."
    )
    return SetStatistic(
        SetMetric("inception_score", f"inception score ({label})", "higher", note), rows, value, test
    )


def set_values(statistic: SetStatistic, prompts: Prompts, seeds: Sequence[int]) -> list[SetValue]:
    """Compute a set metric of every arm, on all rows and on blocks, and test it against the first arm's.

    Args:
        statistic: The metric and the rows of each arm, the baseline's first.
        prompts: Prompt id of each row.
        seeds: Seed of each row.
    """
    names = list(statistic.rows)
    base = statistic.rows[names[0]]
    blocks = list_blocks(prompts, seeds)
    values = {name: statistic.value(x) for name, x in statistic.rows.items()}
    enough = len(set(prompts)) >= 6  # the fewest a permutation test takes
    tests = {
        name: statistic.test(base, statistic.rows[name], prompts) if statistic.test and enough else None
        for name in names[1:]
    }
    tested = [name for name, p in tests.items() if p is not None]
    adjusted = dict(zip(tested, holm([tests[n] for n in tested]), strict=True)) if tested else {}  # type: ignore[misc]
    return [
        SetValue(
            metric=statistic.metric.key,
            arm=name,
            value=values[name],
            blocks=tuple(statistic.value(statistic.rows[name][rows]) for rows in blocks),
            difference=None if name == names[0] else values[name] - values[names[0]],
            p=tests.get(name),
            p_holm=float(adjusted[name]) if name in adjusted else None,
        )
        for name in names
    ]


def list_blocks(prompts: Prompts, seeds: Sequence[int]) -> list[Int[np.ndarray, " rows"]]:
    """Rows of three disjoint blocks: of seeds where every prompt has three or more, else of prompts; none if too few.

    >>> [rows.tolist() for rows in list_blocks(["a", "a", "a", "b", "b", "b"] * 2, range(12))]
    [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    """
    number = prompt_numbers(prompts)
    if np.bincount(number).min() >= BLOCKS:
        order = np.lexsort((np.asarray(seeds), number))
        rank = np.empty(len(number), np.int64)
        first = np.concatenate([[0], np.cumsum(np.bincount(number))[:-1]])
        rank[order] = np.arange(len(number)) - np.repeat(first, np.bincount(number))
        number = rank
    rows = [np.flatnonzero(number % BLOCKS == block) for block in range(BLOCKS)]
    return rows if min(map(len, rows)) > NEIGHBOURS else []


def _test_rows(value: Callable[[np.ndarray], float], n: int, prompts: Prompts, permutations: int) -> float:
    """Permutation p-value of the difference of a value of row numbers, 0..n-1 of one arm and n..2n-1 of the other."""

    def difference(a: np.ndarray, b: np.ndarray) -> float:
        return value(b[:, 0].astype(np.int64)) - value(a[:, 0].astype(np.int64))

    rows = np.arange(2 * n, dtype=np.float64)[:, None]
    return permutation_test(
        rows[:n], rows[n:], prompts, difference, two_sided=True, permutations=permutations
    ).p


def _mmd_test(real: Rows, kernel: Kernel, permutations: int) -> Any:
    def test(a: Rows, b: Rows, prompts: Prompts) -> float:
        return mmd_permutation_test(a, b, prompts, kernel, reference=real, permutations=permutations).p

    return test
