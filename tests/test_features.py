"""Features: noise by key, equality with a full forward, shards that any number of processes writes alike."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from guidance.data.cache import FeatureCache
from guidance.data.encoding import FeatureEncoder
from guidance.data.features import LiveFeatures, cache_features
from guidance.taps import capture
from guidance.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(22)]
    return datasets.Dataset.from_dict(
        {
            "image": images,
            "caption": [f"a red house in the hills at {('noon', 'dusk')[i % 2]}" for i in range(22)],
            "rating": [i % 10 + 1 for i in range(22)],
            "score": [1 + i / 7 if i != 3 else None for i in range(22)],
            "colour": ["red", "yellow"] * 11,
            "vector": [[float(i), 1.0] for i in range(22)],
        }
    )


COLUMNS = ["rating", "score", "colour", "vector"]
OPTIONS = {"target_columns": COLUMNS, "draws": 2, "batch_size": 8, "shard_size": 9, "progress": False}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def share(rank: int, processes: int) -> SimpleNamespace:
    return SimpleNamespace(process_index=rank, num_processes=processes)


@pytest.fixture(scope="module")
def cached(tiny_pipe, examples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "a cache"
    assert cache_features(tiny_pipe, examples, folder, **OPTIONS) == 44
    return folder


def test_noise_is_a_function_of_seed_split_example_and_draw(tiny_pipe) -> None:
    encoder = FeatureEncoder(tiny_pipe, seed=3)
    keys = [(i, d) for i in range(40) for d in range(5)]
    t, eps = encoder.draw_noise(keys, (4, 8, 8))
    alone_t, alone_eps = encoder.draw_noise([(17, 2)], (4, 8, 8))
    assert alone_t[0] == t[17 * 5 + 2] and torch.equal(alone_eps[0], eps[17 * 5 + 2])
    assert len({row.numpy().tobytes() for row in eps}) == 200
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
    for other in (FeatureEncoder(tiny_pipe, seed=4), FeatureEncoder(tiny_pipe, seed=3, split="test")):
        assert not torch.equal(other.draw_noise(keys, (4, 8, 8))[0], t)


def test_timesteps_are_uniform_and_stay_in_range(tiny_pipe) -> None:
    t, _ = FeatureEncoder(tiny_pipe).draw_noise([(i, 0) for i in range(2000)], (1, 1, 1))
    assert (t.bincount(minlength=1000).reshape(10, 100).sum(1) > 140).all()
    t, _ = FeatureEncoder(tiny_pipe, timesteps=(200, 202)).draw_noise([(i, 0) for i in range(60)], (1, 1, 1))
    assert set(t.tolist()) == {200, 201, 202}


@pytest.mark.parametrize(("noise", "caption"), [("random", "caption"), ("random", "empty"), ("none", "caption")])
def test_features_equal_those_of_a_full_forward(tiny_pipe, examples, noise: str, caption: str) -> None:
    pipe, picked = tiny_pipe, examples.select(range(4))
    encoder = FeatureEncoder(pipe, noise=noise, caption=caption)
    h, t = LiveFeatures(encoder, picked).read(range(4))
    size = 2 * (encoder.image_size,)
    pixels = np.stack([np.asarray(image.resize(size)) for image in picked["image"]]) / 127.5 - 1
    x0 = pipe.vae.encode(torch.tensor(pixels).permute(0, 3, 1, 2).float()).latent_dist.mean
    x = x0 * pipe.vae.config.scaling_factor
    if noise == "random":
        _, eps = encoder.draw_noise([(i, 0) for i in range(4)], x.shape[1:])
        x = pipe.scheduler.add_noise(x, eps, t.long())
    prompts = picked["caption"] if caption == "caption" else [""] * 4
    ids = pipe.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    text = pipe.text_encoder(ids)[0]
    with capture(pipe.unet) as store:
        pipe.unet(x, t, encoder_hidden_states=text)
    assert (t == 0).all() if noise == "none" else t.unique().numel() > 1
    torch.testing.assert_close(h, store["mid_block"], rtol=1e-4, atol=1e-4)


def test_the_cache_holds_what_live_features_compute(tiny_pipe, examples, cached: Path) -> None:
    cache = FeatureCache(cached)
    live = LiveFeatures(FeatureEncoder(tiny_pipe), examples, draws=2, batch_size=3)
    h, t = live.read(range(44))
    torch.testing.assert_close(cache.read(range(44))[0].float(), h, rtol=2e-3, atol=2e-3)
    assert torch.equal(cache.read(range(44))[1], t)
    for name in COLUMNS:
        np.testing.assert_array_equal(cache.column(name), live.column(name))
    assert not torch.equal(live.read([0], epoch=1)[1], t[:1])  # new noise in each epoch


def test_reading(cached: Path) -> None:
    cache = FeatureCache(cached)
    assert len(cache) == 44 and cache.splits == ["train"] and cache.feature_shape[0] == 64
    assert cache.columns == COLUMNS and len(list((cached / "train").iterdir())) == 6  # 8 rows a shard
    assert cache.column("rating").tolist() == [i // 2 % 10 + 1 for i in range(44)]
    assert cache.column("colour")[:4].tolist() == ["red", "red", "yellow", "yellow"]
    assert np.isnan(cache.column("score")[6]) and cache.column("vector").shape == (44, 2)
    everything, t = cache.read(range(44))
    order = np.random.default_rng(0).permutation(44)
    h, shuffled_t = cache.read(order)
    assert torch.equal(h, everything[order]) and torch.equal(shuffled_t, t[order])


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(tiny_pipe, examples, cached, tmp_path, processes) -> None:
    for rank in reversed(range(processes)):
        cache_features(tiny_pipe, examples, tmp_path / "c", **OPTIONS, state=share(rank, processes))
    assert contents(tmp_path / "c") == contents(cached)


def test_only_what_is_missing_or_broken_is_written_again(tiny_pipe, examples, cached, tmp_path) -> None:
    import shutil

    folder = tmp_path / "c"
    shutil.copytree(cached, folder)
    shutil.rmtree(folder / "train" / "shard-00002")
    (folder / "train" / "shard-00002.tmp-123-abc").mkdir()
    (folder / "train" / "shard-00002.tmp-123-abc" / "h.npy").write_bytes(b"half")
    broken = folder / "train" / "shard-00004" / "h.npy"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"1 are missing, the first is train/shard-00002.*run the same command"):
        FeatureCache(folder)
    assert cache_features(tiny_pipe, examples, folder, **OPTIONS) == 16
    assert contents(folder) == contents(cached)
    assert cache_features(tiny_pipe, examples, folder, **OPTIONS) == 0


def test_a_cache_cut_short_gets_a_sentence(cached, tmp_path) -> None:
    import shutil

    with pytest.raises(UserError, match=r"no manifest\.json"):
        FeatureCache(tmp_path)
    for name, change, message in [
        ("t.npy", lambda p: p.unlink(), "it is missing"),
        ("h.npy", lambda p: p.write_bytes(p.read_bytes()[:3000]), "cut short"),
        ("rating.npy", lambda p: np.save(p, np.arange(3)), "instead of 8 rows"),
    ]:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(cached, tmp_path / "c")
        change(tmp_path / "c" / "train" / "shard-00001" / name)
        with pytest.raises(UserError, match=message):
            FeatureCache(tmp_path / "c")


def test_mistakes_get_a_sentence(tiny_pipe, examples, cached: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="found: rating, score, colour, vector"):
        FeatureCache(cached).column("beauty")
    with pytest.raises(UserError, match=r"split 'tran'.*Did you mean 'train'"):
        FeatureCache(cached, "tran")
    for change, message in [
        ({"seed": 1}, "another seed: 1 instead of 0"),
        ({"shard_size": 20}, "another rows_per_shard"),
    ]:
        with pytest.raises(UserError, match=message):
            cache_features(tiny_pipe, examples, cached, **{**OPTIONS, **change})
    for change, message in [
        ({"target_columns": ["beauty"]}, "Expected a column 'beauty'"),
        ({"tap": "midblock"}, "Expected a tap"),
    ]:
        with pytest.raises(UserError, match=message):
            cache_features(tiny_pipe, examples, tmp_path / "new", **{**OPTIONS, **change})
    assert not (tmp_path / "new").exists()
    too_large = torch.full((8, 64, 4, 4), 1e6), torch.zeros(8)
    monkeypatch.setattr(LiveFeatures, "read", lambda self, rows: too_large)
    with pytest.raises(UserError, match="finite features that fit float16"):
        cache_features(tiny_pipe, examples, tmp_path / "new", **OPTIONS)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def parquet(examples, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rated.parquet"
    datasets.concatenate_datasets([examples] * 4).to_parquet(file)
    return file


def script_options(parquet: Path, model: Path, folder: Path) -> list[str]:
    options = {"dataset": parquet, "model": model, "folder": folder, "device": "cpu", "draws": 1}
    options |= {"shard_size": 4, "batch_size": 2, "target_columns": "[rating,colour]"}
    return [f"{key}={value}" for key, value in options.items()]


def test_a_killed_script_goes_on_to_the_same_bytes(tiny_folder, parquet, tmp_path, capsys) -> None:
    from train.cache_features import main

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "train.cache_features", *script_options(parquet, tiny_folder, killed)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(killed.glob("train/shard-?????")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    finished = len(list(killed.glob("*/shard-?????")))
    main(script_options(parquet, tiny_folder, killed))
    main(script_options(parquet, tiny_folder, whole))
    assert 1 <= finished < len(list(whole.glob("*/shard-?????")))
    assert contents(killed) == contents(whole)
    assert "88 rows of 64x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rating_column=ratng", "Expected a column 'ratng'"),
        ("dataset=no-such/dataset", "cannot be loaded"),
        ("timesteps=[900,100]", "low <= high"),
        ("rating_column=score", "got None in row 3 and 4 bad rows"),
    ],
)
def test_bad_input_ends_the_script_with_a_sentence(
    tiny_folder, parquet, tmp_path, capsys, override: str, message: str
) -> None:
    from train.cache_features import main

    with pytest.raises(SystemExit) as stop:
        main([*script_options(parquet, tiny_folder, tmp_path / "c"), override])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in error
    assert not (tmp_path / "c").exists()
