"""Cache of image features on the disk, keyed by the hash of the image's file: each image is embedded only once.

A folder for each network and kind of output holds ``header.json`` and ``rows-*.bin``: rows of 32 bytes (SHA-256 of the
image's file) and d little-endian float32.  Every process appends to a file of its own, a batch in one synchronised
write, so that processes and runs never disturb each other; a kill leaves at most one torn last row, which is ignored.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float
from PIL import Image
from tqdm.auto import tqdm

from guidance.utils.errors import UserError
from guidance.utils.io import append_bytes, read_json, write_json

What = Literal["embed", "probabilities"]

_FORMAT = "image features 1"
_BATCH = 64


class FeatureStore:
    """Features of one network, in a folder that several processes may fill.

    Args:
        folder: Created with the first rows.
        extractor_key: What the features depend on besides the image; a folder belongs to one key.
        extractor_name: For people who look into the header.
        process_index: Shown in the names of files.

    Raises:
        UserError: If the folder is damaged, or holds the features of something else.
    """

    width: int | None = None

    def __init__(
        self, folder: str | os.PathLike[str], extractor_key: str, *, extractor_name: str = "", process_index: int = 0
    ) -> None:
        self.folder, self.key, self.extractor_name = Path(folder), extractor_key, extractor_name
        self._header = self.folder / "header.json"
        self._file = self.folder / f"rows-{process_index}-{uuid.uuid4().hex[:12]}.bin"
        self._read_header()

    def get(self, digests: Sequence[str]) -> dict[str, Float[np.ndarray, " d"]]:
        """Return the cached features by digest; digests are SHA-256 of images' files in hex."""
        self._read_header()  # another process may have begun the folder
        wanted = {bytes.fromhex(digest): digest for digest in digests}
        found: dict[str, np.ndarray] = {}
        for file in sorted(self.folder.glob("rows-*.bin")) if wanted and self.width else ():
            count = file.stat().st_size // self._row.itemsize  # complete rows
            rows = np.memmap(file, self._row, "r", shape=(count,)) if count else np.empty(0, self._row)
            names = rows["digest"].tobytes()
            for i in range(count):
                if (key := names[32 * i : 32 * i + 32]) in wanted:
                    found[wanted[key]] = rows["features"][i]
        return found

    def add(self, digests: Sequence[str], features: Float[np.ndarray, "n d"]) -> None:
        """Append rows; all of them are on the disk when this returns."""
        assert features.shape == (len(digests), self.width or features.shape[1]), features.shape
        if self.width is None or not self._header.is_file():
            self.width = features.shape[1]
            write_json(self._header, self._described)
        rows = np.empty(len(digests), self._row)
        rows["digest"] = [np.frombuffer(bytes.fromhex(digest), np.uint8) for digest in digests]
        rows["features"] = features
        append_bytes(self._file, rows.tobytes())  # all or nothing, so that later rows are aligned

    @property
    def _row(self) -> np.dtype[Any]:
        return np.dtype([("digest", np.uint8, 32), ("features", "<f4", (self.width,))])

    @property
    def _described(self) -> dict[str, Any]:
        described = {"format": _FORMAT, "extractor": self.extractor_name, "fingerprint": self.key}
        return described | {"width": self.width, "dtype": "<f4"}

    def _read_header(self) -> None:
        """Validate the folder and learn its width."""
        # look for rows first: a process that begins the folder at this moment writes its header before them
        has_rows = any(self.folder.glob("rows-*.bin"))
        if not self._header.is_file():
            if has_rows:
                raise UserError(
                    f"Expected '{self._header}' beside the features in that folder, found none; remove the folder, "
                    "the features are computed again."
                )
            return
        header = read_json(self._header)
        header = header if isinstance(header, dict) else {}
        self.width = self.width or header.get("width")
        expected = header | self._described | {"extractor": header.get("extractor")}
        if header != expected or not isinstance(self.width, int) or self.width < 1:
            raise UserError(
                f"Expected the features of '{self.extractor_name}' in '{self.folder}', but its header.json says "
                "otherwise; remove the folder or choose another."
            )


class Embedder(Protocol):
    """Maps images to numbers: an `Extractor` or a `Formula`; its ``batch_size`` is used if it has one."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def embed(self, images: Any) -> np.ndarray: ...


def features_of(
    open_image: Callable[[int], Image.Image],
    digests: Sequence[str],
    extractor: Embedder,
    folder: str | os.PathLike[str] | None = None,
    *,
    what: What = "embed",
    progress: str | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> Float[np.ndarray, "n d"]:
    """Return the features of images, computed once and then read from the disk.

    Args:
        open_image: Opens the image at an index into ``digests``; called only where its features are missing, once for
            equal digests.
        digests: SHA-256 of the images' files, in hex.
        extractor: Computes the features.
        folder: Cache, shared by all networks and runs; None caches nothing.
        what: "embed", or "probabilities" of a `ClassExtractor`.
        progress: Title of a progress bar; None shows none.
        process_index, num_processes: Each of several processes computes its share of the images; rows of other shares
            that are still missing are NaN: call again, as one process, after all have returned.

    Returns:
        float32, rows in the order of ``digests``.

    Raises:
        UserError: If the cache is damaged, the network cannot take an image or gives features that are not finite.
    """
    first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
    unique = list(dict.fromkeys(digests))
    store, found = None, dict[str, np.ndarray]()
    if folder is not None:
        place = Path(folder) / re.sub(r"[^\w.-]", "_", f"{extractor.fingerprint}-{what}")
        store = FeatureStore(place, extractor.fingerprint, extractor_name=extractor.name, process_index=process_index)
        found = store.get(unique)
        # a share of all images, not of the missing ones: processes that begin at different times see different gaps
        unique = unique[process_index::num_processes]
    missing, batch = [d for d in unique if d not in found], getattr(extractor, "batch_size", _BATCH)
    with tqdm(total=len(missing), desc=progress, unit="image", disable=not (progress and missing)) as bar:
        for part in (missing[i : i + batch] for i in range(0, len(missing), batch)):
            images = [open_image(first[digest]) for digest in part]
            features = getattr(extractor, what)(images)
            if not np.isfinite(features).all():
                name = extractor.name
                raise UserError(f"Expected finite features from '{name}', got NaN or infinity; check its weights.")
            if store:
                store.add(part, features)
            found.update(zip(part, features, strict=True))
            bar.update(len(part))
    missing_row = np.full(len(next(iter(found.values()), ())), np.nan, np.float32)
    if num_processes == 1 and not all(np.isfinite(row).all() for row in found.values()):
        raise UserError(f"Expected finite features in '{folder}', found NaN or infinity; remove the folder.")
    return np.stack([found.get(digest, missing_row) for digest in digests]).astype(np.float32, copy=False)
