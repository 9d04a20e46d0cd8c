"""Metrics of feature sets: formulas of other packages, order and merging, float32, bad input."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore
from torchmetrics.image.kid import poly_mmd

from eval.metrics.feature_sets import Features, sorted_rows
from eval.metrics.inception_score import inception_score
from eval.metrics.kernels import BLOCK, cmmd, cubic_kernel, kid, mmd_squared, rbf_kernel
from eval.metrics.precision_recall import precision_recall
from guidance.utils.errors import UserError

REAL, FAKE = (torch.randn(120, 6, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))
FAKE = 0.8 * FAKE + 0.4
PROBABILITIES = torch.softmax(2 * REAL, 1)

#: Metrics of two sets as lists of numbers.
METRICS: dict[str, Callable[[Features, Features], list[float]]] = {
    "kid": lambda a, b: [kid(a, b, subsets=5, subset_size=50).mean],
    "cmmd": lambda a, b: [cmmd(a, b).biased, cmmd(a, b).unbiased],
    "precision and recall": lambda a, b: [precision_recall(a, b).precision, precision_recall(a, b).recall],
    "inception score": lambda a, b: [inception_score(torch.softmax(2 * x, 1), splits=5).mean for x in (a, b)],
}
each_metric = pytest.mark.parametrize("measure", METRICS.values(), ids=METRICS.keys())


def test_kid_agrees_with_torchmetrics() -> None:
    """poly_mmd of torchmetrics 1.9, one full subset: in float64, and in the float32 it is used with."""
    ours = kid(REAL, FAKE, subsets=1, subset_size=120)
    assert ours.sd == 0
    assert ours.mean == pytest.approx(float(poly_mmd(REAL, FAKE)), rel=1e-12)
    x, y = REAL.float(), FAKE.float()
    assert kid(x, y, subsets=1, subset_size=120).mean == pytest.approx(float(poly_mmd(x, y)), abs=2e-6)


def test_kid_of_subsets_is_the_formula_of_clean_fid() -> None:
    """Mean over subsets as in kernel_distance of clean-fid 0.1.35, on the same rows."""
    x, y = (z[np.lexsort(z.numpy().T[::-1])].numpy() for z in (REAL, FAKE))
    generator = torch.Generator().manual_seed(7)
    m, d, values = 30, x.shape[1], []
    for _ in range(4):
        i, j = (torch.randperm(120, generator=generator)[:m].numpy() for _ in range(2))
        u, v = x[i], y[j]
        a = (u @ u.T / d + 1) ** 3 + (v @ v.T / d + 1) ** 3
        values.append((a.sum() - np.trace(a)) / (m - 1) / m - 2 * ((u @ v.T / d + 1) ** 3).sum() / m**2)
    ours = kid(REAL, FAKE, subsets=4, subset_size=m, seed=7)
    assert ours.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert ours.sd == pytest.approx(np.std(values), rel=1e-12)


def test_kid_is_unbiased() -> None:
    """Over 200 pairs of samples of one distribution the mean is 0 within its error; the biased form is not."""
    g = torch.Generator().manual_seed(3)
    pairs = [mmd_squared(*torch.randn(2, 20, 4, generator=g).double(), cubic_kernel) for _ in range(200)]
    unbiased, biased = (np.array([getattr(m, name) for m in pairs]) for name in ("unbiased", "biased"))
    assert abs(unbiased.mean()) < 3 * unbiased.std() / 200**0.5
    assert biased.mean() > 10 * biased.std() / 200**0.5


def test_cmmd_agrees_with_the_published_code() -> None:
    """mmd of google-research cmmd/distance.py (2024; JAX there), pair by pair, and Gretton's unbiased form."""
    x, y = (z[:40] / z[:40].norm(dim=1, keepdim=True) for z in (REAL, FAKE))

    def k(u: torch.Tensor, v: torch.Tensor) -> float:
        return math.exp(-float((u - v).square().sum()) / (2 * 10**2))

    def mean(u: torch.Tensor, v: torch.Tensor, skip: bool = False) -> float:
        return np.mean([k(p, q) for i, p in enumerate(u) for j, q in enumerate(v) if not (skip and i == j)])

    ours = cmmd(3 * REAL[:40], FAKE[:40])  # lengths do not matter
    assert ours.biased == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-9)
    unbiased = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y)
    assert ours.unbiased == pytest.approx(1000 * unbiased, rel=1e-9)
    assert cmmd(REAL, REAL).biased == pytest.approx(0, abs=1e-9)


