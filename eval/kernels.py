"""Kernels on features and the maximum mean discrepancy (MMD) of two sets under them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Kernel = Callable[[Float[Tensor, "n d"], Float[Tensor, "m d"]], Float[Tensor, "n m"]]
BLOCK = 1024  # rows of a kernel matrix held at once


@dataclasses.dataclass(frozen=True)
class MMD:
    """Two estimates of one squared discrepancy.

    Attributes:
        biased: The V-statistic, pairs of a row with itself included: never negative, above 0 for unequal samples
            of one distribution.
        unbiased: The U-statistic without those pairs: 0 on average for one distribution, so it can be negative.
    """

    biased: float
    unbiased: float


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
        kernel: Of two sets, all pairs.

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
