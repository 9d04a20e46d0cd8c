"""Kernel distance (KID): unbiased MMD under a cubic kernel, over seeded subsets.

"KID" is the distance on the real Inception's features only; else it is named "KD-<features>".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from eval.feature_sets import Features, FeatureSets, MeanSd, sorted_rows, two_sets
from eval.kernels import cubic_kernel, mmd_squared
from guidance.errors import UserError


def kid(
    real: Features, generated: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> MeanSd:
    """Estimate the squared MMD with kernel ``(x.y / d + 1)^3``, without bias.

    Each subset takes ``subset_size`` rows of either set, without replacement.  Subsets overlap, so the standard
    deviation over them is no standard error; compare two methods with `eval.permutation`.

    Args:
        real, generated: Features (tensors or arrays); the order of rows does not matter.
        subsets: How many are drawn.
        subset_size: Rows of each; the number of rows of equal sets, with ``subsets=1``, takes all pairs once.
        seed: Of the draws.

    Returns:
        Mean and standard deviation over subsets; 0 on average for samples of one distribution, hence also
        negative.  Often shown times 1000.

    Raises:
        UserError: If widths differ, a value is not finite, a set is constant or smaller than a subset.

    Reference:
        Binkowski et al. 2018, Demystifying MMD GANs.

    >>> x = torch.arange(6.0)[:, None]
    >>> round(kid(x, x + 4, subsets=1, subset_size=6).mean, 6)
    79010.366667
    """
    if subsets < 1 or subset_size < 2:
        raise UserError(f"Expected subsets from 1 of size from 2, got {subsets} of {subset_size}.")
    a, b = two_sets(real, generated)
    if min(len(a), len(b)) < subset_size:
        raise UserError(
            f"Expected {subset_size} or more rows in each set, the size of a subset, got {len(a)} and {len(b)}; "
            "pass a smaller subset_size, the same in all comparisons."
        )
    a, b = sorted_rows(a), sorted_rows(b)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        i, j = (torch.randperm(len(x), generator=generator)[:subset_size].to(x.device) for x in (a, b))
        values.append(mmd_squared(a[i], b[j], cubic_kernel).unbiased)
    return MeanSd(float(np.mean(values)), float(np.std(values)))


class KernelDistance(FeatureSets):
    """`kid` of streamed features: `compute` gives ``mean`` and ``sd``.

    Args:
        subsets, subset_size, seed: As of `kid`.
        **kwargs: ``features`` and ``reset_real`` of `FeatureSets`, and what `torchmetrics.Metric` takes.

    >>> metric = KernelDistance(subsets=1, subset_size=6, features="judge")
    >>> metric.update(torch.arange(6.0)[:, None], real=True)
    >>> metric.update(torch.arange(4.0, 10.0)[:, None], real=False)
    >>> metric.name, round(float(metric.compute()["mean"]), 6)
    ('KD-judge', 79010.366667)
    """

    higher_is_better = False
    short = "KD"

    def __init__(self, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"subsets": subsets, "subset_size": subset_size, "seed": seed}

    def measure(self, real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"]) -> MeanSd:
        """Return `kid` of the two sides."""
        return kid(real, generated, **self.options)
