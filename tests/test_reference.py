"""Features on the disk, and reference sets: kills, two processes, damage, sources, files of other packages."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eval.features.extractors import extractor_from_module, load_extractor
from eval.features.reference import fill_reference, load_reference, statistics
from eval.features.store import FeatureStore, features_of
from eval.metrics.frechet import load_statistics, moments, save_statistics
from guidance.testbed.render import render_scenes
from guidance.testbed.scenes import scenes
from guidance.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
N = 12
ARRAYS = np.random.default_rng(0).integers(0, 256, (N, 6, 6, 3), np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


FILES = [png(array) for array in ARRAYS]
DIGESTS = [hashlib.sha256(data).hexdigest() for data in FILES]


class Channels(nn.Module):
    """Channel means (b, 3); counts the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return x.mean((2, 3))


@pytest.fixture
def net():
    return Channels()


@pytest.fixture
def extractor(net):
    return extractor_from_module(net, name="channels", size=6, batch_size=5)


EXPECTED = ARRAYS.reshape(N, 36, 3).mean(1) / 255


def ask(extractor, folder, rows=range(N), **options) -> np.ndarray:
    rows = list(rows)
    return features_of(
        lambda i: Image.open(io.BytesIO(FILES[rows[i]])), [DIGESTS[r] for r in rows], extractor, folder, **options
    )


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def test_features_are_computed_once_and_come_in_the_order_asked(tmp_path, net, extractor) -> None:
    np.testing.assert_allclose(ask(extractor, tmp_path, [3, 1, 3, 0]), EXPECTED[[3, 1, 3, 0]], atol=1e-6)
    assert net.seen == 3  # equal digests once
    x = ask(extractor, tmp_path)
    assert net.seen == N and x.dtype == np.float32
    np.testing.assert_allclose(x, EXPECTED, atol=1e-6)
    np.testing.assert_array_equal(x[::-1], ask(extractor, tmp_path, range(N)[::-1]))
    assert net.seen == N
    np.testing.assert_array_equal(x, ask(extractor, None))  # without a cache
    header = json.loads(only(tmp_path, "header.json").read_text())
    assert (header["extractor"], header["width"], header["fingerprint"]) == ("channels", 3, extractor.fingerprint)


def test_an_image_is_opened_only_where_it_is_missing(tmp_path, extractor) -> None:
    ask(extractor, tmp_path, range(10))
    opened = []

    def open_image(i: int) -> Image.Image:
        opened.append(i)
        return Image.open(io.BytesIO(FILES[i]))

    features_of(open_image, DIGESTS, extractor, tmp_path, progress="test")
    assert opened == [10, 11]


def test_a_torn_file_costs_only_its_torn_row(tmp_path, net, extractor) -> None:
    """As after kill -9 at any moment: cut at every byte of two rows, and then everywhere coarsely."""
    whole = ask(extractor, tmp_path / "whole")
    data = only(tmp_path, "rows-*.bin").read_bytes()
    row = 32 + 3 * 4
    assert len(data) == N * row
    for end in [*range(2 * row + 1), *range(2 * row + 7, len(data), 61)]:
        folder = tmp_path / "cut"
        shutil.copytree(tmp_path / "whole", folder)
        only(folder, "rows-*.bin").write_bytes(data[:end])
        net.seen = 0
        np.testing.assert_array_equal(ask(extractor, folder), whole)
        assert net.seen == N - end // row
        np.testing.assert_array_equal(ask(extractor, folder), whole)
        assert net.seen == N - end // row
        shutil.rmtree(folder)


def test_an_error_in_the_middle_keeps_what_is_done(tmp_path, net, extractor) -> None:
    def open_image(i: int) -> Image.Image:
        if i == 7:
            raise UserError("Expected an image.")
        return Image.open(io.BytesIO(FILES[i]))

    with pytest.raises(UserError, match="an image"):
        features_of(open_image, DIGESTS, extractor, tmp_path)
    assert net.seen == 5
    ask(extractor, tmp_path)
    assert net.seen == N


