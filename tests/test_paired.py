"""Paired statistics: the prompt as unit, closed forms, coverage and false positives in small simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from eval.stats.paired import holm, mean_interval, paired_difference, wilson
from guidance.utils.errors import UserError


def test_seeds_are_averaged_before_anything_else() -> None:
    a, b = [0, 0, 0, 10, 5], [1, 1, 4, 12, 5]
    result = paired_difference(a, b, ["p", "p", "p", "q", "r"], resamples=200)
    assert (result.n_prompts, result.n_images) == (3, 5)
    assert result.mean_diff == pytest.approx((2 + 2 + 0) / 3)
    assert (result.mean_a, result.mean_b) == (pytest.approx(5), pytest.approx(19 / 3))
    assert (result.wins, result.ties, result.losses) == (2, 1, 0)
    assert result.share_improved == pytest.approx(2.5 / 3)
    low, high = wilson(2, 2)  # of the prompts that are no ties
    assert result.share_interval == pytest.approx((0.5 + (low - 0.5) * 2 / 3, 0.5 + (high - 0.5) * 2 / 3))
    assert result.effect_size == pytest.approx(result.mean_diff / np.std(a, ddof=1))


def test_copies_of_seeds_add_no_certainty() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 30))
    once = paired_difference(a, b, range(30), resamples=500)
    eight = paired_difference(np.tile(a, 8), np.tile(b, 8), list(range(30)) * 8, resamples=500)
    assert eight.interval == pytest.approx(once.interval)
    assert eight.wilcoxon_p == pytest.approx(once.wilcoxon_p)
    assert eight.n_prompts == once.n_prompts


def test_agrees_with_scipy_on_one_seed_a_prompt() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 40))
    result = paired_difference(a, b, range(40))
    assert result.wilcoxon_p == pytest.approx(stats.wilcoxon(b - a).pvalue)
    t = stats.ttest_rel(b, a).confidence_interval()
    assert result.interval == pytest.approx((t.low, t.high))
    low, high = paired_difference(a, b, range(40), method="bca").interval
    np.testing.assert_allclose((low, high), (t.low, t.high), atol=0.06)
    assert low < result.mean_diff < high


def test_swapping_the_sides_mirrors_the_result() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 60)) + np.array([[0], [0.5]])
    one = paired_difference(a, b, range(60))
    two = paired_difference(b, a, range(60))
    assert two.mean_diff == pytest.approx(-one.mean_diff)
    np.testing.assert_allclose(np.negative(two.interval[::-1]), one.interval, atol=0.02)
    assert two.share_improved == pytest.approx(1 - one.share_improved)


def test_the_interval_is_a_function_of_the_seed() -> None:
    rng = np.random.default_rng(3)
    a, b, prompts = rng.random(50), rng.random(50), np.arange(50) % 10
    one = paired_difference(a, b, prompts.tolist(), method="bca", resamples=300)
    assert one == paired_difference(a, b, prompts.tolist(), method="bca", resamples=300)
    assert one != paired_difference(a, b, prompts.tolist(), method="bca", resamples=300, seed=1)


@pytest.mark.parametrize("method", ["t", "bca"])
def test_interval_covers_the_truth_as_often_as_promised(method) -> None:
    rng = np.random.default_rng(4)
    runs, n, hits = 300, 30, 0
    for _ in range(runs):
        seed = int(rng.integers(1 << 30))
        low, high = mean_interval(rng.exponential(size=n), method, resamples=399, seed=seed)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / runs <= 0.98  # skewed data; the nominal level is 0.95


def test_false_positives_when_seeds_of_a_prompt_are_alike() -> None:
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(20), 8)
    runs, by_prompt, by_image = 150, 0, 0
    for _ in range(runs):
        b = rng.standard_normal(20)[prompts] + 0.5 * rng.standard_normal(160)
        result = paired_difference(np.zeros(160), b, prompts.tolist(), resamples=99)
        by_prompt += result.wilcoxon_p < 0.05
        by_image += stats.wilcoxon(b).pvalue < 0.05
    assert by_prompt / runs < 0.11
    assert by_image / runs > 0.25  # the mistake this module exists to avoid


def test_equal_sides_give_a_point_and_p_one() -> None:
    a = np.arange(6.0)
    same = paired_difference(a, a, range(6))
    assert (same.interval, same.wilcoxon_p, same.share_improved, same.ties) == ((0, 0), 1.0, 0.5, 6)
    shifted = paired_difference(np.zeros(6), np.ones(6), range(6))
    assert shifted.interval == (1, 1)
    assert np.isnan(shifted.effect_size)  # images of a without any spread


def test_ties_leave_the_share_at_one_half() -> None:
    """Nine ties in ten say little either way: the interval lies within them."""
    deltas = np.r_[np.ones(6), -np.ones(4), np.zeros(90)]
    result = paired_difference(np.zeros(100), deltas, range(100))
    assert result.share_improved == 0.51
    low, high = result.share_interval
    assert 0.45 <= low < 0.5 < 0.51 < high <= 0.55
    decided = wilson(6, 10)
    assert (low - 0.5, high - 0.5) == pytest.approx(((decided[0] - 0.5) / 10, (decided[1] - 0.5) / 10))


def test_rounding_is_no_win() -> None:
    seeds = np.array([0.1, 0.2, 0.3])
    result = paired_difference([*seeds, 1.0], [*seeds[::-1], 1.0], [0, 0, 0, 1])
    assert result.ties == 2


def test_wilson_against_scipy_and_at_the_ends() -> None:
    for k, n in ((0, 5), (5, 5), (37, 80)):
        other = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(wilson(k, n), (other.low, other.high), atol=1e-12)
    low, high = wilson(2.5, 10)
    assert wilson(2, 10)[0] < low < 0.25 < high < wilson(3, 10)[1]
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == 1


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.005]), [0.06, 0.03, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    assert holm([]).shape == (0,)


def test_holm_controls_the_family() -> None:
    p = np.random.default_rng(7).random((4000, 5))
    rate = np.mean([holm(row).min() < 0.05 for row in p])
    assert 0.035 < rate < 0.06


def test_values_that_are_not_finite_and_a_single_prompt_are_refused() -> None:
    values = np.array([1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="finite"):
        paired_difference(values, values * [1, np.nan, 1], [1, 2, 3])
    with pytest.raises(UserError, match="two or more prompts"):
        paired_difference(values, values, [1, 1, 1])
