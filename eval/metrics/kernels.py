"""Kernel distances between two feature sets: maximum mean discrepancy (MMD), KID and CMMD."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from eval.metrics.feature_sets import Features, MeanSd, sorted_rows, two_sets, unit_rows
from guidance.utils.errors import UserError

Kernel = Callable[[Float[Tensor, "n d"], Float[Tensor, "m d"]], Float[Tensor, "n m"]]

BLOCK = 1024  # rows of a kernel matrix held at once


class MMD(NamedTuple):
    """Two estimates of one squared discrepancy."""

    biased: float  # V-statistic, with pairs of a row and itself: above 0 for unequal samples of one distribution
    unbiased: float  # U-statistic, without them: 0 on average for one distribution, hence also negative


def cubic_kernel(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return ``(x.y / d + 1)^3`` (Binkowski et al. 2018)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def rbf_kernel(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], sigma: float = 10.0) -> Float[Tensor, "n m"]:
    """Return ``exp(-|x - y|^2 / (2 sigma^2))``."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(-squares.clamp(min=0) / (2 * sigma**2))


def mmd_squared(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], kernel: Kernel) -> MMD:
    """Estimate ``E k(x, x') + E k(y, y') - 2 E k(x, y)``, a block of rows at a time.

    Args:
        x, y: Features, float64, two rows or more each.
        kernel: Maps two sets to the matrix of all pairs.

    Reference:
        Gretton et al. 2012, A kernel two-sample test, equations 3 (unbiased) and 5 (biased).

    >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [1.0]])
    >>> mmd_squared(x, y, lambda a, b: a @ b.T)
    MMD(biased=0.25, unbiased=0.0)
    """
    biased = unbiased = 0.0
    for z in (x, y):
        total = trace = 0.0
        for block, part in enumerate(z.split(BLOCK)):
            k = kernel(part, z)
            total += float(k.sum())
            trace += float(k.diagonal(offset=block * BLOCK).sum())
        biased += total / len(z) ** 2
        unbiased += (total - trace) / (len(z) * (len(z) - 1))
    cross = sum(float(kernel(part, y).sum()) for part in x.split(BLOCK)) / (len(x) * len(y))
    return MMD(biased - 2 * cross, unbiased - 2 * cross)


def kid(real: Features, generated: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> MeanSd:
    """Estimate the squared MMD with kernel ``(x.y / d + 1)^3`` (KID, kernel distance), without bias.

    Each subset takes ``subset_size`` rows of each set, without replacement.  Subsets overlap, so the standard
    deviation over them is no standard error; compare two methods with `eval.stats.permutation`.

    Args:
        real, generated: Features (tensors or arrays); the order of rows does not matter.
        subsets: Number of draws.
        subset_size: Rows of a subset; with ``subsets=1`` and all rows of sets of equal size, every pair counts once.
        seed: Of the draws.

    Returns:
        Mean and standard deviation over subsets; 0 on average for samples of one distribution, hence also
        negative.  Often shown times 1000.

    Reference:
        Binkowski et al. 2018, Demystifying MMD GANs.

    >>> x = torch.arange(6.0)[:, None]
    >>> round(kid(x, x + 4, subsets=1, subset_size=6).mean, 6)
    79010.366667
    """
    a, b = map(sorted_rows, two_sets(real, generated))
    if not 2 <= subset_size <= min(len(a), len(b)) or subsets < 1:
        raise UserError(
            f"Expected a subset_size from 2 to the rows of the smaller set, {min(len(a), len(b))}, got {subset_size} "
            f"in {subsets} subsets; keep it the same in all comparisons."
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        i, j = (torch.randperm(len(x), generator=generator)[:subset_size].to(x.device) for x in (a, b))
        values.append(mmd_squared(a[i], b[j], cubic_kernel).unbiased)
    return MeanSd(float(np.mean(values)), float(np.std(values)))


def cmmd(real: Features, generated: Features) -> MMD:
    """Compare two sets of CLIP embeddings: ``1000 (kxx + kyy - 2 kxy)``, ``k = exp(-|x - y|^2 / 200)``.

    The published code (google-research ``cmmd/distance.py``) averages over all pairs, a row with itself
    included: that is ``biased``, the value to report as CMMD.  It is above 0 for two samples of one
    distribution, by about 1000 (1/n + 1/m) (1 - mean k); ``unbiased`` is not.

    Args:
        real, generated: Embeddings of one CLIP (tensors or arrays), of any length: they are normalised here.

    Reference:
        Jayasumana et al. 2024, Rethinking FID: Towards a better evaluation metric for image generation.

    >>> import numpy as np
    >>> round(cmmd(np.eye(4)[:2], np.eye(4)[2:]).biased, 6)  # 1000 (1 - exp(-2 / 200))
    9.950166
    """
    a, b = two_sets(unit_rows(real), unit_rows(generated))
    value = mmd_squared(a, b, rbf_kernel)
    return MMD(1000 * value.biased, 1000 * value.unbiased)
