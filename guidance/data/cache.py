"""Write and read cached features: memory-mapped shards of (h, t, targets), written once and read many times.

A cache is a folder::

    manifest.json            how the features were computed, and how many rows and shards each split has
    train/shard-00000/       a shard appears complete or not at all
        h.npy                features, float16 (n, c, y, x)
        t.npy                timesteps, float32 (n,)
        COLUMN.npy           one file per target column
    validation/ ...

A shard depends on its index alone, so any number of processes writes the same bytes, and a killed run continues
with the missing shards.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from guidance.utils.errors import UserError, nearest
from guidance.utils.io import atomic_dir, atomic_path, read_json, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_OPEN_SHARDS = 64  # memory maps kept open: each takes a file descriptor


@runtime_checkable
class FeatureSource(Protocol):
    """Rows of features and targets, from a cache or computed on the fly."""

    def __len__(self) -> int:
        """Number of rows."""

    def column(self, name: str) -> NDArray[Any]:
        """Return all values of a target column, (n, ...)."""

    def read(self, rows: Sequence[int] | NDArray[np.int64], epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return features (b, c, y, x) and timesteps (b,) of rows; a live source draws new noise each epoch."""


class FeatureCache:
    """Read a cache without loading it: a batch touches its own rows only.

    Args:
        folder: A folder written by :func:`guidance.data.features.cache_features`.
        split: Read this split only; None reads all of them, in the order of the manifest.

    Attributes:
        manifest: Content of ``manifest.json``.
        columns: Names of the target columns.

    Raises:
        UserError: If the folder is not a cache, or a shard is missing or cut short.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise UserError(
                f"Expected a feature cache in '{folder}', found no {MANIFEST}; write one with "
                "'python -m train.cache_features'."
            )
        self.manifest: dict[str, Any] = read_json(self.folder / MANIFEST)
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise UserError(f"Expected a cache of format {FORMAT_VERSION} in '{folder}'; cache it again.")
        self.columns: list[str] = list(self.manifest["settings"]["target_columns"])
        splits: dict[str, dict[str, int]] = self.manifest["splits"]
        if split is not None and split not in splits:
            raise UserError(f"Expected the split '{split}' in the cache '{folder}'.{nearest(split, splits)}")
        rows = {k: len(part) for s in ([split] if split else splits) for k, part in _shards(s, **splits[s]).items()}
        self._shards, self._ends = [self.folder / name for name in rows], np.cumsum(list(rows.values()))
        self.feature_shape = self._check_shards(rows)
        self._map = functools.lru_cache(_OPEN_SHARDS)(lambda shard: _open(self._shards[shard] / "h.npy"))
        self._t = self._load("t")

    def select(self, split: str) -> FeatureCache:
        """Return the part of the cache that belongs to a split."""
        return FeatureCache(self.folder, split)

    @property
    def splits(self) -> list[str]:
        """Names of the splits in the cache."""
        return list(self.manifest["splits"])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def column(self, name: str) -> NDArray[Any]:
        """Return all values of a target column, or of "t", (n, ...).

        Raises:
            UserError: If the cache has no such column; the message lists those it has.
        """
        if name == "t":
            return self._t
        if name not in self.columns:
            raise UserError(
                f"Expected a column '{name}' in the cache '{self.folder}', found: {', '.join(self.columns)}; "
                "cache the features again with it among target_columns, in another folder."
            )
        return self._load(name)

    def read(
        self, rows: Sequence[int] | NDArray[np.int64], epoch: int = 0
    ) -> tuple[Float[Tensor, "b c y x"], Float[Tensor, " b"]]:
        """Read features (float16) and timesteps (float32) of rows, in the order asked for.

        Args:
            rows: Row numbers.
            epoch: Without effect: cached noise is the same in every epoch.
        """
        rows = np.asarray(rows, np.int64)
        h = np.empty((len(rows), *self.feature_shape), np.float16)
        shards = np.searchsorted(self._ends, rows, side="right")
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            h[here] = self._map(shard)[rows[here] - (self._ends[shard - 1] if shard else 0)]
        return torch.from_numpy(h), torch.from_numpy(self._t[rows])

    def _load(self, name: str) -> NDArray[Any]:
        """Load a small array of all shards."""
        return np.concatenate([np.asarray(_open(shard / f"{name}.npy")) for shard in self._shards])

    def _check_shards(self, rows: Mapping[str, int]) -> tuple[int, int, int]:
        """Check every shard against the manifest and return the shape of one row's features."""
        missing = [name for name in rows if not (self.folder / name).is_dir()]
        if missing:
            raise UserError(
                f"Expected {len(rows)} shards in the cache '{self.folder}', but {len(missing)} are missing, the first "
                f"is {missing[0]}: caching was cut short; run the same command again to finish it."
            )
        files = ("h", "t", *self.columns)
        shapes = [_check_shard(path, n, files) for path, n in zip(self._shards, rows.values(), strict=True)]
        for path, shape in zip(self._shards, shapes, strict=True):
            if shape != shapes[0]:
                raise _broken(path, f"its features have shape {shape}, those of the first shard {shapes[0]}")
        return shapes[0][0], shapes[0][1], shapes[0][2]


