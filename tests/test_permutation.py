"""Permutation tests: the fast form is the slow one, the level is kept without a difference, pairing is respected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from eval.metrics.feature_sets import unit_rows
from eval.metrics.kernels import cmmd, cubic_kernel, kid, mmd_squared, rbf_kernel
from eval.metrics.precision_recall import precision_recall
from eval.null import NullConfig, permutation_p_values, simulate_features
from eval.stats import permutation
from eval.stats.permutation import mmd_permutation_test, permutation_test
from guidance.utils.errors import UserError

PROMPTS = np.repeat(np.arange(12), 3)
A, B = simulate_features(np.random.default_rng(0), 12, 3, 5)
REAL = np.random.default_rng(1).normal(size=(30, 5))


def full_kid(x: np.ndarray, y: np.ndarray) -> float:
    return kid(x, y, subsets=1, subset_size=len(x)).mean


def swap_rows(a: np.ndarray, b: np.ndarray, prompts, statistic, **options):
    """Test a statistic of features."""
    rows = np.concatenate([a, b])
    return permutation_test(prompts, lambda i, j: statistic(rows[i], rows[j]), **options)


def test_the_fast_form_is_the_slow_one() -> None:
    """Kernel matrices once against the metric itself on every swap: the same statistic and the same p."""
    some = {"permutations": 60, "seed": 3}
    for shift in (0.0, 0.4):
        slow = swap_rows(A + shift, B, PROMPTS, full_kid, **some)
        fast = mmd_permutation_test(A + shift, B, PROMPTS, cubic_kernel, **some)
        assert fast.statistic == pytest.approx(slow.statistic, rel=1e-9) and fast.p == slow.p

    def to_real(x: np.ndarray, y: np.ndarray) -> float:
        a, b = (mmd_squared(torch.tensor(z), torch.tensor(REAL), cubic_kernel).unbiased for z in (x, y))
        return a - b

    slow = swap_rows(A, 0.7 * B, PROMPTS, to_real, two_sided=True, **some)
    fast = mmd_permutation_test(A, 0.7 * B, PROMPTS, cubic_kernel, reference=REAL, **some)
    assert fast.statistic == pytest.approx(slow.statistic, rel=1e-9) and fast.p == slow.p < 0.5


def test_the_fast_form_of_cmmd_is_cmmd() -> None:
    found = mmd_permutation_test(unit_rows(A), unit_rows(B), PROMPTS, rbf_kernel, permutations=9)
    assert 1000 * found.statistic == pytest.approx(cmmd(A, B).unbiased, rel=1e-9)


@pytest.mark.parametrize("reference", [None, REAL])
def test_blocks_and_the_order_of_rows_change_nothing(reference, monkeypatch) -> None:
    def test(rows: np.ndarray):
        return mmd_permutation_test(
            A[rows], 0.7 * B[rows], PROMPTS[rows], cubic_kernel, reference=reference, permutations=30
        )

    whole = test(np.arange(36))
    monkeypatch.setattr(permutation, "BLOCK", 7)
    for rows in (np.arange(36), np.arange(36).reshape(12, 3).T.ravel()):  # prompt by prompt, seed by seed
        parts = test(rows)
        assert parts.statistic == pytest.approx(whole.statistic, rel=1e-9) and parts.p == whole.p


@pytest.mark.parametrize("statistic", ["kid", "kid_to_real"])
def test_without_a_difference_one_in_twenty_is_called_different(statistic: str) -> None:
    """100 comparisons: at most 10 below 5% (97.5% of a right test), p-values uniform; 400 with the script."""
    p = permutation_p_values(NullConfig(sets=20, permutations=99), statistic, 100)
    assert (p <= 0.05).sum() <= 10
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_swapping_every_image_by_itself_is_wrong() -> None:
    """A method's whim on a prompt is in all its seeds: as if they were independent, far too much is different."""
    config = NullConfig(sets=20, permutations=99, unit="image")
    assert (permutation_p_values(config, "kid", 100) <= 0.05).mean() > 0.15


def test_a_difference_is_found_by_any_statistic() -> None:
    for found in (
        mmd_permutation_test(A + 2, B, PROMPTS, cubic_kernel),
        mmd_permutation_test(A + 2, B, PROMPTS, cubic_kernel, reference=REAL),
        swap_rows(
            A + 2,
            B,
            PROMPTS,
            lambda x, y: precision_recall(REAL, x).precision - precision_recall(REAL, y).precision,
            two_sided=True,
            permutations=99,
        ),
    ):
        assert found.p < 0.05


def test_p_counts_the_observed_swap_and_ties() -> None:
    """A statistic that no swap changes has p = 1; one that all swaps lower has 1 / (1 + n)."""
    assert permutation_test(PROMPTS, lambda i, j: 1.0, permutations=19).p == 1
    assert mmd_permutation_test(A, A, PROMPTS, cubic_kernel, permutations=19).p == 1
    largest = permutation_test(PROMPTS, lambda i, j: float((i < 36).all()), permutations=19)
    assert largest.p == pytest.approx(1 / 20)
    # a distance is the same if everything is swapped: of 64 swaps of six prompts two are as large
    six = mmd_permutation_test(A[:18] + 9, B[:18], PROMPTS[:18], cubic_kernel, permutations=4000)
    assert six.p == pytest.approx(2 / 64, abs=0.01)


def test_seeds_decide_and_pairs_of_a_prompt_go_together() -> None:
    first, second = (swap_rows(A, B, PROMPTS, full_kid, permutations=30, seed=4) for _ in range(2))
    assert first == second
    prompts = [f"prompt {i}" for i in PROMPTS]

    def together(i: np.ndarray, j: np.ndarray) -> float:
        from_a = (i < 36).reshape(12, 3)
        assert (from_a == from_a[:, :1]).all() and ((j < 36) == ~from_a.ravel()).all()
        assert (i % 36 == np.arange(36)).all() and (j % 36 == np.arange(36)).all()
        return float(from_a.sum())

    permutation_test(prompts, together, permutations=30)


def test_too_few_prompts_or_permutations_are_refused() -> None:
    with pytest.raises(UserError, match="6 or more prompts"):
        permutation_test(PROMPTS[:15], lambda i, j: 0.0)
    with pytest.raises(UserError, match="6 or more prompts"):
        mmd_permutation_test(A[:15], B[:15], PROMPTS[:15], cubic_kernel)
    with pytest.raises(UserError, match="permutations from 1"):
        permutation_test(PROMPTS, lambda i, j: 0.0, permutations=0)
