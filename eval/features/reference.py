"""Reference sets by name: the images, or only their statistics, with which generated images are compared.

* ``testbed:test``, ``testbed:validation``, ``testbed:train``: rendered scenes;
* a folder of images, a ``.parquet`` file or a hub dataset with a column ``image``; ``@SPLIT`` at the end takes one
  split of the latter two (``photos.parquet@test``);
* an ``.npz`` with ``mu`` and ``sigma``, as pytorch-fid and clean-fid write: for the Frechet distance only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from eval.features.extractors import Extractor
from eval.features.store import features_of
from eval.metrics.frechet import FrechetDistance, load_statistics, save_statistics
from guidance.data.sources import TESTBED_SIZES, decode_image
from guidance.utils.errors import UserError, nearest
from guidance.utils.images import IMAGE_SUFFIXES
from guidance.utils.io import read_json, write_json

_CHUNK = 4096  # features added to the sums at once


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference set in the features of one network.

    Attributes:
        name: The source.
        n: Number of images; 0 where a file of statistics does not say.
        features: Of every image, float32; None where only statistics are known.
        mu, sigma: Mean and covariance (ddof 1), float64.
    """

    name: str
    n: int
    features: Float[np.ndarray, "n d"] | None
    mu: Float[np.ndarray, " d"]
    sigma: Float[np.ndarray, "d d"]


def load_reference(
    source: str | os.PathLike[str],
    extractor: Extractor,
    *,
    n: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: str | None = None,
) -> Reference:
    """Load a reference set; embed the images that are not cached.

    Args:
        source: See the top of this file.
        extractor: Computes the features.  Statistics of an ``.npz`` must come from the same network, which no such file
            names.
        n: Number of images, all if there are fewer; None takes all (of the testbed 4,000 of train, 1,000 of the other
            splits).  Ignored for ``.npz``.
        seed: Of the choice of n images, and of the testbed's world.
        cache: Folder for features and statistics; None caches nothing.
        progress: Title of a progress bar; None shows none.

    Raises:
        UserError: If there is no such source, it has fewer than two images, or an image cannot be read.
    """
    name = os.fspath(source)
    if name.endswith(".npz"):
        mu, sigma, known = load_statistics(name)
        return Reference(name, known or 0, None, mu, sigma)
    pictures = _open_source(name, n, seed)
    cached = None if cache is None else _cache_path(cache, extractor, pictures)
    digests = _read_digests(cached) if cached else None
    known_digests = digests or pictures.images().digests
    features = features_of(lambda i: pictures.images().open(i), known_digests, extractor, cache, progress=progress)
    if digests and cached:
        mu, sigma, _ = load_statistics(cached.with_suffix(".npz"))
        return Reference(name, len(features), features, mu, sigma)
    mu, sigma = statistics(features)
    if cached:
        save_statistics(cached.with_suffix(".npz"), mu, sigma, len(features))
        write_json(cached.with_suffix(".json"), known_digests)  # last: it marks the entry as complete
    return Reference(name, len(features), features, mu, sigma)


def fill_reference(
    source: str | os.PathLike[str],
    extractor: Extractor,
    *,
    n: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str],
    progress: str | None = None,
    process_index: int,
    num_processes: int,
) -> None:
    """Compute this process's share of a reference's features, for `load_reference` to find after a barrier.

    Arguments and errors as for `load_reference`, processes as for `eval.features.store.features_of`.
    """
    if (name := os.fspath(source)).endswith(".npz"):
        return
    pictures = _open_source(name, n, seed)
    if _read_digests(_cache_path(cache, extractor, pictures)) is not None:
        return
    images = pictures.images()
    features_of(
        images.open,
        images.digests,
        extractor,
        cache,
        progress=progress,
        process_index=process_index,
        num_processes=num_processes,
    )


