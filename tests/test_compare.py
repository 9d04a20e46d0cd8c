"""Comparisons: differences, Holm, caveats, metrics an image and metrics a set, on data whose answer is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from eval.comparison import set_metrics as sets
from eval.comparison.arms import ArmImage, Arms
from eval.comparison.compare import breakdowns, caveats, deltas, table_rows, units
from eval.comparison.image_metrics import Measured
from eval.comparison.results import ImageMetric, SetValue
from eval.features.reference import Reference
from eval.metrics.frechet import frechet_distance, moments
from eval.metrics.precision_recall import precision_recall
from eval.stats.paired import paired_difference
from eval.stats.permutation import permutation_test
from guidance.utils.errors import UserError

RNG = np.random.default_rng(0)


def make_arms(prompts: list[str], names=("unguided", "guided"), seeds: int = 1, categories=None) -> Arms:
    rows = [
        ArmImage(None, f"{i}{s}", p, p, categories[i] if categories else "", "", s)  # type: ignore[arg-type]
        for i, p in enumerate(prompts)
        for s in range(seeds)
    ]
    return Arms(names[0], {name: rows for name in names}, True, {}, {})


def measured(values: dict[str, np.ndarray], key: str = "score", **options) -> Measured:
    return Measured(ImageMetric(key, key, "higher", **options), values)


def test_differences_are_those_of_the_paired_statistics_and_holm_runs_over_arms() -> None:
    arms = make_arms([f"p{i}" for i in range(30)], names=("unguided", "a", "b"), seeds=2)
    base = RNG.normal(size=60)
    m = measured({"unguided": base, "a": base + 1 + RNG.normal(size=60), "b": base + 0.2 * RNG.normal(size=60)})
    a, b = deltas([m], arms)
    assert a.paired == paired_difference(base, m.values["a"], units(arms))
    assert a.paired.n_prompts == 30
    p = sorted([a.paired.wilcoxon_p, b.paired.wilcoxon_p])
    assert sorted([a.p_holm, b.p_holm]) == pytest.approx([min(1, 2 * p[0]), max(min(1, 2 * p[0]), p[1])])


def test_images_without_a_value_are_left_out_on_both_sides_and_counted() -> None:
    arms = make_arms([f"p{i}" for i in range(20)])
    base, guided = np.zeros(20), np.ones(20)
    base[3], guided[5] = np.nan, np.nan
    (d,) = deltas([measured({"unguided": base, "guided": guided})], arms)
    assert d.excluded == 2 and d.paired.n_images == 18 and d.paired.mean_diff == 1
    rows = table_rows([measured({"unguided": base, "guided": guided})], arms)
    assert rows[3]["score"] is None and rows[4]["score"] == 0 and len(rows) == 40
    base[:] = np.nan
    with pytest.raises(UserError, match="to have a value for two or more prompts"):
        deltas([measured({"unguided": base, "guided": guided})], arms)


def test_of_one_prompt_the_seed_is_the_unit() -> None:
    arms = make_arms([""], seeds=25)
    assert len(set(units(arms))) == 25
    (d,) = deltas([measured({"unguided": np.zeros(25), "guided": RNG.normal(3, 1, 25)})], arms)
    assert d.paired.n_prompts == 25
    kinds = [c.kind for c in caveats(arms, [], [d], widths={}, reference_size=None)]
    assert "prompts" in kinds


def test_parts_are_compared_where_they_are_large_enough() -> None:
    arms = make_arms([f"p{i}" for i in range(24)], categories=["animals"] * 12 + ["plants"] * 9 + ["rare"] * 3)
    gain = np.r_[np.ones(12), -np.ones(12)]
    found = breakdowns([measured({"unguided": np.zeros(24), "guided": gain})], arms)
    assert {(b.value, b.difference, b.n_prompts) for b in found} == {("animals", 1, 12), ("plants", -1, 9)}


def test_caveats_name_what_is_wrong_and_only_that() -> None:
    arms = make_arms([f"p{i}" for i in range(40)])
    quiet = measured({"unguided": np.zeros(40), "guided": np.zeros(40)}, "saturation")
    assert not caveats(arms, [quiet], deltas([quiet], arms), widths={"FD-x": 16}, reference_size=100)
    base = RNG.normal(0.3, 0.05, 40)
    loud = measured({"unguided": base, "guided": base + 0.1}, "saturation", circular=("guided",))
    same = measured({"unguided": base, "guided": 0.5 * base}, "diversity")
    told = caveats(
        dataclasses.replace(arms, audited=False, excluded={"gone": ["'p', seed 1"]}, converted={"mode L": 2}),
        [loud, same],
        deltas([loud, same], arms),
        widths={"FD-x": 21},
        reference_size=1000,
        truncated=["a long prompt"],
    )
    kinds = [c.kind for c in told]
    wanted = ["unpaired", "excluded", "converted", "truncated", "circular", "biased", "saturation", "diversity"]
    assert kinds == wanted
    assert "42 images or more" in told[5].text


@pytest.fixture(scope="module")
def features() -> dict[str, np.ndarray]:
    base = RNG.normal(size=(90, 5))
    return {"unguided": base, "better": 0.4 * base, "same": base[RNG.permutation(90)]}


def reference_of(real: np.ndarray) -> Reference:
    return Reference("real", len(real), real, *moments(real))


def compute(key: str, data: sets.SetData, prompts: list[str], permutations: int = 99) -> dict[str, SetValue]:
    """Arm -> value of a registered set metric."""
    (measure,) = [m for m in sets.SET_METRICS if m.key == key]
    values = sets.set_values(key, measure.statistic(data), prompts, range(len(prompts)), permutations)
    return {value.arm: value for value in values}


def test_set_metrics_have_the_values_of_their_functions_and_tests_that_see_a_difference(features) -> None:
    real = 0.4 * RNG.normal(size=(200, 5))
    prompts = [f"p{i}" for i in range(90)]
    data = sets.SetData(features, reference_of(real))
    found = {key: compute(key, data, prompts) for key in ("fd", "kd", "precision", "recall")}
    away = {arm: x - 3 for arm, x in features.items()}
    found["cmmd"] = compute("cmmd", sets.SetData(away, reference_of(real - 3)), prompts)
    shares = {arm: np.exp(x) / np.exp(x).sum(1, keepdims=True) for arm, x in features.items()}
    found["inception_score"] = compute("inception_score", sets.SetData(shares), prompts)
    assert found.keys() == {m.key for m in sets.SET_METRICS}
    fd, recall = found["fd"], found["recall"]
    assert fd["unguided"].value == pytest.approx(frechet_distance(*moments(real), *moments(features["unguided"])))
    assert recall["better"].value == precision_recall(real, features["better"]).recall
    assert found["precision"]["better"].value == precision_recall(real, features["better"]).precision
    for key, arms in found.items():
        assert arms["unguided"].p is None and arms["unguided"].difference is None
        assert arms["better"].p_holm is not None and arms["better"].p_holm >= arms["better"].p
        assert len(arms["better"].blocks) == 3
        assert arms["better"].difference == pytest.approx(arms["better"].value - arms["unguided"].value), key
    for key in ("fd", "kd", "precision"):
        assert found[key]["better"].p == 0.01, key
    assert fd["same"].difference == pytest.approx(0, abs=1e-9) and fd["same"].p > 0.5


def test_p_of_recall_is_that_of_a_test_that_computes_everything_anew(features) -> None:
    real, prompts = 0.4 * RNG.normal(size=(60, 5)), [f"p{i // 2}" for i in range(90)]
    rows = {"unguided": features["unguided"], "better": features["better"]}
    both = np.concatenate(list(rows.values()))
    slow = permutation_test(
        prompts,
        lambda i, j: precision_recall(real, both[j]).recall - precision_recall(real, both[i]).recall,
        two_sided=True,
        permutations=60,
    )
    quick = compute("recall", sets.SetData(rows, reference_of(real)), prompts, permutations=60)
    assert quick["better"].p == slow.p


def test_wide_features_are_measured_and_not_tested() -> None:
    rows = {"unguided": RNG.normal(size=(20, 300)), "guided": RNG.normal(size=(20, 300))}
    data = sets.SetData(rows, reference_of(RNG.normal(size=(30, 300))))
    value = compute("fd", data, [f"p{i}" for i in range(20)])["guided"]
    assert value.p is None and value.p_holm is None and value.difference is not None


def test_blocks_are_of_seeds_where_there_are_enough_of_them() -> None:
    by_prompt = sets.list_blocks([f"p{i}" for i in range(12)], range(12))
    assert [rows.tolist() for rows in by_prompt] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert sets.list_blocks(["a", "b", "c", "d"], range(4)) == []