def write_shards(
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    split: str,
    rows: int,
    per_shard: int,
    compute: Callable[[range, Callable[[int], Any]], Mapping[str, NDArray[Any]]],
    *,
    label: str,
    unit: str = "row",
    files: Sequence[str] | None = None,
    state: Any = None,
    progress: bool = True,
) -> int:
    """Compute the shards of a split that are missing or broken; each appears complete or not at all.

    Args:
        folder: The cache; its manifest is written before its first shard.
        settings: What decides its content, for the manifest; a folder with others is refused.
        split: Name of the split.
        rows, per_shard: Rows of the split, and of each shard but the last.
        compute: Returns the arrays of a range of rows by name; calls its second argument with numbers of rows done.
        label, unit: Of the progress bar.
        files: Names of the arrays; None for a single one, whose file is the shard.
        state: Processes that share the shards and all call this (accelerate's state); None for one process.
        progress: Show a progress bar on the main process, of its own share.

    Returns:
        Number of rows that this process computed, without those that existed.

    Raises:
        UserError: If the folder has other settings, or another plan of the split.
    """
    folder, plan = Path(folder), {"rows": rows, "rows_per_shard": per_shard}
    record = functools.partial(_record_plan, folder, settings, split, plan)
    record(write=False)
    index, processes = (state.process_index, state.num_processes) if state else (0, 1)
    shards = [(folder / f"{name}{'' if files else '.npy'}", part) for name, part in _shards(split, **plan).items()]
    todo = [s for s in shards[index::processes] if not _has_shard(s[0], len(s[1]), files)]
    total = sum(len(part) for _, part in todo)
    with tqdm(total=total, desc=label, unit=unit, disable=not progress or index > 0 or not todo) as bar:
        for path, part in todo:
            arrays = compute(part, bar.update)
            record(write=True)  # not before: a refused run leaves nothing
            with (atomic_dir if files else atomic_path)(path) as temporary:
                for name, values in arrays.items():
                    file = temporary / f"{name}.npy" if files else temporary
                    file.parent.mkdir(parents=True, exist_ok=True)  # a hub id in a name has a slash
                    np.save(file, values)
    record(write=index == 0)
    return total


def _record_plan(
    folder: Path, settings: Mapping[str, Any], split: str, plan: Mapping[str, int], *, write: bool
) -> None:
    """Check the plan of a split against the recorded one, or record it."""
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "settings": settings, "splits": {}}
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST)
        old, new = manifest["settings"] | manifest["splits"].get(split, plan), {**settings, **plan}
        key = first_difference(old, new)
        if key is not None:
            raise UserError(
                f"Expected the settings of the cache in '{folder}', got another {key}: {new.get(key)} "
                f"instead of {old.get(key)}; choose another folder, or delete this one."
            )
    if write and split not in manifest["splits"]:
        manifest["splits"][split] = plan
        write_json(folder / MANIFEST, manifest)


def _shards(split: str, rows: int, rows_per_shard: int) -> dict[str, range]:
    """Return the rows of each shard of a split by its name inside the folder."""
    starts = range(0, rows, rows_per_shard)
    return {f"{split}/shard-{k:05d}": range(i, min(i + rows_per_shard, rows)) for k, i in enumerate(starts)}


def _has_shard(path: Path, rows: int, files: Sequence[str] | None) -> bool:
    """Tell whether a shard is complete; remove what a killed run left of it."""
    for leftover in path.parent.glob(f"*{path.stem}.tmp-*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    try:
        _check_shard(path, rows, files)
    except UserError:
        return False
    return True


def _check_shard(path: Path, rows: int, files: Sequence[str] | None) -> tuple[int, ...]:
    """Check that a shard is complete and return the shape (c, y, x) of one row's features, if it has some.

    Raises:
        UserError: If a file is missing, cut short or has another number of rows.
    """
    shape: tuple[int, ...] = ()
    for file in [path] if files is None else [path / f"{name}.npy" for name in files]:
        array, is_features = _open(file), file.name == "h.npy"
        if len(array) != rows or (is_features and array.ndim != 4):
            raise _broken(file, f"it has shape {array.shape} instead of {rows} rows")
        shape = array.shape[1:] if is_features else shape
    return shape


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Return the first key, by name, in which two plans of a cache differ; None if they are the same."""
    return min((key for key in old.keys() | new.keys() if old.get(key) != new.get(key)), default=None)


def _open(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise _broken(path, "it is missing") from None
    except (ValueError, EOFError) as error:
        raise _broken(path, "it is cut short") from error


def _broken(path: Path, reason: str) -> UserError:
    return UserError(
        f"Expected a complete shard of a feature cache, but '{path}' cannot be used: {reason}; run the same "
        "caching command again, which rewrites it."
    )