def statistics(features: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Return mean and covariance (ddof 1), float64, from sums, in memory that does not grow with n."""
    sums = FrechetDistance(features.shape[1])
    for start in range(0, len(features), _CHUNK):
        sums.update(features[start : start + _CHUNK], real=True)
    mu, sigma = sums.statistics(real=True)
    return mu.numpy(), sigma.numpy()


@dataclasses.dataclass(frozen=True)
class _Images:
    """Images and their digests, in one order."""

    digests: list[str]
    open: Callable[[int], Image.Image]


@dataclasses.dataclass(frozen=True)
class _Source:
    """Images that are read only when needed; `key` identifies them in the cache."""

    key: str
    images: Callable[[], _Images]


def _open_source(name: str, n: int | None, seed: int) -> _Source:
    if n is not None and n < 2:
        raise UserError(f"Expected a reference of two or more images, got n={n}.")
    if name == "testbed" or name.startswith("testbed:"):
        return _testbed(name, n, seed)
    if Path(name).is_dir():
        return _folder(Path(name), n, seed)
    has_split = "@" in Path(name).name and not name.endswith(".parquet")
    path, _, split = name.rpartition("@") if has_split else (name, "", "")
    if path.endswith(".parquet"):
        return _parquet(Path(path), split, n, seed)
    if Path(path).suffix.lower() in IMAGE_SUFFIXES or Path(path).is_file():
        raise UserError(
            f"Expected a folder of images, a .parquet or an .npz file, got the file '{name}'; name its folder."
        )
    return _hub(path, split, n, seed)


def _testbed(name: str, n: int | None, seed: int) -> _Source:
    from guidance.testbed.render import render, render_scenes
    from guidance.testbed.scenes import sample_scene, scenes

    split = name.partition(":")[2]
    if split not in TESTBED_SIZES:
        choices = [f"testbed:{s}" for s in TESTBED_SIZES]
        raise UserError(f"Expected a split of the testbed, got '{name}'.{nearest(name, choices)}")
    number = n or TESTBED_SIZES[split]
    start = hashlib.sha256(render_scenes(scenes(split, 4, seed=seed)).tobytes()).hexdigest()

    @functools.lru_cache(number)  # a second network sees the same pictures
    def draw(i: int) -> Image.Image:
        return Image.fromarray(render(sample_scene(split, i, seed)))

    def images() -> _Images:  # identified without being drawn: the first few identify the renderer
        names = [f"{split} {seed} {i} {start}" for i in range(number)]
        return _Images([hashlib.sha256(name.encode()).hexdigest() for name in names], draw)

    return _Source(_key("testbed", split, number, seed, start), images)


def _folder(folder: Path, n: int | None, seed: int) -> _Source:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    chosen = [files[i] for i in _choose(len(files), n, seed, str(folder))]
    stats = [(p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in chosen]

    @functools.cache
    def images() -> _Images:
        digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in chosen]
        return _Images(digests, lambda i: _decode(chosen[i].read_bytes(), f"'{chosen[i]}'"))

    return _Source(_key("folder", stats), images)


def _parquet(file: Path, split: str, n: int | None, seed: int) -> _Source:
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.ParquetFile(file)
        columns = found.schema_arrow.names
        if "image" not in columns or (split and "split" not in columns):
            needed = "'image' and 'split'" if split else "'image'"
            raise UserError(f"Expected columns {needed} in '{file}', found: {', '.join(columns)}.")
        splits = found.read(["split"])["split"].to_pylist() if split else []
    except FileNotFoundError:
        raise UserError(f"Expected a parquet file at '{file}', found none; check the path.") from None
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"Expected a parquet file at '{file}', got something else; write it anew.") from error
    rows = [i for i, s in enumerate(splits) if s == split] if split else list(range(found.metadata.num_rows))
    if split and not rows:
        raise UserError(f"Expected a split in '{file}', got '{split}'.{nearest(split, sorted(set(splits)))}")
    chosen = [rows[i] for i in _choose(len(rows), n, seed, str(file))]

    @functools.cache
    def images() -> _Images:
        cells = pyarrow.parquet.read_table(file, columns=["image"])["image"].take(chosen).to_pylist()
        return _encoded(cells, chosen, str(file))

    stat = file.stat()
    return _Source(_key("parquet", file.name, stat.st_size, stat.st_mtime_ns, chosen), images)


def _hub(name: str, split: str, n: int | None, seed: int) -> _Source:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # datasets and the hub client each raise their own
        reason = (str(error).strip().splitlines() or [""])[0][:150]
        raise UserError(
            f"Expected testbed:SPLIT, a folder of images, a .parquet or .npz file or a reachable hub id, but '{name}' "
            f"cannot be loaded ({type(error).__name__}: {reason})."
        ) from error
    if (split or next(iter(loaded))) not in loaded or (not split and len(loaded) > 1):
        raise UserError(
            f"Expected one of the splits of '{name}' as {name}@SPLIT, got '{split}'.{nearest(split, loaded)}"
        )
    data = loaded[split or next(iter(loaded))]
    if not isinstance(data.features.get("image"), datasets.Image):
        raise UserError(f"Expected a column 'image' of images in '{name}', found: {data.column_names}.")
    chosen = _choose(len(data), n, seed, name)
    data = data.cast_column("image", datasets.Image(decode=False)).select(chosen)
    images = functools.cache(lambda: _encoded(data["image"], chosen, name))
    return _Source(_key("hub", name, split, data._fingerprint), images)


def _encoded(cells: Any, rows: list[int], name: str) -> _Images:
    """Read the images of a table's cells: encoded bytes, or ``{"bytes", "path"}``."""
    encoded: list[bytes] = []
    for row, cell in zip(rows, cells, strict=True):
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None and isinstance(cell, dict) and cell.get("path"):
            data = Path(cell["path"]).read_bytes()
        if not isinstance(data, bytes):
            kind = type(cell).__name__
            raise UserError(f"Expected an encoded image in row {row} of '{name}', got {kind}; remove the row.")
        encoded.append(data)
    digests = [hashlib.sha256(data).hexdigest() for data in encoded]
    return _Images(digests, lambda i: _decode(encoded[i], f"row {rows[i]} of '{name}'"))


def _decode(data: bytes, where: str) -> Image.Image:
    try:
        return decode_image(data)
    except UserError as error:
        raise UserError(f"Expected an image in {where}, but it cannot be read; remove it.") from error


def _choose(available: int, n: int | None, seed: int, where: str) -> list[int]:
    """Choose n indices, sorted: the first n of a seeded permutation, so that larger choices contain smaller ones."""
    if available < 2:
        raise UserError(f"Expected a reference of two or more images in '{where}', found {available}.")
    if n is None or n >= available:
        return list(range(available))
    return np.sort(np.random.default_rng(seed).permutation(available)[:n]).tolist()


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _cache_path(cache: str | os.PathLike[str], extractor: Extractor, pictures: _Source) -> Path:
    """Return the path, without suffix, of a reference's digests (.json) and statistics (.npz)."""
    return Path(cache) / "references" / f"{extractor.fingerprint}-{pictures.key}"


def _read_digests(cached: Path) -> list[str] | None:
    """Read the digests of a cached reference; None if it is incomplete."""
    if not cached.with_suffix(".json").is_file() or not cached.with_suffix(".npz").is_file():
        return None
    return read_json(cached.with_suffix(".json"))
