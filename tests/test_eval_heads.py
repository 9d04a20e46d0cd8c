"""Measuring saved heads: areas and intervals against formulas, then the script for real on every task."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from eval.heads import tables as head_tables
from eval.heads.__main__ import main
from eval.heads.intervals import head_intervals
from eval.heads.tables import reliability
from eval.stats.paired import wilson
from guidance.data.cache import FeatureCache
from guidance.heads import load_head, save_head
from guidance.heads.config import HeadConfig
from guidance.heads.measures import mean_auc, rank_correlation
from guidance.heads.tasks import get_task
from guidance.training import caching
from guidance.training import metrics as head_metrics
from guidance.training import report as head_report
from guidance.training.discriminator import open_generated
from guidance.training.metrics import evaluate_head
from guidance.utils.errors import UserError
from train.head import main as train

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = HeadConfig("conv", 4, outputs=4, task="class", labels=list("abcd"))
BINARY = HeadConfig("conv", 4, outputs=1, task="binary", target="real", labels=[])
TARGETS = {"rating": "rating", "class": "bright", "regression": "score", "embedding": "clip:testbed"}
TASKS = (*TARGETS, "binary")


# --- mathematics


def mann_whitney(score: np.ndarray, positive: np.ndarray) -> float:
    """The share of (positive, negative) pairs in the right order, ties half: the definition of the area."""
    difference = score[positive][:, None] - score[~positive][None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def noisy_classes(n: int = 300, absent: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in steps of one half, so that there are ties, of a head that knows something."""
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 3 if absent else 4, (n,), generator=g)
    logits = torch.randn(n, 4, generator=g) + torch.nn.functional.one_hot(index, 4)
    return (2 * logits).round() / 2, index


@pytest.mark.parametrize("absent", [False, True])
def test_auc_of_classes_is_the_mean_of_one_against_the_rest(absent: bool) -> None:
    logits, index = noisy_classes(absent=absent)
    p = logits.double().softmax(1).numpy()
    areas = [mann_whitney(p[:, k], index.numpy() == k) for k in range(3 if absent else 4)]
    overall = evaluate_head(logits, index, torch.zeros(300), CLASSES)["overall"]
    assert overall["auc"] == pytest.approx(np.mean(areas), abs=1e-6) and 0.6 < overall["auc"] < 0.9
    alone = evaluate_head(logits, torch.zeros(300).long(), torch.zeros(300), CLASSES)["overall"]
    assert alone["auc"] == 0.5


def examples(config: HeadConfig) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    if config.task == "class":
        return noisy_classes()
    y = torch.randint(0, 2, (300,), generator=g)
    if config.task == "binary":
        return y[:, None] + torch.randn(300, 1, generator=g), y
    if config.task == "regression":
        x = torch.randn(300, 1, generator=g)
        return x + torch.randn(300, 1, generator=g), x
    rating = torch.randint(0, 10, (300,), generator=g)
    target = torch.nn.functional.one_hot(rating, 10).float()
    return 2 * target + torch.randn(300, 10, generator=g), target


@pytest.mark.parametrize("task", ["rating", "class", "regression", "binary"])
def test_the_bootstrapped_functions_give_the_measures_themselves(task: str) -> None:
    plain = HeadConfig("conv", 4, outputs=1, task="regression", target="x", labels=[])
    config = {"class": CLASSES, "binary": BINARY, "regression": plain}.get(task, HeadConfig("conv", 4))
    outputs, target = examples(config)
    overall = evaluate_head(outputs, target, torch.zeros(300), config)["overall"]
    rows = get_task(task).by_row(outputs, target)
    for name, statistic in get_task(task).statistics(*rows).items():
        assert float(statistic.value(statistic.addends.sum(0))) == pytest.approx(overall[name], abs=1e-5)
        low, high = head_intervals(outputs, target, torch.zeros(300), config, np.arange(300))["overall"][
            f"{name}_interval"
        ]
        assert low < overall[name] < high and high - low < 0.4


def test_intervals_agree_with_a_bootstrap_that_ranks_anew() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=250)
    y, positive = x + rng.normal(size=250), rng.random(250) < 1 / (1 + np.exp(-x - 1.5))
    rows = [rng.integers(0, 250, 250) for _ in range(600)]
    for statistic, brute in (
        (rank_correlation(x, y), [spearmanr(x[r], y[r]).statistic for r in rows]),
        (mean_auc([(x, positive)]), [mann_whitney(x[r], positive[r]) for r in rows]),
    ):
        counts = rng.multinomial(250, np.full(250, 1 / 250), 2000)
        ours = np.quantile(statistic.value(counts @ statistic.addends), [0.025, 0.975])
        np.testing.assert_allclose(ours, np.quantile(brute, [0.025, 0.975]), atol=0.012)


