"""Read cached features: memory-mapped shards of (h, t, targets), written once and read many times.

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

import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from guidance.utils.errors import UserError, nearest
from guidance.utils.io import read_json

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


def shard_name(split: str, index: int) -> str:
    """Return the folder of a shard inside its cache."""
    return f"{split}/shard-{index:05d}"


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
        self._shards: list[str] = []
        rows: list[int] = []
        for name in [split] if split else splits:
            per_shard, total = splits[name]["rows_per_shard"], splits[name]["rows"]
            for index, first in enumerate(range(0, total, per_shard)):
                self._shards.append(shard_name(name, index))
                rows.append(min(per_shard, total - first))
        self._ends = np.cumsum(rows)
        self._maps: OrderedDict[int, NDArray[np.float16]] = OrderedDict()
        self.feature_shape = self._check_shards(rows)
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
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            first = self._ends[shard - 1] if shard else 0
            h[here] = self._map(int(shard))[rows[here] - first]
        return torch.from_numpy(h), torch.from_numpy(self._t[rows])

    def _map(self, shard: int) -> NDArray[np.float16]:
        """Memory-map the features of a shard; the least recently used maps are dropped."""
        if shard not in self._maps:
            self._maps[shard] = _open(self.folder / self._shards[shard] / "h.npy")
            if len(self._maps) > _OPEN_SHARDS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(shard)
        return self._maps[shard]

    def _load(self, name: str) -> NDArray[Any]:
        """Load a small array of all shards."""
        return np.concatenate([np.asarray(_open(self.folder / s / f"{name}.npy")) for s in self._shards])

    def _check_shards(self, rows: Sequence[int]) -> tuple[int, int, int]:
        """Check every shard against the manifest and return the shape of one row's features."""
        missing = [s for s in self._shards if not (self.folder / s).is_dir()]
        if missing:
            raise UserError(
                f"Expected {len(self._shards)} shards in the cache '{self.folder}', but {len(missing)} are "
                f"missing, the first is {missing[0]}: caching was cut short; run the same command "
                "again to finish it."
            )
        shapes = [
            check_shard(self.folder / shard, n, self.columns) for shard, n in zip(self._shards, rows, strict=True)
        ]
        other = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
        if other is not None:
            reason = f"its features have shape {shapes[other]}, those of the first shard {shapes[0]}"
            raise _broken(self.folder / self._shards[other], reason)
        return shapes[0]


def check_shard(folder: Path, rows: int, columns: Sequence[str]) -> tuple[int, int, int]:
    """Check that a shard is complete and return the shape (c, y, x) of one row's features.

    Raises:
        UserError: If a file is missing, cut short or has another number of rows.
    """
    shape: tuple[int, ...] = ()
    for name in ("h", "t", *columns):
        path = folder / f"{name}.npy"
        array = _open(path)
        if len(array) != rows or (name == "h" and array.ndim != 4):
            raise _broken(path, f"it has shape {array.shape} instead of {rows} rows")
        shape = array.shape[1:] if name == "h" else shape
    return (shape[0], shape[1], shape[2])


def has_shard(folder: Path, rows: int, columns: Sequence[str]) -> bool:
    """Tell whether a shard is complete; remove the leftovers of a killed run."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        check_shard(folder, rows, columns)
    except UserError:
        return False
    return True


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
