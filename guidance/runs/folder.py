"""The folder of a sampling run: its name, its settings, its image grids, and a summary."""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from guidance.runs.records import UNGUIDED, Record, RecordStore
from guidance.utils.errors import UserError
from guidance.utils.images import labelled_grid
from guidance.utils.io import atomic_path

CONFIG_FILE, GRID_FILE, SHEETS_FOLDER = "config.yaml", "grid.png", "sheets"

CLAIMS_FOLDER = ".claims"  # of the processes at work

MAX_COLUMNS, MAX_SEEDS = 24, 32  # of a page, which is held in memory


def folder_name(prompts: str | Sequence[str], identity: Mapping[str, Any]) -> str:
    """Name a folder after its prompts and a hash of the options that identify it."""
    stem = Path(prompts).stem if isinstance(prompts, str) else prompts[0]
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-") or "prompts"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]
    return f"{name}-{digest}"


def read_settings(
    folder: str | os.PathLike[str], settings: Mapping[str, Any], *, free: Collection[str] = ()
) -> dict[str, Any] | None:
    """Return the settings a folder was made with, or None if it is new or empty.

    Args:
        folder: Folder of a run.
        settings: Settings to continue it with.
        free: Keys that may differ.

    Raises:
        UserError: If the folder holds something else, or was made with other settings; lists the differences.
    """
    previous = load_settings(folder)
    if previous is None:
        return None
    keys = [key for key in {**previous, **settings} if key not in free]
    differing = [k for k in keys if (k in previous) != (k in settings) or previous.get(k) != settings.get(k)]
    if differing:
        shown = ", ".join(f"{k}={previous.get(k)!r} (now {settings.get(k)!r})" for k in differing[:6])
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise UserError(
            f"Expected '{folder}' to be a run of the same settings, but it was made with {shown}{more}; choose "
            "another output, or set fresh=true to move it aside."
        )
    return previous


def load_settings(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the settings a folder was made with, or None if it is new or empty."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"Expected a folder at '{path}', found a file; choose another output.")
    # hidden files: claims, and half-written files of a run that was killed at its start
    if not path.is_dir() or all(inside.name.startswith(".") for inside in path.iterdir()):
        return None
    try:
        settings = yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(
            f"Expected '{path}' to be new, empty or a run with a {CONFIG_FILE}, but it has other files; "
            "choose another output, or set fresh=true to move it aside."
        )
    return settings


def write_settings(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Write the settings of a run into its folder, as the first file of a new run."""
    with atomic_path(Path(folder) / CONFIG_FILE) as temporary:
        text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100)
        temporary.write_text(text, encoding="utf-8")


def move_aside(folder: str | os.PathLike[str]) -> Path | None:
    """Rename a folder to ``NAME.old-1`` (or the next free number); None if there is nothing to move."""
    path = Path(folder)
    if not path.is_dir() or not any(path.iterdir()):
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def write_grid(store: RecordStore, records: Sequence[Record], arms: Sequence[str], *, max_rows: int = 12) -> Path:
    """Write ``grid.png``: a row per prompt with its first seed, a column per arm; many arms continue in ``grid-2.png``.

    Args:
        store: Holds the images.
        records: Images to show, in the order of the rows.
        arms: Columns.
        max_rows: Number of prompts to show.

    Returns:
        The path of the grid.
    """
    by_key = {record.key: record for record in records}
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.prompt_id, record)
    shown = list(first.values())[:max_rows]
    found = [[by_key.get((arm, row.prompt_id, row.seed)) for arm in arms] for row in shown]
    _write_images(store.folder / GRID_FILE, store, shown, found, arms)
    return store.folder / GRID_FILE


def write_sheets(store: RecordStore, records: Sequence[Record], arms: Sequence[str]) -> Path:
    """Write a contact sheet per prompt, ``sheets/PROMPT.png``: a row per seed, a column per arm, paged as the grid.

    Args:
        store: Holds the images.
        records: Images to show, up to :data:`MAX_SEEDS` per prompt; a sheet that is newer than its images is kept.
        arms: Columns.

    Returns:
        The folder of the sheets.
    """
    prompts: dict[str, dict[int, dict[str, Record]]] = {}
    for record in records:
        prompts.setdefault(record.prompt_id, {}).setdefault(record.seed, {})[record.arm] = record
    for prompt_id, seeds in prompts.items():
        sheet, rows = store.folder / SHEETS_FOLDER / f"{prompt_id}.png", list(seeds.values())[:MAX_SEEDS]
        if not _is_newer(sheet, [store.folder / r.image for row in rows for r in row.values()]):
            found = [[row.get(arm) for arm in arms] for row in rows]
            _write_images(sheet, store, [next(iter(row.values())) for row in rows], found, arms, compress_level=2)
    return store.folder / SHEETS_FOLDER


def _write_images(
    file: Path,
    store: RecordStore,
    rows: Sequence[Record],
    images: Sequence[Sequence[Record | None]],
    arms: Sequence[str],
    **options: Any,
) -> None:
    """Write the pages of a grid, each starting with the first arm; ``file`` itself, the first page, is written last."""
    starts = range(1, max(2, len(arms)), MAX_COLUMNS - 1)
    pages = [[0, *range(i, min(i + MAX_COLUMNS - 1, len(arms)))] for i in starts]
    for number, columns in reversed(list(enumerate(pages, start=1))):
        found = [[row[c] for c in columns] for row in images]
        page = labelled_grid(
            [[None if r is None else _open(store.folder / r.image) for r in row] for row in found],
            rows=[row.prompt for row in rows],
            columns=[arms[c].replace("=", " ") for c in columns],
            notes=[f"seed {row.seed}" for row in rows],
        )
        with atomic_path(file if number == 1 else file.with_stem(f"{file.stem}-{number}")) as temporary:
            page.save(temporary, format="PNG", **options)


def _is_newer(file: Path, others: Sequence[Path]) -> bool:
    return file.is_file() and file.stat().st_mtime_ns > max(other.stat().st_mtime_ns for other in others)


def _open(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def summarise(records: Sequence[Record]) -> str:
    """Return a table per arm: images, median seconds per image, its ratio to unguided, mean score, what happened.

    What happened are the solver steps, the denoiser calls with a gradient, and the pushes of an image.
    """
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record.arm, []).append(record)
    seconds = {arm: statistics.median(r.seconds for r in rows) for arm, rows in arms.items()}
    width = max(13, *map(len, arms)) + 1 if arms else 14
    happened = ("steps", "gradients", "pushes")
    names = "".join(f"{name:>11}" for name in happened)
    lines = [f"{'arm':<{width}}{'images':>8}{'s/image':>10}{'x unguided':>12}{'score':>12}{names}"]
    for arm, rows in arms.items():
        ratio = f"{seconds[arm] / seconds[UNGUIDED]:.2f}" if seconds.get(UNGUIDED) else "-"
        scores = [r.score for r in rows if r.score is not None]
        score = f"{statistics.fmean(scores):.3f}" if scores else "-"
        counts = "".join(f"{statistics.median_low(getattr(r, name) for r in rows):>11}" for name in happened)
        lines.append(f"{arm:<{width}}{len(rows):>8}{seconds[arm]:>10.3f}{ratio:>12}{score:>12}{counts}")
    skipped = sum(r.nan_skipped for r in records)
    if skipped:
        lines.append(f"{skipped} guided steps were skipped because their gradient was not finite.")
    truncated = len({r.prompt_id for r in records if r.truncated})
    if truncated:
        lines.append(f"{truncated} prompts are longer than the model reads; they were cut.")
    return "\n".join(lines)