def test_draws_of_an_image_are_no_further_evidence() -> None:
    def width(repeats: int, image: np.ndarray, name: str) -> float:
        outputs, target = (x.repeat_interleave(repeats, 0) for x in examples(HeadConfig("conv", 4)))
        t = torch.zeros(300 * repeats)
        found = head_intervals(outputs, target, t, HeadConfig("conv", 4), image)
        low, high = found["overall"][f"{name}_interval"]
        assert found["bins"][0][f"{name}_interval"] == [low, high]
        return high - low

    for name in ("accuracy", "spearman", "nll"):
        once = width(1, np.arange(300), name)
        assert width(4, np.arange(1200) // 4, name) == pytest.approx(once, rel=1e-3)
        assert width(4, np.arange(1200), name) == pytest.approx(once / 2, rel=0.15)


def test_reliability_adds_up_to_the_calibration_error() -> None:
    logits, index = noisy_classes()
    bins = reliability(3 * logits, index)
    error = sum(b["rows"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / 300
    ece = evaluate_head(3 * logits, index, torch.zeros(300), CLASSES)["overall"]["ece"]
    assert error == pytest.approx(ece, abs=1e-5) and ece > 0.05 and sum(b["rows"] for b in bins) == 300


# --- the script


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("heads to measure")


@pytest.fixture(scope="module")
def data(tiny_folder, folder) -> list[str]:
    """Options of 100 rated pictures: the redder the better."""
    rng = np.random.default_rng(0)
    ratings = rng.integers(1, 11, 100)
    pixels = rng.normal(128, 4, (100, 64, 64, 3))
    pixels[..., 0] = 25 * ratings[:, None, None]
    table = {
        "image": [Image.fromarray(image) for image in np.clip(pixels, 0, 255).astype(np.uint8)],
        "caption": ["a picture"] * 100,
        "rating": ratings.tolist(),
        "score": (ratings * 30.0 - 100).tolist(),
        "bright": ["yes" if r > 5 else "no" for r in ratings],
        "split": ["train"] * 40 + ["validation"] * 20 + ["test"] * 40,
    }
    datasets.Dataset.from_dict(table).to_parquet(folder / "rated.parquet")
    return [f"data.dataset={folder / 'rated.parquet'}", "data.device=cpu", "data.draws=2"]


@pytest.fixture(scope="module")
def heads(tiny_folder, data, folder) -> dict[str, Path]:
    """A head of every task, trained for an epoch on one cache, without the plots, which take long."""
    shared = [*data, f"data.model={tiny_folder}", f"cache={folder / 'cache'}", "hidden=8", "epochs=1", "compare=[]"]
    shared += ["data.target_columns=[rating,score,bright,clip:testbed]", "batch_size=20", "lr=0.01"]
    generated = [f"generated.folder={folder / 'generated'}", "generated.num_steps=1", "generated.test=30"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_report, "plot_metrics", lambda *args, **kwargs: None)
        for task, target in TARGETS.items():
            train([*shared, f"task={task}", f"target={target}", f"output={folder / task}"])
        train([*shared, *generated, "task=binary", "target=real", f"output={folder / 'binary'}"])
    return {task: folder / task for task in TASKS}


@pytest.fixture
def no_plots(monkeypatch) -> None:
    monkeypatch.setattr(head_metrics, "plot_metrics", lambda *args, **kwargs: None)
    monkeypatch.setattr(head_tables, "plot_reliability", lambda *args: None)


def measured(words: list[str], output: Path) -> dict:
    assert main([*words, f"output={output}"]) == 0
    return json.loads((output / "metrics.json").read_text())["heads"]


@pytest.mark.parametrize("task", TASKS)
def test_the_numbers_are_those_of_the_training(task: str, heads, folder, tmp_path, capsys) -> None:
    words = [str(heads[task]), f"cache={folder / 'cache'}", f"generated={folder / 'generated'}"]
    found = measured(words, tmp_path)[task]
    trained = json.loads((heads[task] / "metrics.json").read_text())["test"]
    for ours, theirs in zip([found["overall"], *found["bins"]], [trained["overall"], *trained["bins"]], strict=True):
        assert {key: ours[key] for key in theirs} == theirs
        intervals = {k.removesuffix("_interval"): v for k, v in ours.items() if k.endswith("_interval")}
        assert intervals and all(low - 1e-6 <= ours[name] <= high + 1e-6 for name, (low, high) in intervals.items())
    wanted = {
        "rating": {"accuracy", "ece", "ece_uncalibrated", "spearman", "nll"},
        "class": {"accuracy", "ece", "ece_uncalibrated", "auc", "nll"},
        "regression": {"spearman", "mae"},
        "embedding": {"cosine", "retrieval"},
        "binary": {"accuracy", "ece", "ece_uncalibrated", "auc", "nll"},
    }[task]
    assert wanted | {"skill", "rows"} <= found["overall"].keys()
    images = 30 if task == "binary" else 40
    assert found["overall"]["rows"] == (120 if task == "binary" else 80)
    if "accuracy" in found["overall"]:  # two draws, or two kinds, of an image are one image
        share = found["overall"]["accuracy"]
        assert found["overall"]["accuracy_interval"] == pytest.approx(wilson(share * images, images))
    assert sum(entry["rows"] for entry in found["bins"]) > 0.8 * found["overall"]["rows"]
    assert (tmp_path / "reliability.png").exists() == (task in ("rating", "class", "binary"))
    assert Image.open(tmp_path / "metrics.png").width > 600 and not list(tmp_path.glob(".*"))
    output = capsys.readouterr()
    assert output.out.count(f"\n| {found['bins'][0]['low']}-{found['bins'][0]['high']} | ") == 1
    assert f"measure {task}: 100%" in output.err


@pytest.mark.usefixtures("no_plots")
def test_bins_share_out_all_rows(heads, folder, tmp_path) -> None:
    found = measured([str(heads["rating"]), f"cache={folder / 'cache'}"], tmp_path)["rating"]
    t = FeatureCache(folder / "cache", "test").column("t")
    counts = np.histogram(t, bins=np.arange(0, 1001, 100))[0]
    assert [b["rows"] for b in found["bins"]] == [n for n in counts if n > 3]
    both = [[b["rows"] for b in bins] for bins in found["reliability"].values()]
    assert len(both) == 2 and all(sum(rows) == 80 for rows in both)


@pytest.mark.usefixtures("no_plots")
def test_calibration_with_and_without_temperatures(heads, folder, tmp_path) -> None:
    head = load_head(heads["class"])
    ece = {}
    for name, temperature in (("cold", [0.1] * 10), ("plain", [])):
        head.config.temperature = temperature
        save_head(head, tmp_path / name)
        found = measured([str(tmp_path / name), f"cache={folder / 'cache'}"], tmp_path / "out")[name]
        ece[name] = (found["overall"]["ece"], found["overall"]["ece_uncalibrated"])
        assert len(found["reliability"]) == (2 if temperature else 1)
    h, t = FeatureCache(folder / "cache", "test").read(range(80))
    confidence, chosen = (10 * head(h, t)).softmax(1).max(1)
    names = np.array(head.config.labels)[chosen]
    right = names == FeatureCache(folder / "cache", "test").column("bright")
    bins = np.ceil(confidence.numpy() * 15)
    by_hand = sum(abs((right - confidence.numpy())[bins == k].sum()) for k in np.unique(bins)) / 80
    assert ece["cold"][0] == pytest.approx(by_hand, abs=1e-4)
    assert ece["cold"][1] == ece["plain"][0] == ece["plain"][1] and abs(ece["cold"][0] - ece["cold"][1]) > 0.01


def test_two_heads_in_one_table_from_features_on_the_fly(heads, data, folder, tmp_path, capsys) -> None:
    words = [str(heads["rating"]), str(heads["class"]), *data]
    found = measured([*words, "compare=[score]"], tmp_path)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[:3]] == ["| head", "| rating", "| class"]
    columns = table[0].split(" | ")
    assert f"{found['class']['overall']['auc']:.3f}" in table[2].split(" | ")[columns.index("auc")]
    assert table[1].split(" | ")[columns.index("auc")] == "-"
    rank = found["rating"]["overall"]["spearman"]
    assert found["rating"]["overall"]["spearman_score"] == pytest.approx(rank)  # a line through the rating
    cached = json.loads((heads["rating"] / "metrics.json").read_text())["test"]["overall"]
    assert rank == pytest.approx(cached["spearman"], abs=0.01)  # but for float16, the cached features
    assert found["rating"]["features"]["draws"] == 2 and "caption" in found["rating"]["features"]


@pytest.mark.usefixtures("no_plots")
def test_heads_of_one_folder_name_keep_apart(heads, folder, tmp_path) -> None:
    twin = shutil.copytree(heads["rating"], tmp_path / "rating")
    words = [str(heads["rating"]), str(twin), str(twin), f"cache={folder / 'cache'}"]
    names = {f"{folder.name}/rating", f"{tmp_path.name}/rating"}
    assert set(measured(words, tmp_path / "out")) == names


@pytest.mark.usefixtures("no_plots")
def test_an_absent_cache_is_filled_with_one_split_and_then_used(heads, data, tmp_path, monkeypatch) -> None:
    words = [str(heads["rating"]), str(heads["regression"]), *data, f"cache={tmp_path / 'cache'}"]
    first = measured(words, tmp_path / "out")
    cache = FeatureCache(tmp_path / "cache")
    assert cache.splits == ["test"] and set(cache.columns) == {"rating", "score"}
    trained = json.loads((heads["rating"] / "metrics.json").read_text())["test"]["overall"]
    assert first["rating"]["overall"]["nll"] == pytest.approx(trained["nll"])
    monkeypatch.setattr(caching, "load_pipeline", None)  # no model is needed again
    assert measured(words, tmp_path / "out") == first


def test_generated_rows_go_with_their_own_real_rows(heads, folder, tmp_path) -> None:
    real = FeatureCache(folder / "cache", "test")
    assert len(open_generated(real, folder / "generated", "test")) == 120
    real.manifest["settings"]["seed"] = 5
    with pytest.raises(UserError, match="has another seed"):
        open_generated(real, folder / "generated", "test")


def changed(head: Path, folder: Path, **options) -> Path:
    """A copy of a head whose config says something else."""
    shutil.copytree(head, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | options))
    return folder


@pytest.mark.parametrize(
    ("task", "config", "words", "message"),
    [
        ("rating", {}, ["{tmp}/none"], "in '{tmp}/none'"),
        ("rating", {"base_fingerprint": "0" * 12}, ["cache={cache}"], "base_fingerprint=000000000000"),
        ("rating", {"tap": "down_blocks.2"}, ["cache={cache}"], "features with tap=down_blocks.2"),
        ("rating", {}, ["data.caption=empty"], "Expected data.caption=caption"),
        ("rating", {"target": "beauty"}, ["cache={cache}"], "target_columns=['beauty'], but the cache"),
        ("class", {"labels": ["no", "maybe"]}, ["cache={cache}"], "got 'yes' too"),
        ("embedding", {"clip_fingerprint": "0" * 12}, ["cache={cache}"], "clip=000000000000"),
        ("binary", {}, ["cache={cache}"], "generated=null; give both folders"),
        ("binary", {}, ["cache={cache}", "generated={tmp}/none"], "generated.folder={tmp}/none"),
    ],
)
def test_bad_input_gets_a_sentence(task, config, words, message, heads, data, folder, tmp_path, capsys) -> None:
    names = {"tmp": tmp_path, "cache": folder / "cache"}
    head = changed(heads[task], tmp_path / "head", **config)
    with pytest.raises(SystemExit) as stop:
        main([str(head), *data, *(word.format(**names) for word in words), f"output={tmp_path / 'out'}"])
    assert stop.value.code == 2
    assert message.format(**names) in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_heads_that_differ_fill_no_cache_together(heads, data, tmp_path, capsys) -> None:
    other = changed(heads["rating"], tmp_path / "other", caption="empty")
    with pytest.raises(SystemExit):
        main([str(heads["rating"]), str(other), *data, f"cache={tmp_path / 'cache'}"])
    assert "'rating' and 'other' differ" in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_an_undefined_interval_is_left_out() -> None:
    row = {"rows": 5, "spearman": 0.0, "spearman_interval": [math.nan, math.nan], "skill": -0.9}
    text = head_tables.head_tables({"a": {"task": "rating", "overall": row, "bins": [{"low": 0, "high": 99} | row]}})
    assert text.splitlines()[-1] == "| all | 5 | 0.000 | -0.900 |"
