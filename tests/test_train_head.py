"""Training of heads: mathematics of targets, losses and metrics, then the script for real."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.heads.__main__ import main as eval_heads
from guidance.data.cache import FeatureCache
from guidance.guides import MidBlockGuide
from guidance.heads import HEADS, Head, HeadConfig, check_fits, load_head
from guidance.heads.measures import mean_of, rank_measures
from guidance.heads.networks import register_head
from guidance.heads.tasks import TASKS, Task, register_task
from guidance.sampling import sample_latents
from guidance.schedule import NoiseSchedule
from guidance.training.loop import learning_rate
from guidance.training.metrics import evaluate_head, fit_temperatures, useful_range
from guidance.training.recipes import HeadRecipe
from guidance.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RATINGS = [str(k) for k in range(1, 11)]


pytestmark = pytest.mark.usefixtures("one_thread")


# --- mathematics


def test_ratings_become_probabilities_with_the_same_mean() -> None:
    values = np.array([1, 10, 3, 4.25, 9.9])
    p = TASKS["rating"].encode(values, RATINGS)
    torch.testing.assert_close(p.sum(1), torch.ones(5))
    torch.testing.assert_close(p @ torch.arange(1.0, 11), torch.tensor(values).float())
    assert p[2].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0] and (p[3] > 0).sum() == 2


def test_classes_and_numbers() -> None:
    classes = TASKS["class"]
    labels = classes.labels(np.array(["red", "blue", "red"]), "x")
    assert labels == ["blue", "red"] and classes.labels(np.array([10, 2, 2]), "x") == ["2", "10"]
    assert classes.encode(np.array(["red", "blue"]), labels).tolist() == [1, 0]
    assert TASKS["regression"].encode(np.array([1.5, 2]), []).tolist() == [[1.5], [2.0]]


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        ([5, 11.0], "rating", "ratings from 1 to 10 in 'x', got 11.0 in row 1 and 1 bad rows"),
        ([np.inf, 1.0], "regression", "finite numbers in 'x', got inf in row 0"),
        (["a", "b"], "rating", "use task=class"),
        (["a", "z"], "class", "got 'z'"),
    ],
)
def test_bad_targets_get_a_sentence(values: list, task: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TASKS[task].encode(np.array(values), ["a"] if task == "class" else RATINGS, "x")
    with pytest.raises(UserError, match="at least two classes"):
        TASKS["class"].labels(np.array(["a", "a"]), "x")


def test_one_cycle_equals_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=50)
    for step in range(50):
        lr, beta1 = learning_rate("one-cycle", step, 50, 3e-3)
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert beta1 == pytest.approx(optimizer.param_groups[0]["betas"][0], rel=1e-9)
        optimizer.step()
        reference.step() if step < 49 else None
    assert all(math.isfinite(x) for n in (1, 2, 3, 4) for s in range(n) for x in learning_rate("one-cycle", s, n, 1))


def test_rating_loss() -> None:
    task, logits = TASKS["rating"], torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    target = task.encode(np.array([1, 4, 10, 7, 7, 2]), RATINGS)
    plain = task.loss(logits, target, HeadRecipe())
    torch.testing.assert_close(plain, F.cross_entropy(logits, target.argmax(1)))
    expected = (logits.softmax(1) @ torch.arange(1.0, 11) - torch.tensor([1.0, 4, 10, 7, 7, 2])).square().mean()
    weighted = task.loss(logits, target, HeadRecipe(expected_weight=0.5), scale=2.0)
    torch.testing.assert_close(weighted, plain + 0.5 * expected / 4)


def test_temperatures_are_recovered() -> None:
    g = torch.Generator().manual_seed(0)
    logits, t = 2 * torch.randn(20_000, 5, generator=g), torch.rand(20_000, generator=g) * 1000
    wanted = 0.5 + t.div(100).floor() / 5
    target = torch.multinomial((logits / wanted[:, None]).softmax(1), 1, generator=g)[:, 0]
    fitted = fit_temperatures(logits, target, t, 1000)
    np.testing.assert_allclose(fitted, [0.5 + i / 5 for i in range(10)], rtol=0.12)
    few = fit_temperatures(logits[:200], target[:200], torch.zeros(200), 1000)
    assert len(set(few[1:])) == 1  # empty bins take that of all rows


def test_metrics_of_a_head_that_knows_and_one_that_does_not() -> None:
    g = torch.Generator().manual_seed(0)
    ratings = torch.randint(1, 11, (3000,), generator=g)
    target, t = TASKS["rating"].encode(ratings.numpy(), RATINGS), torch.rand(3000, generator=g) * 1000
    config = HeadConfig("conv", 4)
    perfect = evaluate_head(50 * target, target, t, config, {"truth": -ratings.numpy()})
    assert perfect["overall"]["accuracy"] == 1 and perfect["overall"]["spearman"] == pytest.approx(1)
    assert perfect["overall"]["spearman_truth"] == pytest.approx(-1) and perfect["overall"]["ece"] < 1e-4
    assert [b["low"] for b in perfect["bins"]] == list(range(0, 1000, 100))
    assert sum(b["rows"] for b in perfect["bins"]) == 3000 and useful_range(perfect, 1000) == (0.0, 1.0)
    blind = evaluate_head(torch.randn(3000, 10, generator=g), target, t, config)
    assert abs(blind["overall"]["accuracy"] - 0.1) < 0.03 and blind["overall"]["skill"] < 0.05
    assert blind["overall"]["chance"] == pytest.approx(int(ratings.bincount().max()) / 3000)
    constant = evaluate_head(torch.zeros(3000, 10), target, t, config)
    assert constant["overall"]["spearman"] == 0
    half = torch.where((t < 600)[:, None], 50 * target, torch.randn(3000, 10, generator=g))
    assert useful_range(evaluate_head(half, target, t, config), 1000) == (0.4, 1.0)


def test_ece_of_a_known_case() -> None:
    config = HeadConfig("conv", 4, outputs=2, task="class", labels=["a", "b"])
    logits = torch.tensor([[math.log(0.8), math.log(0.2)]]).repeat(100, 1)
    target = torch.tensor([0] * 60 + [1] * 40)
    overall = evaluate_head(logits, target, torch.zeros(100), config)["overall"]
    assert overall["ece"] == pytest.approx(0.2, abs=1e-5) and overall["accuracy"] == pytest.approx(0.6)
    assert overall["chance"] == pytest.approx(0.6) and overall["skill"] < 0


# --- the script


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """A square whose colour is the rating: features of a random network show that as well."""
    rng = np.random.default_rng(0)
    ratings = rng.integers(1, 11, 300)
    pixels = rng.normal(128, 4, (300, 64, 64, 3))
    pixels[:, 16:48, 16:48] = np.stack([25 * ratings, 0 * ratings + 128, 255 - 25 * ratings], 1)[:, None, None]
    images = np.clip(pixels, 0, 255).astype(np.uint8)
    file = tmp_path_factory.mktemp("data") / "rated.parquet"
    table = {
        "image": [Image.fromarray(image) for image in images],
        "caption": ["a picture"] * 300,
        "rating": ratings.tolist(),
        "score": (ratings * 30.0 - 100).tolist(),
        "bright": ["yes" if r > 5 else "no" for r in ratings],
        "split": ["train"] * 180 + ["validation"] * 60 + ["test"] * 60,
    }
    datasets.Dataset.from_dict(table).to_parquet(file)
    return file


@pytest.fixture(scope="module")
def options(parquet, tiny_folder, tmp_path_factory) -> list[str]:
    cache = tmp_path_factory.mktemp("caches") / "shared"
    return [
        f"cache={cache}",
        f"data.model={tiny_folder}",
        f"data.dataset={parquet}",
        "data.device=cpu",
        "data.draws=1",
        "data.target_columns=[rating,score,bright]",
        "data.timesteps=[0,20]",
        "compare=[score]",
        "hidden=16",
        "batch_size=12",
        "epochs=8",
        "lr=0.01",
    ]


def run(*words: str) -> None:
    from train.head import main

    main(list(words))


def results(folder: Path) -> dict:
    """What a run leaves, without the time it took."""
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["cost"]["seconds"]
    return metrics


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("heads") / "rating"
    run(*options, f"output={output}", "log_with=tensorboard")
    return output


def test_the_script_trains_a_head_that_beats_chance(trained: Path, tiny_pipe) -> None:
    assert {p.name for p in trained.iterdir()} == {
        "head.safetensors", "config.json", "metrics.json", "metrics.png", "README.md", "train.yaml"
    }  # fmt: skip
    head = load_head(trained)
    check_fits(head, tiny_pipe.unet, NoiseSchedule.from_scheduler(tiny_pipe.scheduler))
    assert head.config.timesteps == [0, 20] and head.config.base_fingerprint and len(head.config.temperature) == 10
    metrics = results(trained)
    assert metrics["test"]["overall"]["rows"] == 60 and metrics["test"]["overall"]["spearman"] > 0.5
    assert metrics["test"]["overall"]["spearman_score"] == pytest.approx(metrics["test"]["overall"]["spearman"])
    losses = [epoch["train_loss"] for epoch in metrics["training"]["history"]]
    assert losses[-1] < losses[0] and metrics["cost"]["rows"] == 180
    assert head.config.metrics["spearman"] == metrics["test"]["overall"]["spearman"]
    assert list(trained.parent.glob("rating.training/**/events.out.tfevents*"))  # the log stays, the checkpoint not
    assert not list(trained.parent.glob("rating.training/checkpoint*"))
    assert Image.open(trained / "metrics.png").width > 300 and "| low | high |" in (trained / "README.md").read_text()


def test_a_finished_head_is_returned_and_another_config_refused(trained, options, capsys) -> None:
    before = (trained / "head.safetensors").stat().st_mtime_ns
    run(*options, f"output={trained}")
    assert (trained / "head.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        run(*options, f"output={trained}", "lr=0.02")
    assert "lr: 0.01 there, 0.02 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "target", "kind"), [("class", "bright", "attention"), ("regression", "score", "conv")]
)
def test_other_tasks(task: str, target: str, kind: str, options, trained, tmp_path) -> None:
    run(*options, f"output={tmp_path / 'h'}", f"task={task}", f"target={target}", f"kind={kind}", "epochs=10")
    head, overall = load_head(tmp_path / "h"), results(tmp_path / "h")["test"]["overall"]
    if task == "class":
        assert head.config.labels == ["no", "yes"] and overall["accuracy"] > 0.75
    else:
        assert overall["spearman"] > 0.5 and abs(float(head.output_mean) - 60) < 30 and head.config.outputs == 1


def test_a_task_and_a_network_are_one_class_each(options, tiny_pipe, tmp_path, monkeypatch, capsys) -> None:
    """Registered here, they train, measure, save, load and guide by the same commands as all others."""
    monkeypatch.setitem(TASKS, "log", None)  # both leave their registries after the test
    monkeypatch.setitem(HEADS, "pooled", None)

    @register_task
    class LogNumber(Task):
        name = "log"
        objectives = ("regression",)
        headlines = ("log_error", "skill")
        standardized = ranked = True

        def encode(self, values, labels, column="target"):
            return torch.from_numpy(np.log(values)).float()[:, None]

        def loss(self, outputs, target, weights, scale=1.0):
            return F.smooth_l1_loss(outputs, target)

        def measure(self, outputs, target, compare):
            error = {"log_error": float((outputs - target).abs().mean())}
            return error | rank_measures(outputs[:, 0], target[:, 0], compare)

        def statistics(self, outputs, target):
            return {"log_error": mean_of((outputs - target).abs()[:, 0])}

    @register_head("pooled")
    class PooledHead(Head):
        def __init__(self, config):
            super().__init__(config)
            self.linear = torch.nn.Linear(config.in_channels, config.outputs)
            self.film = None

        def outputs(self, h, t):
            return self.linear(h.amax((2, 3)))

    folder = tmp_path / "h"
    run(*options, f"output={folder}", "task=log", "target=rating", "kind=pooled")
    head, overall = load_head(folder), results(folder)["test"]["overall"]
    assert isinstance(head, PooledHead) and overall["spearman"] > 0.5 and overall["spearman_score"] > 0.5
    assert head.config.metrics == {name: overall[name] for name in LogNumber.headlines}
    t = torch.tensor([5.0, 10.0])
    guide = MidBlockGuide(head, 1.0, start=0.0, stop=1.0)
    h = torch.randn(2, 64, 2, 2)
    torch.testing.assert_close(guide.score(h, t), head(h, t)[:, 0])
    plain, guided = (sample_latents(tiny_pipe, ["a picture"], [0], num_steps=2, guides=g) for g in ([], [guide]))
    assert guided.isfinite().all() and not torch.equal(plain, guided)
    eval_heads([str(folder), options[0], f"output={tmp_path / 'measured'}"])
    measured = json.loads((tmp_path / "measured" / "metrics.json").read_text())["heads"]["h"]["overall"]
    low, high = measured["log_error_interval"]
    assert low < measured["log_error"] == overall["log_error"] < high
    assert f"{overall['log_error']:.3f}" in capsys.readouterr().out


def test_a_head_on_several_taps(options, tmp_path, tiny_pipe, capsys) -> None:
    words = [w for w in options if not w.startswith("cache")] + [f"cache={tmp_path / 'cache'}"]
    run(*words, "data.tap=down_blocks.0+mid_block", "kind=multiscale", f"output={tmp_path / 'h'}")
    head = load_head(tmp_path / "h")
    check_fits(head, tiny_pipe.unet, NoiseSchedule.from_scheduler(tiny_pipe.scheduler))
    assert head.config.tap == "down_blocks.0+mid_block" and head.config.tap_channels == [16, 64]
    assert results(tmp_path / "h")["test"]["overall"]["spearman"] > 0.5
    with pytest.raises(SystemExit):
        run(*words, "data.tap=up_blocks.0", f"output={tmp_path / 'other'}")
    assert "was made with down_blocks.0+mid_block" in capsys.readouterr().err


def test_the_reports_recipe_on_the_fly(options, tmp_path) -> None:
    words = [w for w in options if not w.startswith(("batch_size", "epochs", "lr", "cache"))]
    config = str(ROOT / "configs" / "head" / "midu-report.yaml")
    run("--config", config, *words, "cache=null", "compare=[]", f"output={tmp_path / 'h'}")
    head, metrics = load_head(tmp_path / "h"), results(tmp_path / "h")
    assert head.film is None and not head.config.temperature and metrics["training"]["step"] == 1  # 180 // 128
    assert (head.feature_std == 1).all() and len(metrics["training"]["history"]) == 1
    assert not (tmp_path / "runs").exists()


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def test_a_killed_run_goes_on_to_the_same_weights(trained, options, tmp_path) -> None:
    words = [*options, "epochs=12", "patience=null", "checkpoint_every=0"]
    output, whole = tmp_path / "killed", tmp_path / "whole"
    checkpoint = Path(f"{output}.training") / "checkpoint.safetensors"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu", "train/head.py"]
    process = subprocess.Popen(
        [*command, *words, f"output={output}"], cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not output.exists()
    with pytest.raises(SystemExit):  # a checkpoint of another config is not taken up
        run(*words, f"output={output}", "seed=5")
    run(*words, f"output={output}")
    run(*words, f"output={whole}")
    assert (output / "head.safetensors").read_bytes() == (whole / "head.safetensors").read_bytes()
    assert results(output) == results(whole)


def test_two_processes(trained, options, tmp_path) -> None:
    words = [w for w in options if not w.startswith("cache=")]
    cache, output = tmp_path / "cache", tmp_path / "h"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train/head.py"]
    command += [*words, f"cache={cache}", f"output={output}", "data.shard_size=32"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=800)
    two, one = results(output), results(trained)
    assert two["cost"].pop("processes") == 2 and one["cost"].pop("processes") == 1
    assert two["test"]["overall"]["spearman"] == pytest.approx(one["test"]["overall"]["spearman"], abs=0.02)
    single = tmp_path / "single"
    run(*words, f"cache={single}", f"output={tmp_path / 'h1'}", "data.shard_size=32")
    files = {p.relative_to(cache): p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    assert files == {p.relative_to(single): p.read_bytes() for p in single.rglob("*") if p.is_file()}
    assert len(FeatureCache(cache)) == 300


def test_a_failing_tracker_is_survived_and_bf16_trains(options, trained, tmp_path, monkeypatch) -> None:
    import accelerate

    def broken(*args, **kwargs):
        raise RuntimeError("no tracker today")

    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", broken)
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", {})  # it allows one precision a process
    with pytest.warns(UserWarning, match="no tracker today"):
        run(*options, f"output={tmp_path / 'h'}", "log_with=wandb", "epochs=1", "mixed_precision=bf16")
    assert (tmp_path / "h" / "head.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr=-1"], "lr above 0"),
        (["lr=1e9", "init=kaiming", "standardize=false"], "finite loss"),
        (["kind=convv"], "Did you mean 'conv'"),
        (["task=regresion"], "Did you mean 'regression'"),
        (["data.noise=none"], "noise=none, but the cache"),
        (["task=regression", "target=bright"], "use task=class"),
    ],
)
def test_bad_input_gets_a_sentence_and_leaves_no_head(options, trained, tmp_path, capsys, words, message) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*options, *words, f"output={tmp_path / 'h'}")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in error
    assert not (tmp_path / "h").exists() and not list(tmp_path.rglob("*.tmp-*"))
