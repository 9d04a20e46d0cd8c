"""The folder of a sweep: whose it is, which cells it holds, and who is at work in it."""

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
from guidance.runs.folder import (
    CLAIMS_FOLDER,
    CONFIG_FILE,
    load_settings,
    move_aside,
    read_settings,
    write_settings,
)
from guidance.runs.records import RecordStore
from guidance.runs.run import Job
from guidance.runs.sweep import Cell, plan_cells, single_values
from guidance.utils.config import plain_value
from guidance.utils.errors import UserError
from guidance.utils.io import check_writable

LOCK = "sweep"

#: Settings that may differ when a sweep goes on: cells are added, and the batch size is the folder's.
FREE = ("cells", "unnamed", "batch_size")

_START = 60.0  # seconds that one who joins waits for the first to write the settings


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What a folder is to hold.

    Attributes:
        folder: Of the sweep.
        cells: Those that are there and those that are asked for.
        settings: What the folder remembers, see :func:`guidance.runs.folder.read_settings`.
        made: What it remembers now; None if it is new.
    """

    folder: Path
    cells: list[Cell]
    settings: dict[str, Any]
    made: dict[str, Any] | None


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
        folder: Of the sweep, may be there already.
        settings: Options that are the same for all cells.
        axes, combine, baseline, matched: See :func:`guidance.runs.sweep.plan_cells`.
        batch_size: Images at once; None: as in the folder, or not known yet.
        fresh: Whether what is in the folder does not count.

    Raises:
        UserError: If the folder was made with other settings, or the axes cannot be combined.
    """
    made = None if fresh else read_settings(folder, settings, free=FREE)
    known = [Cell.from_dict(values) for values in (made or {}).get("cells", [])]
    there = (made or {}).get("unnamed", {})
    unnamed = (
        {k: tuple(v) if isinstance(v, list) else v for k, v in there.items()} if made else single_values(axes)
    )
    options: dict[str, Any] = {"combine": combine, "baseline": baseline, "matched": matched}
    cells = plan_cells(axes, known=known, unnamed=unnamed, **options)
    kept = {**settings, "cells": [cell.to_dict() for cell in cells], "unnamed": plain_value(unnamed)}
    if size := batch_size or (made or {}).get("batch_size"):
        kept["batch_size"] = size
    return SweepPlan(Path(folder), cells, kept, made)


@contextmanager
def working_in(
    plan: SweepPlan,
    state: Any,
    *,
    fresh: bool = False,
    join: bool = False,
    stalled_after: float = STALLED_AFTER,
    say: Callable[[str], None] = print,
) -> Iterator[Claims]:
    """Be the one sweep that works in a folder, or join it; the settings are written.

    Args:
        plan: Of the folder.
        state: The processes of this launch, see :func:`guidance.utils.processes.join_processes`.
        fresh: Move what is in the folder aside.
        join: Help a sweep that is at work there.
        stalled_after: See :class:`guidance.runs.claims.Claims`.
        say: Told what was moved aside.

    Yields:
        The claims of this process.

    Raises:
        UserError: If another sweep is at work there and is not to be joined, or what is there is another's.
        SystemExit: In the other processes of the launch, whose main one has raised that.
    """
    if fresh and join:
        raise UserError("Expected fresh or join, got both: what others are filling cannot be moved aside.")
    with Claims(plan.folder / CLAIMS_FOLDER, stalled_after) as claims:
        together(state, lambda: _enter(plan, claims, fresh=fresh, join=join, say=say))
        yield claims


def check_free(plan: SweepPlan, *, stalled_after: float = STALLED_AFTER) -> None:
    """Refuse a folder in which another sweep is at work, before long work.

    Raises:
        UserError: That says who works there, and since when.
    """
    if (plan.folder / CLAIMS_FOLDER).is_dir():
        with Claims(plan.folder / CLAIMS_FOLDER, stalled_after) as claims:
            if claims.is_busy(LOCK):
                raise UserError(_busy(plan.folder, claims))


def require_finished(plan: SweepPlan, jobs: Sequence[Job]) -> None:
    """Refuse a folder of which images are missing.

    Raises:
        UserError: That says how many.
    """
    store = RecordStore(plan.folder)
    wanted = [(cell.name, job.prompt.id, job.seed) for cell in plan.cells for job in jobs]
    if missing := sum(not store.has(*key) for key in wanted):
        raise UserError(
            f"Expected a finished sweep in '{plan.folder}', but {missing} of {len(wanted)} images are missing; give "
            "the same command without --recommend first."
        )


def together(state: Any, function: Callable[[], None]) -> None:
    """Run a function in the main process; if it fails there, all processes stop, and one says why."""
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


def _enter(plan: SweepPlan, claims: Claims, *, fresh: bool, join: bool, say: Callable[[str], None]) -> None:
    check_writable(plan.folder / CONFIG_FILE)
    if fresh and plan.folder.is_dir():
        _set_aside(plan.folder, claims, say)
    if not claims.take_from_dead(LOCK):
        if not join:
            raise UserError(_busy(plan.folder, claims))
        return _check_joined(plan, claims)
    made = read_settings(plan.folder, plan.settings, free=FREE)
    if made != (None if fresh else plan.made):
        raise UserError(
            f"Expected '{plan.folder}' to stay as it was, but another sweep has changed it; start again."
        )
    if made != plan.settings:
        write_settings(plan.folder, plan.settings)


def _set_aside(folder: Path, claims: Claims, say: Callable[[str], None]) -> None:
    if not claims.take_from_dead(LOCK):
        raise UserError(_busy(folder, claims))
    aside = move_aside(folder)  # with the lock inside, so that nobody begins in between
    if aside is not None:
        shutil.rmtree(aside / CLAIMS_FOLDER, ignore_errors=True)
        say(f"Moved {folder} to {aside}.")
    claims.release(LOCK)


def _check_joined(plan: SweepPlan, claims: Claims) -> None:
    """Wait until the first has written the settings, and check that it fills what is asked for here."""
    end = time.monotonic() + _START
    while not (plan.folder / CONFIG_FILE).is_file() and claims.is_busy(LOCK) and time.monotonic() < end:
        time.sleep(0.1)
    made = read_settings(plan.folder, plan.settings, free=FREE) or {}
    there = {cell["name"] for cell in made.get("cells", [])}
    if new := [cell.name for cell in plan.cells if cell.name not in there]:
        raise UserError(
            f"Expected to join a sweep of the same cells in '{plan.folder}', but it does not fill '{new[0]}'; let it "
            "finish, then add cells."
        )


def remember_batch_size(folder: Path, size: int) -> None:
    """Write the batch size that was found to fit into the folder's settings, for those who go on."""
    made = load_settings(folder) or {}
    if size < made.get("batch_size", size + 1):
        write_settings(folder, {**made, "batch_size": size})


def remembered_batch_size(folder: Path) -> int | None:
    """The batch size in the folder's settings; None if none was found yet."""
    return (load_settings(folder) or {}).get("batch_size")


def _busy(folder: Path, claims: Claims) -> str:
    return (
        f"Expected no other sweep at work in '{folder}', but there is one ({claims.holder(LOCK) or 'just starting'}); "
        "wait for it, or set join=true to help it."
    )
