"""Load datasets of images with captions and targets: the testbed, files, image folders, the hub."""

from __future__ import annotations

import errno
import io
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from guidance.utils.errors import UserError, first_line, nearest
from guidance.utils.processes import launched

if TYPE_CHECKING:
    from datasets import Dataset

TESTBED = "testbed"
SPLITS = ("train", "validation", "test")

#: Scenes per split of the testbed when no number is given; one scene costs about 8 ms to draw.
TESTBED_SIZES = {"train": 4000, "validation": 1000, "test": 1000}

RATING_RANGE = (1, 10)

_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}
_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}
_HELD_OUT = 0.1  # share of train that becomes a missing validation or test split


def load_examples(
    source: str | os.PathLike[str] = TESTBED,
    split: str = "train",
    n: int | None = None,
    *,
    image_column: str = "image",
    caption_column: str | None = "caption",
    target_columns: Sequence[str] = ("rating",),
    rating_column: str | None = None,
    split_column: str = "split",
    group_column: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Load one split of a dataset and check its columns.

    A file may name the split of each row in ``split_column``.  A missing validation or test split is taken out of
    train, a tenth each, by a hash of the row number or of ``group_column``.

    Args:
        source: "testbed"; a parquet, CSV, TSV or JSON-lines file; a folder of images with metadata.csv or
            metadata.jsonl (``datasets``' imagefolder); or a hub id.
        split: "train", "validation" or "test".
        n: Number of examples, drawn by ``seed`` (of the testbed: the first n); None for all (of the testbed
            :data:`TESTBED_SIZES`).
        image_column: Column of encoded bytes, ``{"bytes": ...}``, or file names relative to the file.
        caption_column: Column of captions; None for a dataset without.
        target_columns: Further columns that must exist.
        rating_column: Column to check for numbers within 1..10; None checks none.
        split_column: Column of split names, see above.
        group_column: Rows with the same value stay in one split; set it to the caption column where several images
            share a prompt, so that no validation prompt was seen in training.
        seed: Seed of the testbed's world, and of the choice of n examples.

    Returns:
        A ``datasets.Dataset`` whose images decode with :func:`decode_image`.

    Raises:
        UserError: If there is no such dataset, split or column, or a rating is missing or out of range.
    """
    if split not in SPLITS:
        raise UserError(f"Expected a split, got '{split}'.{nearest(split, SPLITS)}")
    if n is not None and n < 1:
        raise UserError(f"Expected n of at least 1, or none for all examples, got {n}.")
    if source == TESTBED:
        from guidance.testbed.data import load_testbed

        workers = min(os.cpu_count() or 1, 4) if launched() == 1 else 1  # several processes draw in each
        dataset = load_testbed(split, TESTBED_SIZES[split] if n is None else n, seed=seed, workers=workers)
    else:
        wanted = [image_column, caption_column, *target_columns, rating_column, group_column]
        by_name = _load_all(source, split_column)
        for part in by_name.values():
            require_columns(part, [name for name in wanted if name], source)
            if rating_column:
                check_ratings(part[rating_column], rating_column)
        dataset = _choose_split(by_name, split, group_column, source)
        if n is not None and n < len(dataset):
            dataset = dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:n]))
    if not len(dataset):
        raise UserError(f"Expected examples in the split '{split}' of '{source}', found none; choose another.")
    return _keep_encoded(dataset, image_column, Path(source))


def require_columns(dataset: Dataset, columns: Sequence[str], source: str | os.PathLike[str]) -> None:
    """Refuse a dataset that lacks a column, and list its columns."""
    for column in columns:
        if column not in dataset.column_names:
            found = ", ".join(dataset.column_names)
            hint = nearest(column, dataset.column_names).partition(" Choices:")[0]
            raise UserError(f"Expected a column '{column}' in '{source}', found: {found}.{hint}")


def check_ratings(values: Sequence[Any], column: str = "rating") -> None:
    """Refuse ratings that are missing, not numbers, or out of 1..10; fractions (mean ratings) are fine.

    >>> check_ratings([3, 7.5, 10])
    >>> check_ratings([3, 11, 0])
    Traceback (most recent call last):
    guidance.utils.errors.UserError: Expected ratings from 1 to 10 in 'rating', got 11 in row 1 and 2 bad rows ...
    """
    low, high = RATING_RANGE
    good = [isinstance(v, int | float | np.number) and not isinstance(v, bool) and low <= v <= high for v in values]
    bad = np.flatnonzero(~np.asarray(good, bool)).tolist()
    if bad:
        rows = "1 bad row" if len(bad) == 1 else f"{len(bad)} bad rows"
        raise UserError(
            f"Expected ratings from {low} to {high} in '{column}', got {values[bad[0]]!r} in row {bad[0]} "
            f"and {rows} in all; correct or remove them, or train with task=regression for another range."
        )


def decode_image(value: Any, row: int = 0) -> Image.Image:
    """Decode a cell of an image column: a PIL image, encoded bytes, or a ``{"bytes", "path"}`` dict.

    Args:
        value: The cell.
        row: Row number, for errors.
    """
    try:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            value = io.BytesIO(value)
        if isinstance(value, str | os.PathLike | io.BytesIO):
            value = Image.open(value)
            value.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise UserError(f"Expected an image in row {row}, but it cannot be read ({error}); remove the row.") from error
    if not isinstance(value, Image.Image):
        raise UserError(f"Expected an image in row {row}, got {type(value).__name__}; choose another image column.")
    return value


def column_array(dataset: Dataset, name: str) -> NDArray[Any]:
    """Return a dataset column as an array that ``numpy.save`` stores without pickling.

    Whole numbers become int64, others float64 (missing ones NaN), text fixed-width Unicode, lists of numbers
    float32 rows; class labels become their names.
    """
    values = list(dataset[name])
    feature = dataset.features[name]
    if hasattr(feature, "int2str"):
        return np.asarray([feature.int2str(value) if value is not None else "" for value in values])
    known = [value for value in values if value is not None]
    if all(isinstance(value, bool | int | float) for value in known):
        whole = len(known) == len(values) and not any(isinstance(value, float) for value in known)
        return np.asarray(values, np.int64 if whole else np.float64)  # a missing one becomes NaN
    if all(isinstance(value, str) for value in known):
        return np.asarray([value or "" for value in values])
    try:
        return np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise UserError(
            f"Expected numbers, text or vectors of one length in the column '{name}', got {feature}; "
            "leave it out of target_columns."
        ) from None


def _choose_split(
    by_name: dict[str, Dataset], split: str, group_column: str | None, source: str | os.PathLike[str]
) -> Dataset:
    """Return a split by its name, or carve it out of the train split."""
    by_name = {_ALIASES.get(name, name): data for name, data in by_name.items()}
    if split in by_name and split != "train":
        return by_name[split]
    if "train" not in by_name:
        raise UserError(f"Expected a split '{split}' or 'train' in '{source}'.{nearest(split, by_name)}")
    dataset, missing = by_name["train"], [name for name in SPLITS[1:] if name not in by_name]
    groups = dataset[group_column] if group_column else range(len(dataset))
    hashed = np.asarray([zlib.crc32(str(group).encode()) / 2**32 for group in groups])
    bounds = {name: (i * _HELD_OUT, (i + 1) * _HELD_OUT) for i, name in enumerate(missing)}
    low, high = bounds.get(split, (len(missing) * _HELD_OUT, 1.0))
    return dataset.select(np.flatnonzero((low <= hashed) & (hashed < high)))


def _load_all(source: str | os.PathLike[str], split_column: str) -> dict[str, Dataset]:
    """Load every split of a file, folder or hub dataset by its name there."""
    import datasets

    path, suffix = Path(source), Path(source).suffix.lower()
    if path.is_file() and suffix not in _READERS:
        raise UserError(f"Expected a dataset file of a known kind, got '{source}'.{nearest(suffix, _READERS)}")
    try:
        if path.is_file():
            extra = {"sep": "\t"} if suffix == ".tsv" else {}
            loaded = datasets.load_dataset(_READERS[suffix], data_files=str(path), **extra)
            return _by_column(loaded["train"], split_column)
        if path.is_dir():
            return dict(datasets.load_dataset("imagefolder", data_dir=str(path)))
        return dict(datasets.load_dataset(os.fspath(source)))
    except Exception as error:  # datasets, pyarrow, pandas and the hub client each raise their own
        full_or_forbidden = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES)
        if isinstance(error, OSError) and error.errno in full_or_forbidden:
            raise
        hint = nearest(os.fspath(source), [TESTBED]).partition(" Choices:")[0]
        raise UserError(
            f"Expected '{TESTBED}', a data file, a folder of images or a reachable hub id, but '{source}' "
            f"cannot be loaded ({type(error).__name__}: {first_line(error)[:150]}).{hint}"
        ) from error


def _by_column(dataset: Dataset, split_column: str) -> dict[str, Dataset]:
    """Divide the rows of a file by its column of split names, if it has one."""
    if split_column not in dataset.column_names:
        return {"train": dataset}
    names = np.asarray([str(name) for name in dataset[split_column]])
    return {str(name): dataset.select(np.flatnonzero(names == name)) for name in np.unique(names)}


def _keep_encoded(dataset: Dataset, image_column: str, source: Path) -> Dataset:
    """Keep images encoded for :func:`decode_image`, which can name the row; resolve file names."""
    import datasets

    feature = dataset.features[image_column]
    if source.is_file() and getattr(feature, "dtype", None) in ("string", "large_string"):
        base = source.resolve().parent
        names = [os.fspath(base / name) if name else None for name in dataset[image_column]]
        dataset = dataset.remove_columns(image_column).add_column(image_column, names)
    return dataset.cast_column(image_column, datasets.Image(decode=False))
