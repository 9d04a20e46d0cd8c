"""The study of levels: right statistics stay at their level, wrong ones are seen, the simulation is what it says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from eval import null
from eval.null import KINDS, NullConfig, check_holm, check_paired, compare, main, simulate_values
from eval.stats.paired import paired_difference

N = 200  # comparisons; fixed seeds, and ranges so wide that a right test leaves them once in 10,000 draws of a seed
LOW, HIGH = (int(k) for k in stats.binom.ppf([5e-5, 1 - 5e-5], N, 0.05))


def false_positives(config: NullConfig, kind: str) -> tuple[int, int, int]:
    found = list(compare(config, kind, 100, 0.0))
    return (
        sum(not r.interval[0] <= 0 <= r.interval[1] for r in found),
        sum(r.wilcoxon_p < 0.05 for r in found),
        sum(not r.share_interval[0] <= 0.5 <= r.share_interval[1] for r in found),
    )


@pytest.mark.parametrize("kind", ["normal", "swapped"])
def test_right_statistics_keep_their_level(kind: str) -> None:
    config = NullConfig(comparisons=N)
    assert all(LOW <= hits <= HIGH for hits in false_positives(config, kind))


@pytest.mark.parametrize("kind", ["normal", "agreement"])
def test_seeds_as_if_independent_are_caught(kind: str) -> None:
    config = NullConfig(comparisons=N, unit="image")
    assert min(false_positives(config, kind)[:2]) > HIGH


def test_a_biased_interval_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too narrow by a third: the table marks both the false positives and the coverage."""
    from eval.stats import paired

    right = paired.mean_interval

    def narrow(values: np.ndarray, *method: str, **options: object) -> tuple[float, float]:
        low, high = right(values, *method, **options)  # type: ignore[arg-type]
        return (5 * low + high) / 6, (low + 5 * high) / 6

    monkeypatch.setattr(paired, "mean_interval", narrow)
    (row,) = check_paired(NullConfig(comparisons=N, kinds=["normal"], prompts=[100]))
    assert row["interval without 0"].endswith("!") and row["effect in the interval"].endswith("!")


@pytest.mark.parametrize("kind", KINDS)
def test_the_planted_effect_is_the_mean(kind: str) -> None:
    """And without one there is none; agreement is right for half of the baseline's images."""
    rng = np.random.default_rng(0)
    for effect in (0.0, 0.2):
        a, b = simulate_values(rng, kind, 40_000, 4, effect)
        assert (b - a).mean() == pytest.approx(effect, abs=0.04)
        assert a.mean() == pytest.approx(0.5 if kind == "agreement" else 0.0, abs=0.04)
    delta = np.subtract(*simulate_values(rng, kind, 40_000, 4)[::-1]).reshape(-1, 4).mean(1)
    assert stats.skew(delta) == pytest.approx(1.43 if kind == "skewed" else 0.0, abs=0.1)


def test_seeds_of_a_prompt_agree() -> None:
    """Half of a delta's variance is the prompt's: seeds are no independent samples."""
    a, b = simulate_values(np.random.default_rng(1), "normal", 20_000, 2)
    first, second = (b - a).reshape(-1, 2).T
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0.5, abs=0.03)


def test_holm_leaves_few_families() -> None:
    (row,) = check_holm(NullConfig(comparisons=60, kinds=["normal", "skewed"], prompts=[30]))
    share, raw = (float(row[key].rstrip("% !")) for key in (f"any of {null.SCALES} scales, Holm", "uncorrected"))
    assert share <= raw and share < 18 and row["values"] == "normal"


def test_the_statistics_are_those_of_a_comparison() -> None:
    """A cell of the table is `paired_difference` on simulated images: nothing is reimplemented."""
    config = NullConfig(comparisons=2, resamples=99, seeds=3)
    rng = np.random.default_rng([0, 0, 10, False])
    for i, found in enumerate(compare(config, "normal", 10, 0.0)):
        a, b = simulate_values(rng, "normal", 10, 3)
        assert found == paired_difference(a, b, np.repeat(np.arange(10), 3).tolist(), seed=i, resamples=99)


def test_the_script_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["comparisons=2", "prompts=[8]", "resamples=49", "sets=8", "permutations=9"]
    assert main([*words, f"statistics=[{','.join(null.TESTS)}]"]) == 0
    out = capsys.readouterr().out
    assert out.count("| agreement |") == 2 and "| fd_to_real |" in out and "coverage 93 to 97%" in out


@pytest.mark.parametrize("word", ["statistics=[kld]", "unit=seed", "effect=2", "comparisons=0"])
def test_what_cannot_be_simulated_is_refused(word: str) -> None:
    with pytest.raises(SystemExit):
        main([word])