def test_a_full_disk_leaves_no_half_row(tmp_path, extractor, monkeypatch) -> None:
    store = FeatureStore(tmp_path, "key")
    store.add(DIGESTS[:2], EXPECTED[:2])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", full)
        store.add(DIGESTS[2:3], EXPECTED[2:3])
    store.add(DIGESTS[3:4], EXPECTED[3:4])
    assert list(store.get(DIGESTS)) == [DIGESTS[0], DIGESTS[1], DIGESTS[3]]
    np.testing.assert_allclose(store.get(DIGESTS[3:4])[DIGESTS[3]], EXPECTED[3])


def test_processes_share_the_work(tmp_path, net, extractor) -> None:
    parts = [ask(extractor, tmp_path, process_index=k, num_processes=3) for k in (2, 0)]
    assert net.seen == 8
    assert (np.isfinite(parts[0]).all(1) == (np.arange(N) % 3 == 2)).all()
    assert np.isfinite(parts[1][:, 0]).sum() == 8  # its own, and those it finds
    np.testing.assert_allclose(ask(extractor, tmp_path, process_index=0, num_processes=1), EXPECTED, atol=1e-6)
    assert net.seen == N
    few = ask(extractor, tmp_path / "few", [0], process_index=1, num_processes=2)
    assert few.shape == (1, 0)  # not even the width is known to one without work


@dataclasses.dataclass
class Means:
    """Channel means without torch, which does not survive a fork; may kill its process at a call."""

    dies_at: int = 0
    name: str = "means"
    fingerprint: str = "means-1"
    batch_size: int = 2
    calls: int = 0

    def embed(self, images: list[Image.Image]) -> np.ndarray:
        self.calls += 1
        if self.calls == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.stack([np.asarray(image).mean((0, 1)) / 255 for image in images]).astype(np.float32)


def start(embedder: Means, folder: Path, index: int, number: int) -> multiprocessing.Process:
    options = {"process_index": index, "num_processes": number}
    process = multiprocessing.get_context("fork").Process(target=ask, args=(embedder, folder), kwargs=options)
    process.start()
    return process


def test_two_running_processes_merge_also_after_a_kill(tmp_path) -> None:
    running = [start(Means(dies_at=2), tmp_path, 0, 2), start(Means(), tmp_path, 1, 2)]
    for process in running:
        process.join(timeout=120)
    assert [process.exitcode for process in running] == [-signal.SIGKILL, 0]
    assert len(list(tmp_path.glob("means*/rows-*.bin"))) == 2
    rest = Means()
    np.testing.assert_allclose(ask(rest, tmp_path), EXPECTED, atol=1e-6)
    assert rest.calls == 2  # 12 images, 6 of the second process, 2 of the first before it died: 4 in twos


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path) -> None:
    running = [start(Means(batch_size=1), tmp_path, 0, 1) for _ in range(2)]
    for process in running:
        process.join(timeout=120)
    assert [process.exitcode for process in running] == [0, 0]
    rest = Means()
    np.testing.assert_allclose(ask(rest, tmp_path), EXPECTED, atol=1e-6)
    assert rest.calls == 0


def test_probabilities_are_cached_apart(tmp_path) -> None:
    judge, arrays = load_extractor("judge"), render_scenes(scenes("test", 3))
    digests, open_image = ([hashlib.sha256(a).hexdigest() for a in arrays], lambda i: Image.fromarray(arrays[i]))
    x = features_of(open_image, digests, judge, tmp_path)
    p = features_of(open_image, digests, judge, tmp_path, what="probabilities")
    assert x.shape == (3, 128) and p.shape == (3, 8)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"format": "image features 1", "fingerprint": "KEY", "width": "3", "dtype": "<f4"}',
        '{"format": "image features 1", "fingerprint": "other", "width": 3, "dtype": "<f4"}',
        '{"format": "image features 2", "fingerprint": "KEY", "width": 3, "dtype": "<f4"}',
        None,
    ],
)
def test_a_damaged_or_foreign_header_is_refused(tmp_path, extractor, text) -> None:
    ask(extractor, tmp_path)
    header = only(tmp_path, "header.json")
    header.unlink() if text is None else header.write_text(text.replace("KEY", extractor.fingerprint))
    with pytest.raises(UserError):
        ask(extractor, tmp_path)


