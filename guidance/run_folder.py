"""The folder of a sampling run: whose it is, what it shows at a glance, and a summary of it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from guidance.errors import UserError
from guidance.grid import labelled_grid
from guidance.io import atomic_path
from guidance.records import UNGUIDED, Record, RecordStore

CONFIG_FILE, GRID_FILE = "config.yaml", "grid.png"


def read_settings(
    folder: str | os.PathLike[str], settings: Mapping[str, Any], *, free: Collection[str] = ()
) -> dict[str, Any] | None:
    """Return the settings a folder was made with, or None if it is new or empty.

    Args:
        folder: Folder of a run.
        settings: Those it is to be continued with.
        free: Keys that may differ.

    Raises:
        UserError: If the folder holds something else, or was made with other settings; names each difference.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"Expected a folder at '{path}', found a file; choose another output.")
    if not path.is_dir() or not any(path.iterdir()):
        return None
    try:
        made = yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
        made = None
    if not isinstance(made, dict):
        raise UserError(
            f"Expected '{path}' to be new, empty or a run with a {CONFIG_FILE}, but it has other files; "
            "choose another output, or set fresh=true to move it aside."
        )
    keys = [key for key in {**made, **settings} if key not in free]
    differing = [k for k in keys if (k in made) != (k in settings) or made.get(k) != settings.get(k)]
    if differing:
        shown = ", ".join(f"{k}={made.get(k)!r} (now {settings.get(k)!r})" for k in differing[:6])
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise UserError(
            f"Expected '{path}' to be a run of the same settings, but it was made with {shown}{more}; choose "
            "another output, or set fresh=true to move it aside."
        )
    return made


def write_settings(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Write the settings of a run into its folder; a new run's first file."""
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


def write_grid(
    store: RecordStore, records: Sequence[Record], arms: Sequence[str], *, max_rows: int = 12
) -> Path:
    """Write ``grid.png``: a row per prompt with its first seed, a column per arm.

    Args:
        store: Where the images are.
        records: Those to show, in the order of the rows.
        arms: Columns.
        max_rows: The first so many prompts.

    Returns:
        The path of the grid.
    """
    by_key = {record.key: record for record in records}
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.prompt_id, record)
    shown = list(first.values())[:max_rows]
    found = [[by_key.get((arm, row.prompt_id, row.seed)) for arm in arms] for row in shown]
    grid = labelled_grid(
        [[None if r is None else _open(store.folder / r.image) for r in row] for row in found],
        rows=[row.prompt for row in shown],
        columns=[arm.replace("=", " ") for arm in arms],
        notes=[f"seed {row.seed}" for row in shown],
    )
    with atomic_path(store.folder / GRID_FILE) as temporary:
        grid.save(temporary, format="PNG")
    return store.folder / GRID_FILE


def _open(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def summarise(records: Sequence[Record]) -> str:
    """Return a table per arm: images, median seconds per image, its ratio to unguided, mean head score."""
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record.arm, []).append(record)
    seconds = {arm: statistics.median(r.seconds for r in rows) for arm, rows in arms.items()}
    lines = [f"{'arm':<14}{'images':>8}{'s/image':>10}{'x unguided':>12}{'head score':>12}"]
    for arm, rows in arms.items():
        ratio = f"{seconds[arm] / seconds[UNGUIDED]:.2f}" if seconds.get(UNGUIDED) else "-"
        scores = [r.score for r in rows if r.score is not None]
        score = f"{statistics.fmean(scores):.3f}" if scores else "-"
        lines.append(f"{arm:<14}{len(rows):>8}{seconds[arm]:>10.3f}{ratio:>12}{score:>12}")
    skipped = sum(r.nan_skipped for r in records)
    if skipped:
        lines.append(f"{skipped} guided steps were skipped because their gradient was not finite.")
    truncated = len({r.prompt_id for r in records if r.truncated})
    if truncated:
        lines.append(f"{truncated} prompts are longer than the model reads; they were cut.")
    return "\n".join(lines)
