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
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from eval.features.extractors import Extractor
from eval.features.store import features_of
from eval.metrics.frechet import FrechetDistance, load_statistics, save_statistics
from guidance.data.sources import TESTBED_SIZES, decode_image
from guidance.utils.errors import UserError, first_line, nearest
from guidance.utils.images import IMAGE_SUFFIXES
from guidance.utils.io import read_json, write_json

_CHUNK = 4096  # features added to the sums at once


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference set in the features of one network."""

    name: str  # the source
    n: int  # images; 0 where a file of statistics does not say
    features: Float[np.ndarray, "n d"] | None  # float32; None where only statistics are known
    mu: Float[np.ndarray, " d"]  # float64
    sigma: Float[np.ndarray, "d d"]  # covariance (ddof 1), float64


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
        mu, sigma, number = load_statistics(name)
        return Reference(name, number or 0, None, mu, sigma)
    pictures = _open_source(name, n, seed)
    cached = None if cache is None else _cache_path(cache, extractor, pictures)
    known = _read_digests(cached) if cached else None
    digests = known or pictures.digests()
    features = features_of(pictures.open, digests, extractor, cache, progress=progress)
    mu, sigma = load_statistics(cached.with_suffix(".npz"))[:2] if cached and known else statistics(features)
    if cached and not known:
        save_statistics(cached.with_suffix(".npz"), mu, sigma, len(features))
        write_json(cached.with_suffix(".json"), digests)  # last: it marks the entry as complete
    return Reference(name, len(features), features, mu, sigma)


def fill_reference(
    source: str | os.PathLike[str],
    extractor: Extractor,
    *,
    n: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str],
    **shared: Any,
) -> None:
    """Compute this process's share of a reference's features, for `load_reference` to find after a barrier.

    Arguments and errors as for `load_reference`, further ones as for `eval.features.store.features_of`.
    """
    if (name := os.fspath(source)).endswith(".npz"):
        return
    pictures = _open_source(name, n, seed)
    if _read_digests(_cache_path(cache, extractor, pictures)) is None:
        features_of(pictures.open, pictures.digests(), extractor, cache, **shared)


def statistics(features: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Return mean and covariance (ddof 1), float64, from sums, in memory that does not grow with n."""
    sums = FrechetDistance(features.shape[1])
    for start in range(0, len(features), _CHUNK):
        sums.update(features[start : start + _CHUNK], real=True)
    mu, sigma = sums.statistics(real=True)
    return mu.numpy(), sigma.numpy()


class _Source(NamedTuple):
    """Images, in one order, that are read only when needed."""

    key: str  # in the cache
    digests: Callable[[], list[str]]  # of the files
    open: Callable[[int], Image.Image]


def _open_source(name: str, n: int | None, seed: int) -> _Source:
    if n is not None and n < 2:
        raise UserError(f"Expected a reference of two or more images, got n={n}.")
    if name == "testbed" or name.startswith("testbed:"):
        return _testbed(name, n, seed)
    if Path(name).is_dir():
        return _folder(Path(name), n, seed)
    path, _, split = (name, "", "") if name.endswith(".parquet") or "@" not in Path(name).name else name.rpartition("@")
    if not path.endswith(".parquet") and (Path(path).suffix.lower() in IMAGE_SUFFIXES or Path(path).is_file()):
        raise UserError(
            f"Expected a folder of images, a .parquet or an .npz file, got the file '{name}'; name its folder."
        )
    return _table(path, split, n, seed)


def _testbed(name: str, n: int | None, seed: int) -> _Source:
    from guidance.testbed.render import render, render_scenes
    from guidance.testbed.scenes import sample_scene, scenes

    split = name.partition(":")[2]
    if split not in TESTBED_SIZES:
        choices = [f"testbed:{s}" for s in TESTBED_SIZES]
        raise UserError(f"Expected a split of the testbed, got '{name}'.{nearest(name, choices)}")
    number = n or TESTBED_SIZES[split]
    start = _digest(render_scenes(scenes(split, 4, seed=seed)).tobytes())

    @functools.lru_cache(number)  # a second network sees the same pictures
    def draw(i: int) -> Image.Image:
        return Image.fromarray(render(sample_scene(split, i, seed)))

    # identified without being drawn: the first few identify the renderer
    digests = [_digest(f"{split} {seed} {i} {start}".encode()) for i in range(number)]
    return _Source(_key("testbed", split, number, seed, start), lambda: digests, draw)