def test_features_that_are_not_finite_are_refused(tmp_path, extractor) -> None:
    broken = dataclasses.replace(extractor, features=lambda images: torch.full((len(images), 3), torch.nan))
    with pytest.raises(UserError, match="finite features from 'channels'"):
        ask(broken, tmp_path / "b")
    ask(extractor, tmp_path / "c")
    rows = only(tmp_path / "c", "rows-*.bin")
    rows.write_bytes(rows.read_bytes()[:-4] + np.float32("nan").tobytes())
    with pytest.raises(UserError, match="remove the folder"):
        ask(extractor, tmp_path / "c")


def fill_folder(folder: Path, files=FILES) -> Path:
    (folder / "deep").mkdir(parents=True)
    for i, data in enumerate(files):
        (folder / ("deep" if i % 2 else ".") / f"{i:02}.png").write_bytes(data)
    (folder / "notes.txt").write_text("no image")
    return folder


def assert_is_the_set(reference, rows=range(N)) -> None:
    expected = EXPECTED[list(rows)]
    assert reference.n == len(expected)
    order = [np.abs(reference.features - row).sum(1).argmin() for row in expected]
    assert len(set(order)) == len(expected)
    np.testing.assert_allclose(reference.features[order], expected, atol=1e-6)
    mu, sigma = moments(expected)
    np.testing.assert_allclose(reference.mu, mu, atol=1e-6)
    np.testing.assert_allclose(reference.sigma, sigma, atol=1e-6)


def test_a_folder_is_read_once(tmp_path, net, extractor) -> None:
    folder, cache = fill_folder(tmp_path / "images"), tmp_path / "cache"
    first = load_reference(folder, extractor, cache=cache)
    assert_is_the_set(first)
    again = load_reference(folder, extractor, cache=cache)
    np.testing.assert_array_equal(again.features, first.features)
    np.testing.assert_array_equal(again.sigma, first.sigma)
    assert net.seen == N
    mu, sigma, n = load_statistics(only(cache / "references", "*.npz"))
    assert (mu == first.mu).all() and (sigma == first.sigma).all() and n == N
    (folder / "00.png").write_bytes(png(255 - ARRAYS[0]))
    changed = load_reference(folder, extractor, cache=cache)
    assert net.seen == N + 1 and not np.allclose(changed.mu, first.mu)


def test_lost_features_are_computed_again(tmp_path, net, extractor) -> None:
    folder, cache = fill_folder(tmp_path / "images"), tmp_path / "cache"
    first = load_reference(folder, extractor, cache=cache)
    only(cache, "rows-*.bin").unlink()
    np.testing.assert_array_equal(load_reference(folder, extractor, cache=cache).features, first.features)
    assert net.seen == 2 * N


def test_processes_fill_a_reference(tmp_path, net, extractor) -> None:
    folder, cache = fill_folder(tmp_path / "images"), tmp_path / "cache"
    for k in range(2):
        fill_reference(folder, extractor, cache=cache, process_index=k, num_processes=2)
    assert net.seen == N
    assert_is_the_set(load_reference(folder, extractor, cache=cache))
    assert net.seen == N


