"""Load pairs for image editing: an image, its caption, an instruction, and the caption of the edited image."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from guidance.data.prompts import slug, unreachable
from guidance.data.sources import decode_image
from guidance.data.tables import READERS, find_key, read_rows, require_cell
from guidance.utils.errors import UserError, first_line, nearest

#: Column names in order of preference, in any letter case: of the instruct-pix2pix dataset on the hub, of the testbed,
#: and of the published human-written-prompts.jsonl.
TEXT_COLUMNS = {
    "caption": ("original_prompt", "caption", "input"),
    "instruction": ("edit_prompt", "instruction", "edit"),
    "edited_caption": ("edited_prompt", "edited_caption", "output"),
}

IMAGE_COLUMNS = {
    "image_data": ("original_image", "image", "input_image"),
    "edited_image_data": ("edited_image", "output_image"),
}

#: Named pairs on the hub; only the requested rows are streamed (the first holds 63 GB).
HUB_PAIRS = {"instruct-pix2pix": "timbrooks/instructpix2pix-clip-filtered"}

TESTBED_PAIRS = {"testbed": "test", **{f"testbed:{split}": split for split in ("test", "validation", "train")}}

_TESTBED_DEFAULT = 64
_SHUFFLED = 256  # rows of the hub among which the next one is drawn


@dataclasses.dataclass(frozen=True)
class EditPair:
    """An image and the edit to make.

    Attributes:
        id: Unique name within its source, of set and row, fit for a file name.
        caption, edited_caption: Captions of the image before and after the edit.
        instruction: The edit in words.
        image_data, edited_image_data: Encoded images, or their paths; None where the source has none.
    """

    id: str
    caption: str
    instruction: str
    edited_caption: str
    image_data: Any = dataclasses.field(default=None, repr=False, compare=False)
    edited_image_data: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def image(self) -> Image.Image | None:
        """Decode the image; None where the source has none."""
        return None if self.image_data is None else decode_image(self.image_data).convert("RGB")

    @property
    def edited_image(self) -> Image.Image | None:
        """Decode the edited image; None where the source has none."""
        return None if self.edited_image_data is None else decode_image(self.edited_image_data).convert("RGB")


def load_edit_pairs(source: str | os.PathLike[str], n: int | None = None, seed: int = 0) -> list[EditPair]:
    """Load edit pairs, without incomplete ones and repetitions of the same texts.

    Args:
        source: "testbed:test" (or validation, train); "instruct-pix2pix"; a file of ``READERS``, whose image
            columns hold paths relative to it, or, in parquet, images; a folder of a dataset; or a hub id.
            Columns are those of :data:`TEXT_COLUMNS` and :data:`IMAGE_COLUMNS`.
        n: Number of pairs; None for all (64 of the endless testbed; required for the hub).  ``n=m`` gives the first
            m of a larger n.  A source with fewer gives all.
        seed: Seed of choice and order; with ``n=None`` a file keeps its own order.

    Raises:
        UserError: If the source does not exist, lacks a column of texts, or holds no pair.
    """
    if n is not None and n < 1:
        raise UserError(f"Expected at least one edit pair, got n={n}.")
    name, path = str(source), Path(source).expanduser()
    if name in TESTBED_PAIRS:
        from guidance.testbed.data import draw_edit_pairs

        split = TESTBED_PAIRS[name]
        rows = _encoded(draw_edit_pairs(split, _TESTBED_DEFAULT if n is None else n, seed=seed))
        tag = f"testbed-{split}-edit" + (f"-s{seed}" if seed else "")
        return list(_pairs(tag, rows, "the testbed", unique=False))  # the n-th pair is of the n-th scene
    if path.is_file() or path.is_dir():
        found = list(_pairs(slug(path.stem), _rows(path), f"'{path}'"))
    elif path.suffix.lower() in READERS or ("/" not in name and name not in HUB_PAIRS):
        raise UserError(
            f"Expected edit pairs by name, a file, a folder or a hub id, found none called '{name}'."
            f"{nearest(name, [*TESTBED_PAIRS, *HUB_PAIRS])}"
        )
    else:
        return _from_hub(name, n, seed)
    if not found:
        raise UserError(f"Expected edit pairs in '{path}', found none with all three texts; write at least one.")
    if n is None:
        return found
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:n]]


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a file or folder, images encoded or as absolute paths."""
    if path.is_dir() or path.suffix.lower() == ".parquet":
        import datasets

        where = {"path": str(path)} if path.is_dir() else {"path": "parquet", "data_files": str(path)}
        try:
            return _encoded(datasets.load_dataset(**where, split="train"))
        except Exception as error:  # datasets and pyarrow each raise their own
            raise UserError(
                f"Expected a dataset of edit pairs in '{path}', cannot load it ({first_line(error)[:120]})."
            ) from error
    if path.suffix.lower() not in READERS:
        raise UserError(f"Expected a file that ends in {', '.join(READERS)}, got '{path}'; convert it.")
    base = path.resolve().parent
    rows = [dict(row) for row in read_rows(path)]
    for row in rows:
        for key in (find_key(row, names) for names in IMAGE_COLUMNS.values()):
            if key is not None and isinstance(row[key], str):
                row[key] = os.fspath(base / row[key]) if row[key] else None
    return rows


def _from_hub(name: str, n: int | None, seed: int) -> list[EditPair]:
    import datasets

    if n is None:
        raise UserError(f"Expected the number of pairs to take from '{name}' on the hub, got none; give n.")
    hub = HUB_PAIRS.get(name, name)
    try:
        stream: Any = datasets.load_dataset(hub, split="train", streaming=True)
        rows = _encoded(stream.shuffle(seed=seed, buffer_size=_SHUFFLED))
        pairs = _pairs(slug(name.rpartition("/")[2]), rows, f"'{name}'", by_content=True)
        return [pair for pair, _ in zip(pairs, range(n), strict=False)]
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub client each raise their own
        file = f"a parquet file of huggingface.co/datasets/{hub}"
        if name in HUB_PAIRS:
            file += " or human-written-prompts.jsonl (without images) from instruct-pix2pix.eecs.berkeley.edu"
        raise unreachable("edits", name, hub, error, file) from error


def _encoded(data: Any) -> Any:
    """Keep images encoded; the pairs decode them."""
    import datasets

    for key, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(key, datasets.Image(decode=False))
    return data


def _pairs(
    tag: str, rows: Iterable[Mapping[str, Any]], where: str, *, unique: bool = True, by_content: bool = False
) -> Iterator[EditPair]:
    seen: set[tuple[str, ...]] = set()
    for index, row in enumerate(rows):
        cells = (require_cell(row, names, where, f"{key}s") for key, names in TEXT_COLUMNS.items())
        texts = tuple(" ".join(str(cell).split()) for cell in cells)
        if not all(texts) or (unique and texts in seen):
            continue
        seen.add(texts)
        keys = {field: find_key(row, names) for field, names in IMAGE_COLUMNS.items()}
        images = {field: row[key] for field, key in keys.items() if key is not None}
        # a stream comes in shuffled order: its rows have no numbers
        number = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:10] if by_content else f"{index:04d}"
        yield EditPair(f"{tag}-{number}", *texts, **images)
