"""Permutation tests of set metrics: are two methods' sets of images different, on the same prompts and noise?

A set metric (Frechet or kernel distance, CMMD, precision, recall) has no value an image, so `eval.stats.paired` does
not apply.  Under the null hypothesis it does not matter which method is called a: the labels are swapped within pairs,
all pairs of a prompt together, because the prompt is the unit.  ``p = (1 + k) / (1 + n)``, where k of n random swaps
have a statistic at least as large as the observed one.

    rows = np.concatenate([a, b])
    permutation_test(prompts, lambda i, j: recall(rows[i]) - recall(rows[j]), two_sided=True)
    mmd_permutation_test(a, b, prompts, cubic_kernel, reference=real)    # KID of a less that of b, fast

``python -m eval.null`` counts how many of 400 comparisons without a difference these tests call different at 5%.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eval.metrics.feature_sets import Features, two_sets
from eval.metrics.kernels import BLOCK, Kernel, mmd_squared
from eval.stats.paired import prompt_numbers
from guidance.utils.errors import UserError

#: A distance is the same if all labels are swapped: with fewer prompts no p could be below 2 / 2^prompts < 5%.
MIN_PROMPTS = 6

Index = Int[np.ndarray, " n"]


class PermutationResult(NamedTuple):
    """Result of a permutation test."""

    statistic: float  # for the sets as they are
    p: float  # share of swaps, this one included, with a statistic at least as large


def permutation_test(
    prompts: Sequence[Hashable],
    statistic: Callable[[Index, Index], float],
    *,
    two_sided: bool = False,
    permutations: int = 999,
    seed: int = 0,
) -> PermutationResult:
    """Test any statistic of two paired sets; it is evaluated anew for each swap.

    Args:
        prompts: The prompt (or its id) of each of n pairs.
        statistic: Of two sets, given by the indices of their rows: 0 to n - 1 are the rows of method a, n to 2n - 1
            those of method b, pair by pair.  Larger means more different.
        two_sided: Compare absolute values: for the difference of two distances to a reference.
        permutations: Number of random swaps.
        seed: Of the swaps.

    Raises:
        UserError: If there are fewer than six prompts.

    Reference:
        Phipson and Smyth 2010, Permutation p-values should never be zero.
    """
    group, swaps = _draw_swaps(prompts, permutations, seed)
    a, b = np.arange(len(group)), np.arange(len(group), 2 * len(group))
    observed = float(statistic(a, b))
    swapped = (swap[group] for swap in swaps)
    values = np.array([float(statistic(np.where(s, b, a), np.where(s, a, b))) for s in swapped])
    return PermutationResult(observed, _p_value(observed, values, two_sided))


def mmd_permutation_test(
    a: Features,
    b: Features,
    prompts: Sequence[Hashable],
    kernel: Kernel,
    *,
    reference: Features | None = None,
    permutations: int = 999,
    seed: int = 0,
) -> PermutationResult:
    """Test the unbiased MMD between two paired sets, or the difference of their MMDs to a reference, two-sided.

    The kernel matrix is computed once.  With signs s = 1 (as it is) or -1 (swapped) of the prompts, the MMD
    between the sets is ``const + c s^T D s``, where D sums ``k(a,a') + k(b,b') - k(a,b') - k(b,a')`` over the
    images of two prompts; the difference of MMDs to a reference is linear, ``s^T d``.  All swaps are one matrix
    product.

    Args:
        a, b: Features of the two methods, row by row of the same prompt, seed and noise; for CMMD, their `unit_rows`.
        prompts, permutations, seed: As for `permutation_test`.
        kernel: `cubic_kernel` for KID (on all rows), `rbf_kernel` for CMMD (unbiased, not times 1000).
        reference: Features of real images; the statistic is ``MMD(a, reference) - MMD(b, reference)``.

    Raises:
        UserError: If there are fewer than six prompts, shapes differ, or a set is constant or not finite.
    """
    x, y = two_sets(a, b)
    assert x.shape == y.shape == (len(prompts), x.shape[1]), "expected a row of each method for each prompt"
    numbers, swaps = _draw_swaps(prompts, permutations, seed)
    group, signs, n = torch.as_tensor(numbers, device=x.device), torch.as_tensor(1 - 2.0 * swaps).to(x), len(x)
    if reference is None:
        d = _swap_matrix(x, y, group, kernel)
        observed = mmd_squared(x, y, kernel).unbiased
        c = 1 / (2 * n * (n - 1)) + 1 / (2 * n**2)
        values = observed + c * (((signs @ d) * signs).sum(1) - d.sum())
    else:
        share = _swap_shares(x, y, two_sets(reference, x)[0], kernel)
        by_prompt = share.new_zeros(signs.shape[1]).index_add(0, group, share)
        observed, values = float(by_prompt.sum()), signs @ by_prompt
    return PermutationResult(observed, _p_value(observed, values.cpu().numpy(), two_sided=reference is not None))


def _swap_matrix(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], group: Int[Tensor, " n"], kernel: Kernel
) -> Float[Tensor, "prompts prompts"]:
    prompts = int(group.max()) + 1
    d = x.new_zeros(prompts, prompts)
    for u, v, part in zip(x.split(BLOCK), y.split(BLOCK), group.split(BLOCK), strict=True):
        k = kernel(u, x) + kernel(v, y) - kernel(u, y) - kernel(v, x)
        d.index_add_(0, part, k.new_zeros(len(k), prompts).index_add(1, group, k))
    return d


def _swap_shares(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], real: Float[Tensor, "m d"], kernel: Kernel
) -> Float[Tensor, " n"]:
    """Return what each pair adds to ``MMD(x, real) - MMD(y, real)``; swapped, it adds the negative of it."""
    n, m = len(x), len(real)

    def shares(z: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        parts = []
        for part in z.split(BLOCK):
            both = kernel(part, x).sum(1) + kernel(part, y).sum(1) - kernel(part, part).diagonal()
            parts.append(both / (n * (n - 1)) - 2 * kernel(part, real).sum(1) / (n * m))
        return torch.cat(parts)

    return shares(x) - shares(y)


def _draw_swaps(
    prompts: Sequence[Hashable], permutations: int, seed: int
) -> tuple[Index, Bool[np.ndarray, "permutations prompts"]]:
    """Number the prompts of pairs, and draw which prompts every permutation swaps."""
    if (number := len(set(prompts))) < MIN_PROMPTS:
        few = "with fewer no result could be significant at 5%"
        raise UserError(f"Expected {MIN_PROMPTS} or more prompts, the units, got {number}; {few}.")
    if permutations < 1:
        raise UserError(f"Expected a number of permutations from 1, got {permutations}.")
    return prompt_numbers(prompts), np.random.default_rng(seed).random((permutations, number)) < 0.5


def _p_value(observed: float, values: Float[np.ndarray, " n"], two_sided: bool) -> float:
    if two_sided:
        observed, values = abs(observed), np.abs(values)
    # the same swap summed in another order must count as equal
    rounding = 1e-9 * max(abs(observed), float(np.abs(values).max()))
    return float((1 + (values >= observed - rounding).sum()) / (1 + len(values)))
