"""The folder of a sweep: the cells it holds, its settings, and the launches at work in it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guidance.runs.claims import STALLED_AFTER, Claims
from guidance.runs.folder import CLAIMS_FOLDER, CONFIG_FILE, load_settings, move_aside, read_settings, write_settings
from guidance.runs.records import RecordStore
from guidance.runs.run import Job
from guidance.runs.sweep import Cell, plan_cells, single_values
from guidance.utils.config import plain_value
from guidance.utils.errors import UserError
from guidance.utils.io import check_writable

LOCK = "sweep"

#: Settings that may differ when a sweep is continued: cells are added, and the batch size is the folder's.
FREE = ("cells", "unnamed", "batch_size")

_JOIN_TIMEOUT = 60.0  # seconds that a launch that joins waits for the first one to write the settings


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """Plan of a folder.

    Attributes:
        folder: Folder of the sweep.
        cells: Existing cells and those that are asked for.
        settings: Settings that the folder will hold, see :func:`guidance.runs.folder.read_settings`.
        previous: Settings that it holds now; None if it is new.
    """

    folder: Path
    cells: list[Cell]
    settings: dict[str, Any]
    previous: dict[str, Any] | None


def plan_sweep(
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    axes: Mapping[str, Sequence[Any]],
    *,
    combine: str = "product",
    baseline: bool = True,
    matched: Sequence[float] = (),
    batch_size: int | None = None,
    fresh: bool = False,
) -> SweepPlan:
    """Plan the cells of a folder; nothing is written.

    Args:
        folder: Folder of the sweep, which may exist.
        settings: Options that all cells share.
        axes, combine, baseline, matched: See :func:`guidance.runs.sweep.plan_cells`.
        batch_size: Images at once; None: as in the folder, or not known yet.
        fresh: Whether to ignore the content of the folder.
    """
    previous = None if fresh else read_settings(folder, settings, free=FREE)
    known = [Cell.from_dict(values) for values in previous["cells"]] if previous else []
    unnamed = single_values(axes)
    if previous:
        unnamed = {k: tuple(v) if isinstance(v, list) else v for k, v in previous["unnamed"].items()}
    cells = plan_cells(axes, combine=combine, baseline=baseline, matched=matched, known=known, unnamed=unnamed)
    planned = {**settings, "cells": [cell.to_dict() for cell in cells], "unnamed": plain_value(unnamed)}
    if size := batch_size or (previous or {}).get("batch_size"):
        planned["batch_size"] = size
    return SweepPlan(Path(folder), cells, planned, previous)


@contextmanager
def working_in(
    plan: SweepPlan,
    state: Any,
    *,
    fresh: bool = False,
    join: bool = False,
    stalled_after: float = STALLED_AFTER,
    report: Callable[[str], None] = print,
) -> Iterator[Claims]:
    """Become the only sweep that works in a folder, or join the one that does; the settings are written.

    Args:
        plan: Plan of the folder.
        state: The processes of this launch, see :func:`guidance.utils.processes.join_processes`.
        fresh: Move the content of the folder aside.
        join: Help a sweep that is at work there.
        stalled_after: See :class:`guidance.runs.claims.Claims`.
        report: Receives a sentence about what was moved aside.

    Yields:
        The claims of this process.

    Raises:
        UserError: If another sweep is at work there and is not to be joined, or the folder belongs to another sweep.
        SystemExit: In the other processes of the launch, whose main process has raised the error.
    """
    if fresh and join:
        raise UserError("Expected fresh or join, got both: a folder that others are filling cannot be moved aside.")
    with Claims(plan.folder / CLAIMS_FOLDER, stalled_after) as claims:
        together(state, lambda: _enter(plan, claims, fresh=fresh, join=join, report=report))
        yield claims


def check_free(plan: SweepPlan, *, stalled_after: float = STALLED_AFTER) -> None:
    """Refuse a folder in which another sweep is at work, before anything slow is done."""
    if (plan.folder / CLAIMS_FOLDER).is_dir():
        with Claims(plan.folder / CLAIMS_FOLDER, stalled_after) as claims:
            if claims.is_busy(LOCK):
                raise UserError(_busy(plan.folder, claims))


def require_finished(plan: SweepPlan, jobs: Sequence[Job]) -> None:
    """Refuse a folder that lacks images."""
    store = RecordStore(plan.folder)
    wanted = [(cell.name, job.prompt.id, job.seed) for cell in plan.cells for job in jobs]
    if missing := sum(not store.has(*key) for key in wanted):
        raise UserError(
            f"Expected a finished sweep in '{plan.folder}', but {missing} of {len(wanted)} images are missing; give "
            "the same command without --recommend first."
        )


def together(state: Any, function: Callable[[], None]) -> None:
    """Run a function in the main process; if it fails there, all processes stop, and the main one raises the error."""
    failure: list[BaseException | None] = [None]
    if state.is_main_process:
        try:
            function()
        except (UserError, OSError) as error:
            failure[0] = error
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        failed = broadcast_object_list([failure[0] is not None])[0]
        if failed and not state.is_main_process:
            raise SystemExit(2)
    if failure[0] is not None:
        raise failure[0]


def _enter(plan: SweepPlan, claims: Claims, *, fresh: bool, join: bool, report: Callable[[str], None]) -> None:
    check_writable(plan.folder / CONFIG_FILE)
    if fresh and plan.folder.is_dir():
        _set_aside(plan.folder, claims, report)
    if not claims.take_from_dead(LOCK):
        if not join:
            raise UserError(_busy(plan.folder, claims))
        return _check_joined(plan, claims)
    settings = read_settings(plan.folder, plan.settings, free=FREE)
    if settings != (None if fresh else plan.previous):
        raise UserError(f"Expected '{plan.folder}' to stay as it was, but another sweep has changed it; start again.")
    if settings != plan.settings:
        write_settings(plan.folder, plan.settings)


def _set_aside(folder: Path, claims: Claims, report: Callable[[str], None]) -> None:
    if not claims.take_from_dead(LOCK):
        raise UserError(_busy(folder, claims))
    aside = move_aside(folder)  # with the lock inside, so that no other launch can start in between
    if aside is not None:
        shutil.rmtree(aside / CLAIMS_FOLDER, ignore_errors=True)
        report(f"Moved {folder} to {aside}.")
    claims.release(LOCK)


def _check_joined(plan: SweepPlan, claims: Claims) -> None:
    """Wait until the first launch has written the settings, and check that it fills the cells of this plan."""
    end = time.monotonic() + _JOIN_TIMEOUT
    while not (plan.folder / CONFIG_FILE).is_file() and claims.is_busy(LOCK) and time.monotonic() < end:
        time.sleep(0.1)
    settings = read_settings(plan.folder, plan.settings, free=FREE) or {}
    running = {cell["name"] for cell in settings.get("cells", [])}
    if new := [cell.name for cell in plan.cells if cell.name not in running]:
        raise UserError(
            f"Expected to join a sweep of the same cells in '{plan.folder}', but it does not fill '{new[0]}'; let it "
            "finish, then add cells."
        )


def remember_batch_size(folder: Path, size: int) -> None:
    """Write the batch size that was found to fit into the folder's settings, for later launches."""
    settings = load_settings(folder) or {}
    if size < settings.get("batch_size", size + 1):
        write_settings(folder, {**settings, "batch_size": size})


def remembered_batch_size(folder: Path) -> int | None:
    """Return the batch size in the folder's settings, or None."""
    return (load_settings(folder) or {}).get("batch_size")


def _busy(folder: Path, claims: Claims) -> str:
    return (
        f"Expected no other sweep at work in '{folder}', but there is one ({claims.holder(LOCK) or 'just starting'}); "
        "wait for it, or set join=true to help it."
    )
