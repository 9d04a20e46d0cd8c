"""Track a sweep: progress while it runs, then a table of images, curves over cells, and the records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guidance.runs.folder import CONFIG_FILE
from guidance.runs.records import Record
from guidance.runs.sweep import Cell
from guidance.utils.errors import UserError
from guidance.utils.tracking import Log, log_files, log_table, start_tracking, stop_tracking


class SweepTracking:
    """The tracker of a sweep, in its main process; if it fails it warns, and the sweep goes on.

    Args:
        tracker: "none", "wandb" or "tensorboard".
        folder: Folder of the sweep; logs go to its subfolder ``tracking``.
    """

    def __init__(self, tracker: str, folder: Path) -> None:
        self.folder, self._step = folder, 0
        self._log: Log | None = None
        self._accelerator: Any = None
        if tracker == "none":
            return
        from accelerate import Accelerator

        try:
            self._accelerator = Accelerator(log_with=tracker, project_dir=str(folder / "tracking"))
        except (ValueError, ImportError) as error:
            raise UserError(f"Expected tracker={tracker} to be installed, got: {error}; choose another.") from error

    def start(self, config: Mapping[str, Any]) -> None:
        """Start a run."""
        if self._accelerator is not None:
            (self.folder / "tracking").mkdir(parents=True, exist_ok=True)
            self._log = start_tracking(self._accelerator, "midblock-guidance", config, self.folder.name)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        if self._log is not None:
            self._step = max(self._step, step)
            self._log(values, step)

    def finish(self, records: Sequence[Record], cells: Sequence[Cell]) -> None:
        """Log curves, a table of images with a row per prompt and a column per cell, and files; end the run."""
        if self._accelerator is None:
            return
        for i, values in enumerate(curves(records, cells), start=1):
            self.log(values, self._step + i)
        table = [[rows[0].prompt, *(self._image(rows, cell) for cell in cells)] for rows in _by_prompt(records)]
        log_table(self._accelerator, "images", ["prompt", *(cell.name for cell in cells)], table)
        files = [self.folder / CONFIG_FILE, *sorted(self.folder.glob("records*.jsonl"))]
        log_files(self._accelerator, "records", files)
        stop_tracking(self._accelerator)

    def _image(self, rows: Sequence[Record], cell: Cell) -> Path | None:
        """Return the image of a prompt's first seed in a cell."""
        return next((self.folder / r.image for r in rows if r.arm == cell.name), None)


def curves(records: Sequence[Record], cells: Sequence[Cell]) -> list[dict[str, float]]:
    """Return a point for each cell: its options, median time and mean score."""
    points = []
    for cell in cells:
        rows = [r for r in records if r.arm == cell.name]
        scores = [r.score for r in rows if r.score is not None]
        point = {f"curve/{k}": float(getattr(cell, k)) for k in ("scale", "cfg_scale", "num_steps")}
        point |= {"curve/seconds an image": statistics.median(r.seconds for r in rows)} if rows else {}
        points.append(point | ({"curve/head score": statistics.fmean(scores)} if scores else {}))
    return points


def _by_prompt(records: Sequence[Record]) -> list[list[Record]]:
    prompts: dict[str, list[Record]] = {}
    for record in records:
        prompts.setdefault(record.prompt_id, []).append(record)
    return list(prompts.values())
