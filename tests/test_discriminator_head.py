"""Discriminator heads: losses and metrics in closed form, generation that resumes, and the script for real."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guidance.data.cache import FeatureCache
from guidance.guides import MidBlockGuide
from guidance.heads import load_head
from guidance.heads.config import HeadConfig
from guidance.heads.tasks import TASKS
from guidance.training import discriminator as generated
from guidance.training.discriminator import RealAndGenerated, generate_latents, load_latents
from guidance.training.metrics import evaluate_head, fit_temperatures, useful_range
from guidance.training.recipes import GenerationRecipe, HeadRecipe
from guidance.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

BINARY = HeadConfig("linear", 4, outputs=1, task="binary", target="real", labels=[])


# --- mathematics


def test_loss_is_binary_cross_entropy() -> None:
    z = 3 * torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(50) % 2
    expected = F.binary_cross_entropy_with_logits(z[:, 0], y.double())
    torch.testing.assert_close(TASKS["binary"].loss(z, y, HeadRecipe()), expected)
    torch.testing.assert_close(TASKS["binary"].logits(z).softmax(1)[:, 1], z[:, 0].sigmoid())


def test_targets_are_zero_and_one_or_a_sentence() -> None:
    assert TASKS["binary"].encode(np.array([1, 0, 0]), []).tolist() == [1, 0, 0]
    for bad in ([0, 1, 2], [1, 1, 1]):
        with pytest.raises(UserError, match="both 0 and 1"):
            TASKS["binary"].encode(np.array(bad), [], "real")


def test_metrics_and_temperatures_of_known_log_odds() -> None:
    g = torch.Generator().manual_seed(0)
    y, t = torch.arange(6000) % 2, torch.rand(6000, generator=g) * 1000
    # unit Gaussians d apart: log-odds d x - d^2 / 2, AUC Phi(d / sqrt 2); at high noise nothing is to be told
    d = torch.where(t < 600, 2.0, 0.0)
    x = d * y + torch.randn(6000, generator=g)
    z = (d * x - d * d / 2)[:, None]
    found = evaluate_head(z, y, t, BINARY)
    easy = found["bins"][0]
    assert easy["auc"] == pytest.approx(0.921, abs=0.02) and easy["chance"] == pytest.approx(0.5, abs=0.05)
    assert easy["ece"] < 0.06 and 2 * easy["auc"] - 1 > easy["skill"] > 0.75
    assert found["bins"][9]["auc"] == 0.5 and found["bins"][9]["skill"] < 0
    assert useful_range(found, 1000) == (0.4, 1.0)
    fitted = fit_temperatures(TASKS["binary"].logits(3 * z), y, t, 1000)
    np.testing.assert_allclose(fitted[:6], 3.0, rtol=0.25)


class Rows:
    """A feature source whose features are its row numbers."""

    def __init__(self, first: int, t: list[float]) -> None:
        self.first, self.t = first, np.array(t, np.float32)

    def __len__(self) -> int:
        return len(self.t)

    def column(self, name: str) -> np.ndarray:
        return self.t

    def read(self, rows, epoch: int = 0):
        h = torch.as_tensor(np.asarray(rows) + self.first).float().reshape(-1, 1, 1, 1)
        return h, torch.from_numpy(self.t[rows])


def test_real_rows_come_first_and_any_order_is_read() -> None:
    both = RealAndGenerated(Rows(0, [5, 6, 7, 8]), Rows(100, [5, 6, 7]))
    assert len(both) == 6 and both.column("real").tolist() == [1, 1, 1, 0, 0, 0]
    h, t = both.read([4, 0, 2, 3, 4])
    assert h.flatten().tolist() == [101, 0, 2, 100, 101] and t.tolist() == [6, 5, 7, 5, 6]
    assert both.column("t").tolist() == [5, 6, 7, 5, 6, 7]
    with pytest.raises(UserError, match="timesteps of the real"):
        RealAndGenerated(Rows(0, [5, 6]), Rows(100, [5, 9]))


# --- generation


CAPTIONS = [f"a red house in the {place} at noon" for place in ("hills", "snow", "desert", "mountains", "hills")]
FAST = GenerationRecipe(num_steps=1, cfg_scale=1.0, batch_size=2, shard_size=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_generation_goes_on_to_the_same_bytes(tiny_pipe, tmp_path, monkeypatch) -> None:
    options = {"split": "train", "progress": False}
    assert generate_latents(tiny_pipe, CAPTIONS, tmp_path / "whole", FAST, **options) == 5
    calls, sample = [], generated.sample_latents

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(generated, "sample_latents", killed)
    with pytest.raises(KeyboardInterrupt):
        generate_latents(tiny_pipe, CAPTIONS, tmp_path / "killed", FAST, **options)
    monkeypatch.setattr(generated, "sample_latents", sample)
    train = tmp_path / "killed" / "train"
    (train / ".shard-00001.tmp-1-abc.npy").write_bytes(b"half")
    (train / "shard-00002.npy").write_bytes((train / "shard-00000.npy").read_bytes()[:150])
    assert [p.name for p in sorted(train.glob("shard*"))] == ["shard-00000.npy", "shard-00002.npy"]
    assert generate_latents(tiny_pipe, CAPTIONS, tmp_path / "killed", FAST, **options) == 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    for rank in (0, 1):
        share = SimpleNamespace(process_index=rank, num_processes=2)
        generate_latents(tiny_pipe, CAPTIONS, tmp_path / "two", FAST, **options, state=share)
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")
    latents = load_latents(tmp_path / "whole", "train", 5)
    assert latents.dtype == np.float32 and len({row.tobytes() for row in latents}) == 5
    with pytest.raises(UserError, match="Expected 9 latents of train"):
        load_latents(tmp_path / "whole", "train", 9)
    with pytest.raises(UserError, match="another rows: 4"):
        generate_latents(tiny_pipe, CAPTIONS[:4], tmp_path / "whole", FAST, **options)


# --- the script


@pytest.fixture(scope="module")
def options(tiny_folder, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("discriminator")
    return [
        f"cache={folder / 'cache'}",
        f"generated.folder={folder / 'generated'}",
        "generated.num_steps=2",
        "generated.cfg_scale=2.0",
        "generated.train=60",
        f"data.model={tiny_folder}",
        "data.train=64",
        "data.validation=24",
        "data.test=24",
        "data.device=cpu",
        "data.draws=2",
        "data.timesteps=[0,400]",
        "data.target_columns=[rating]",
        "compare=[]",
        "task=binary",
        "target=real",
        "kind=conv",
        "hidden=16",
        "batch_size=24",
        "epochs=6",
        "lr=0.01",
    ]


def run(*words: str) -> None:
    from train.head import main

    main(list(words))


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("heads") / "discriminator"
    run(*options, f"output={output}")
    return output


def test_one_command_generates_caches_and_trains(trained, options, tiny_pipe) -> None:
    head, metrics = load_head(trained), json.loads((trained / "metrics.json").read_text())
    overall = metrics["test"]["overall"]
    assert overall["rows"] == 96 and overall["chance"] == 0.5 and metrics["cost"]["rows"] == 240
    assert overall["auc"] > 0.75 and overall["accuracy"] > 0.65 and "ece" in overall
    assert (
        head.config.outputs == 1 and len(head.config.temperature) == 10 and head.config.metrics["auc"] == overall["auc"]
    )
    assert 0.5 <= head.config.start <= 0.9 and head.config.stop == 1.0  # t from 0 to 400 only
    folder = Path(options[1].removeprefix("generated.folder="))
    real, fake = (FeatureCache(options[0].removeprefix("cache="), "train"), FeatureCache(folder / "features", "train"))
    assert len(real) == 128 and len(fake) == 120
    assert np.array_equal(real.column("t")[:120], fake.column("t"))  # row for row the same noise level
    assert not torch.equal(real.read([0])[0], fake.read([0])[0])
    score = MidBlockGuide(head).score(*(x.float() for x in real.read(range(20))))
    assert score.mean() > MidBlockGuide(head).score(*(x.float() for x in fake.read(range(20)))).mean() + 1


def test_a_second_head_samples_nothing_anew(trained, options, tmp_path, monkeypatch) -> None:
    def never(*args, **kwargs):
        raise AssertionError("sampled again")

    monkeypatch.setattr(generated, "sample_latents", never)
    run(*options, "seed=1", "epochs=1", f"output={tmp_path / 'h'}")
    assert (tmp_path / "h" / "head.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generated.folder=null"], "got generated.folder=null; start from"),
        (["compare=[rating]"], "compare=['rating']"),
        (["generated.train=65"], "generated.train=65 for 64 real images"),
        (["generated.cfg_scale=3.0"], "got another source"),
    ],
)
def test_bad_input_gets_a_sentence(trained, options, tmp_path, capsys, words, message) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*options, *words, f"output={tmp_path / 'h'}")
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "h").exists()