def test_blocks_of_the_kernel_matrix_add_up() -> None:
    x = torch.randn(BLOCK + 30, 3, generator=torch.Generator().manual_seed(4)).double()
    n, k = len(x), rbf_kernel(x, x, 1.0)
    found = mmd_squared(x, FAKE[:, :3], lambda a, b: rbf_kernel(a, b, 1.0))
    y, cross = rbf_kernel(FAKE[:, :3], FAKE[:, :3], 1.0), rbf_kernel(x, FAKE[:, :3], 1.0).mean()
    assert found.biased == pytest.approx(float(k.mean() + y.mean() - 2 * cross), rel=1e-10)
    expected = (k.sum() - n) / (n * (n - 1)) + (y.sum() - 120) / (120 * 119) - 2 * cross
    assert found.unbiased == pytest.approx(float(expected), rel=1e-10)


class Logits(nn.Module):
    """A feature network for torchmetrics: images are their own logits."""

    num_features = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_inception_score_agrees_with_torchmetrics_and_the_paper() -> None:
    """torchmetrics 1.9 on one split; on five, the loop of Salimans et al. (openai/improved-gan) over the same rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its buffer, and of the standard deviation of one split
        other = TorchmetricsInceptionScore(feature=Logits(), splits=1)
        other.update(2 * REAL)
        expected = float(other.compute()[0])
    assert inception_score(PROBABILITIES, splits=1).mean == pytest.approx(expected, rel=1e-9)
    rows = sorted_rows(PROBABILITIES).numpy()[np.random.default_rng(3).permutation(120)]
    scores = []
    for i in range(5):
        part = rows[i * 120 // 5 : (i + 1) * 120 // 5]
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(kl.sum(1).mean()))
    ours = inception_score(PROBABILITIES, splits=5, seed=3)
    assert ours.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert ours.sd == pytest.approx(np.std(scores), rel=1e-9)


def test_inception_score_keeps_its_range() -> None:
    """Sure and evenly spread: the number of classes; nearly all alike: 1.  A probability of 0 is allowed."""
    assert inception_score(np.eye(5)[np.arange(50) % 5], splits=1).mean == pytest.approx(5)
    nearly = torch.softmax(1e-6 * REAL, 1)
    assert inception_score(nearly, splits=2).mean == pytest.approx(1, abs=1e-9)


def test_precision_and_recall_agree_with_prdc_up_to_its_strict_ball() -> None:
    """compute_prdc of prdc 0.2: its ``<`` differs from the paper's ``<=`` only for points on a ball's surface."""
    x, y = REAL.numpy(), FAKE.numpy()

    def radii(z: np.ndarray) -> np.ndarray:
        return np.sort(np.linalg.norm(z[:, None] - z, axis=-1), axis=1)[:, 3]

    distance = np.linalg.norm(x[:, None] - y, axis=-1)
    ours = precision_recall(x, y)
    assert ours.precision == pytest.approx((distance < radii(x)[:, None]).any(0).mean())
    assert ours.recall == pytest.approx((distance < radii(y)).any(1).mean())


@each_metric
def test_the_order_of_rows_changes_nothing(measure) -> None:
    shuffle = torch.randperm(120, generator=torch.Generator().manual_seed(5))
    assert measure(REAL[shuffle], FAKE[shuffle]) == pytest.approx(measure(REAL, FAKE), rel=1e-12)


@each_metric
def test_float32_features_are_measured_in_float64(measure) -> None:
    assert measure(REAL.float(), FAKE.float()) == pytest.approx(measure(REAL, FAKE), rel=1e-5)


@pytest.mark.parametrize("measure", [lambda a, b: kid(a, b, subset_size=50), cmmd, precision_recall])
def test_sets_that_cannot_be_compared_are_refused(measure) -> None:
    spoilt = REAL.clone()
    spoilt[3, 2] = float("nan")
    for bad in (FAKE[:, :3], FAKE[0], spoilt, FAKE[:1], torch.ones(120, 6)):
        with pytest.raises(UserError):
            measure(REAL, bad)


@pytest.mark.parametrize(("bad", "splits"), [(REAL, 1), (PROBABILITIES[:9], 5), (PROBABILITIES[:1].expand(20, 6), 2)])
def test_rows_that_are_no_probabilities_or_too_few_are_refused(bad, splits: int) -> None:
    with pytest.raises(UserError):
        inception_score(bad, splits=splits)
