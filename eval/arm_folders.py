"""Folders of images, with records or without: one image and what is known of it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from guidance.encoding import to_rgb
from guidance.errors import UserError
from guidance.prompt_files import read_rows, require_cell
from guidance.records import Record, RecordStore

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as image folders of datasets have them


@dataclasses.dataclass(frozen=True)
class ArmImage:
    """One image of an arm.

    Attributes:
        file: Where it is.
        digest: SHA-256 of its bytes, hexadecimal.
        prompt_id, prompt, category, challenge, seed: As in a record.  A folder without prompts has "" and the
            file's name as ``prompt_id``.
        record: How it was made; None in plain folders.
    """

    file: Path
    digest: str
    prompt_id: str
    prompt: str = ""
    category: str = ""
    challenge: str = ""
    seed: int = 0
    record: Record | None = None

    @property
    def pair(self) -> tuple[str, int]:
        """What images of one pair share."""
        return self.prompt_id, self.seed

    def open(self) -> Image.Image:
        """Read it as RGB."""
        with Image.open(self.file) as opened:
            image = to_rgb(opened)
        image.info["prompt"] = (
            self.prompt
        )  # as a PNG's text chunk would say; heads that know captions read it
        return image


def read_folder(folder: Path, prompts: str | os.PathLike[str] | None = None) -> dict[str, list[ArmImage]]:
    """Read what is in a folder; images are not opened.

    Args:
        folder: With ``records.jsonl``, or of images, at any depth.
        prompts: As of :func:`eval.arm_images.load_arms`.

    Returns:
        Arm -> images; a plain folder is one arm, called like it.

    Raises:
        UserError: If there is no such folder, it has no images, or the table of prompts does not fit.
    """
    if not folder.is_dir():
        raise UserError(f"Expected a folder of images at '{folder}', found none; check the path.")
    if not any(folder.glob("records*.jsonl")):
        return {folder.resolve().name: _read_plain(folder, prompts)}
    arms: dict[str, list[ArmImage]] = {}
    for r in RecordStore(folder).load(check=None):
        told = (r.prompt_id, r.prompt, r.category, r.challenge, r.seed, r)
        arms.setdefault(r.arm, []).append(ArmImage(folder / r.image, r.sha256, *told))
    return arms


def _read_plain(folder: Path, prompts: Any) -> list[ArmImage]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"Expected images ({', '.join(SUFFIXES)}) or records in '{folder}', found none.")
    tables = [Path(prompts)] if prompts else [folder / name for name in TABLES if (folder / name).is_file()]
    told = _read_table(tables[0]) if tables else {}
    images, seeds = [], dict[str, int]()
    for file in files:
        name = file.relative_to(folder).with_suffix("").as_posix()
        row = told.get(name)
        if told and row is None:
            raise UserError(f"Expected a row for '{name}' in '{tables[0]}', found none; add its prompt.")
        text = str(row["prompt"]) if row else ""
        key = str((row or {}).get("prompt_id") or text or name)
        seeds[key] = seeds.get(key, -1) + 1
        seed = int(row["seed"]) if row and row.get("seed") not in (None, "") else seeds[key]
        category, challenge = (str((row or {}).get(k) or "") for k in ("category", "challenge"))
        images.append(ArmImage(file, _digest(file), key, text, category, challenge, seed))
    return images


def _read_table(file: Path) -> dict[str, dict[str, Any]]:
    """Prompts of plain images by the name of the file without its suffix."""
    told: dict[str, dict[str, Any]] = {}
    for row in read_rows(file):
        name = require_cell(row, ("file_name", "filename", "image", "id"), f"'{file}'", "names of the images")
        prompt = require_cell(row, ("prompt", "caption", "text"), f"'{file}'")
        rest = {str(key).strip().lower(): value for key, value in row.items()}
        key = Path(str(name)).with_suffix("").as_posix()
        if key in told:
            raise UserError(f"Expected one row an image in '{file}', got two for '{name}'; remove one.")
        told[key] = rest | {"prompt": " ".join(str(prompt or "").split())}
    return told


def load_images(folder: str | os.PathLike[str], records: Sequence[Record]) -> UInt8[np.ndarray, "n h w 3"]:
    """Read the images of records, uint8 RGB."""
    return np.stack([np.asarray(Image.open(Path(folder) / r.image).convert("RGB")) for r in records])


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