def _folder(folder: Path, n: int | None, seed: int) -> _Source:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    chosen = [files[i] for i in _choose(len(files), n, seed, str(folder))]
    stats = [(p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in chosen]
    return _Source(
        _key("folder", stats),
        lambda: [_digest(p.read_bytes()) for p in chosen],
        lambda i: _decode(chosen[i].read_bytes(), f"'{chosen[i]}'"),
    )


def _table(name: str, split: str, n: int | None, seed: int) -> _Source:
    """Open a parquet file or a dataset of the hub."""
    import datasets

    try:
        splits = _read_splits(name)
    except Exception as error:  # datasets, pyarrow and the hub client each raise their own
        raise UserError(
            f"Expected testbed:SPLIT, a folder of images, a .parquet or .npz file or a reachable hub id, but '{name}' "
            f"cannot be loaded ({type(error).__name__}: {first_line(error)[:150]})."
        ) from error
    if not split and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        hint = nearest(split, filter(None, splits))
        raise UserError(f"Expected one of the splits of '{name}' as {name}@SPLIT, got '{split}'.{hint}")
    data = splits[split]
    if "image" not in data.column_names:
        raise UserError(f"Expected a column 'image' in '{name}', found: {', '.join(data.column_names)}.")
    if isinstance(data.features["image"], datasets.Image):
        data = data.cast_column("image", datasets.Image(decode=False))
    chosen = _choose(len(data), n, seed, name)
    data = data.select(chosen)

    @functools.cache
    def encoded() -> list[bytes]:
        return [_encoded(cell, f"row {row} of '{name}'") for row, cell in zip(chosen, data["image"], strict=True)]

    return _Source(
        _key("table", name, split, data._fingerprint),
        lambda: [_digest(cell) for cell in encoded()],
        lambda i: _decode(encoded()[i], f"row {chosen[i]} of '{name}'"),
    )


def _read_splits(name: str) -> dict[str, Any]:
    """Load a dataset by split: of a parquet file all rows, "", and those of each value in the column ``split``."""
    import datasets

    if not name.endswith(".parquet"):
        return dict(datasets.load_dataset(name))
    rows = datasets.load_dataset("parquet", data_files=name)["train"]
    names = np.array(rows["split"] if "split" in rows.column_names else [])
    return {"": rows} | {str(split): rows.select(np.flatnonzero(names == split)) for split in np.unique(names)}


def _encoded(cell: Any, where: str) -> bytes:
    """Read a table's cell: an encoded image, or ``{"bytes", "path"}``."""
    data = cell
    if isinstance(cell, dict):
        data = Path(cell["path"]).read_bytes() if cell.get("bytes") is None and cell.get("path") else cell.get("bytes")
    if not isinstance(data, bytes):
        raise UserError(f"Expected an encoded image in {where}, got {type(cell).__name__}; remove the row.")
    return data


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
    return _digest(json.dumps(parts).encode())[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _cache_path(cache: str | os.PathLike[str], extractor: Extractor, pictures: _Source) -> Path:
    """Return the path, without suffix, of a reference's digests (.json) and statistics (.npz)."""
    return Path(cache) / "references" / f"{extractor.fingerprint}-{pictures.key}"


def _read_digests(cached: Path) -> list[str] | None:
    """Read the digests of a cached reference; None if it is incomplete."""
    complete = all(cached.with_suffix(suffix).is_file() for suffix in (".json", ".npz"))
    return read_json(cached.with_suffix(".json")) if complete else None