def test_n_chooses_by_the_seed_and_more_contain_fewer(tmp_path, extractor) -> None:
    folder = fill_folder(tmp_path / "images")
    sets = [
        {x.tobytes() for x in load_reference(folder, extractor, n=n, seed=s).features}
        for n, s in ((4, 0), (8, 0), (4, 1))
    ]
    assert len(sets[0]) == 4 and sets[0] < sets[1] and sets[0] != sets[2]
    assert_is_the_set(load_reference(folder, extractor, n=100))  # all there are


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_parquet(tmp_path, extractor, form: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = FILES if form == "bytes" else [{"bytes": data, "path": None} for data in FILES]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": cells, "split": ["train"] * 8 + ["test"] * 4}), file)
    assert_is_the_set(load_reference(file, extractor, cache=tmp_path / "cache"))
    assert_is_the_set(load_reference(f"{file}@test", extractor, cache=tmp_path / "cache"), range(8, 12))
    with pytest.raises(UserError, match="mean 'test'"):
        load_reference(f"{file}@tst", extractor)
    pq.write_table(pa.table({"picture": cells}), file)
    with pytest.raises(UserError, match="found: picture"):
        load_reference(file, extractor)
    pq.write_table(pa.table({"image": [FILES[0], None]}), file)
    with pytest.raises(UserError, match="row 1 of"):
        load_reference(file, extractor)


def test_a_hub_dataset(tmp_path, extractor, monkeypatch) -> None:
    import datasets

    def of(files: list[bytes]) -> datasets.Dataset:
        features = datasets.Features({"image": datasets.Image()})
        return datasets.Dataset.from_dict({"image": [{"bytes": f, "path": None} for f in files]}, features)

    loaded = datasets.DatasetDict({"train": of(FILES[:8]), "test": of(FILES[8:])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    assert_is_the_set(load_reference("some/photos@test", extractor, cache=tmp_path), range(8, 12))
    for name in ("some/photos", "some/photos@tset"):
        with pytest.raises(UserError, match=r"some/photos@SPLIT.*Choices: train, test"):
            load_reference(name, extractor)
    loaded = datasets.DatasetDict({"train": of(FILES)})
    assert_is_the_set(load_reference("some/photos", extractor))


def test_the_testbed(tmp_path) -> None:
    judge = load_extractor("judge")
    found = load_reference("testbed:test", judge, n=6, seed=1, cache=tmp_path)
    expected = judge.embed(list(render_scenes(scenes("test", 6, seed=1))))
    np.testing.assert_allclose(found.features, expected, atol=1e-5)
    again = load_reference("testbed:test", judge, n=6, seed=1, cache=tmp_path)
    np.testing.assert_array_equal(again.features, found.features)
    other = load_reference("testbed:validation", judge, n=6, seed=1, cache=tmp_path)
    assert not np.allclose(other.mu, found.mu)


def test_npz_of_other_packages(tmp_path, extractor) -> None:
    """pytorch-fid writes np.savez_compressed(path, mu=, sigma=), clean-fid np.savez(path, mu=, sigma=)."""
    features = np.random.default_rng(1).normal(size=(50, 4))
    mu, sigma = features.mean(0), np.cov(features, rowvar=False)
    for write in (np.savez_compressed, np.savez):
        write(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
        found = load_reference(tmp_path / "theirs.npz", extractor, n=10)
        assert found.features is None and found.n == 0
        assert (found.mu == mu).all() and (found.sigma == sigma).all()
    save_statistics(tmp_path / "ours.npz", mu, sigma, 50)
    ours = load_reference(tmp_path / "ours.npz", extractor)
    assert ours.n == 50
    save_statistics(tmp_path / "no-n.npz", mu, sigma)
    assert load_statistics(tmp_path / "no-n.npz")[2] is None
    with np.load(tmp_path / "ours.npz") as file:  # as pytorch-fid reads it
        m, s = file["mu"][:], file["sigma"][:]
    assert m.shape == (4,) and s.shape == (4, 4)


def test_files_that_are_no_statistics_are_refused(tmp_path, extractor) -> None:
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "folder.npz").mkdir()
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((3, 2)))
    np.savez(tmp_path / "objects.npz", mu=np.array([None]), sigma=np.array([[None]]))
    for name in ("text", "folder", "shapes", "objects", "none"):
        with pytest.raises(UserError):
            load_reference(tmp_path / f"{name}.npz", extractor)


def test_sources_that_cannot_be_read_are_refused(tmp_path, extractor) -> None:
    fill_folder(tmp_path / "one", FILES[:1])
    broken = fill_folder(tmp_path / "broken", [*FILES[:2], b"no image"])
    (tmp_path / "photo.png").write_bytes(FILES[0])
    (tmp_path / "text.parquet").write_text("none")
    files = [tmp_path / name for name in ("one", "photo.png", "text.parquet", "none.parquet")]
    for source in ("testbed:tset", broken, *files, "nobody/nothing"):
        with pytest.raises(UserError):
            load_reference(source, extractor)


def test_statistics_are_those_of_numpy() -> None:
    x = (np.random.default_rng(2).normal(size=(9000, 5)) + 3).astype(np.float32)
    mu, sigma = statistics(x)
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64).T), rtol=1e-9, atol=1e-11)
