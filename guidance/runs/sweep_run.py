"""Run a sweep: claim, sample and record units, in any number of processes that share a folder."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from guidance.models.types import Pipeline
from guidance.runs.arms import Arm
from guidance.runs.claims import Claims
from guidance.runs.folder import write_grid, write_sheets
from guidance.runs.records import Record, RecordStore
from guidance.runs.run import Job, Task, Unit, UnitSampler, list_batches
from guidance.runs.sweep import Cell
from guidance.runs.sweep_folder import SweepPlan, remember_batch_size, remembered_batch_size, together
from guidance.utils.errors import UserError, is_out_of_memory

_POLL = 0.3  # seconds between checks of what other processes work on

#: Initial batch size of ``auto``: on an accelerator, and on a CPU, which gains nothing from more.
AUTO_BATCH, AUTO_BATCH_CPU = 64, 16

Images = list[tuple[Record, Any]]

Log = Callable[[dict[str, float], int], None]


class Divider:
    """Sample units, in parts if memory does not suffice for a whole one.

    Args:
        sampler: Samples a part.
        size: Images at once.
        halve: Halve the size when memory runs out; otherwise that is an error.
        report: Called with a sentence for the user and the new size.

    Attributes:
        size: Images at once, now.
    """

    def __init__(self, sampler: UnitSampler, size: int, *, halve: bool, report: Callable[[str, int], None]) -> None:
        self.sampler, self.size, self._halve, self._report = sampler, size, halve, report

    def images(self, unit: Unit) -> Images:
        """Sample a unit; nothing is written."""
        while (images := self._try(unit)) is None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            size = min(self.size, len(unit))
            if not self._halve or size == 1:
                hint = "set batch_size=auto or a smaller one" if size > 1 else "choose a half-precision dtype"
                raise UserError(
                    f"Expected memory for a batch of {size} in '{unit[0].arm.name}', but it ran out; {hint}."
                )
            self.size = size // 2
            self._report(f"Out of memory with {size} images at once: going on with {self.size}.", self.size)
        return images

    def _try(self, unit: Unit) -> Images | None:
        """Return the images, or None if memory runs out, without a reference to the failed attempt."""
        try:
            return [image for part in list_batches(unit, self.size) for image in self.sampler.images(part)]
        except (RuntimeError, MemoryError, UserError) as error:  # a guided step raises a UserError
            if not is_out_of_memory(error):
                raise
        return None


def fill_units(
    units: Sequence[Unit], divider: Divider, claims: Claims, *, progress: Callable[[], None] = lambda: None
) -> int:
    """Sample what units lack, together with all other processes that do; return when all units are done.

    Args:
        units: In the order in which to take them.
        divider: Samples them into a :class:`guidance.runs.records.RecordStore`.
        claims: Claims of this process.
        progress: Called after each unit and while waiting for others.

    Returns:
        The number of images that this process has made.
    """
    sampler, count = divider.sampler, 0
    remaining = [unit for unit in units if sampler.missing(unit)]  # checks all before any work
    while remaining:
        waiting, previous_count = [], count
        for unit in remaining:
            if not sampler.missing(unit):
                continue
            name = unit_name(unit)
            if not claims.take(name):
                waiting.append(unit)
                continue
            try:
                new = _sample_claimed(unit, divider, claims, name)
                count += new or 0
                waiting += [unit] if new is None else []
            finally:
                claims.release(name)
            progress()
        remaining = waiting
        if remaining and count == previous_count:
            time.sleep(_POLL)
            sampler.store.refresh()
            progress()
    return count


def _sample_claimed(unit: Unit, divider: Divider, claims: Claims, name: str) -> int | None:
    """Sample and record what a unit lacks; None if the claim was lost in the meantime."""
    sampler = divider.sampler
    sampler.store.refresh()  # another process may have finished it just before it was claimed
    missing = sampler.missing(unit)
    if not missing:
        return 0
    images = divider.images(unit)
    if not claims.holds(name):
        return None
    sampler.write(images, missing)
    return len(missing)


def unit_name(unit: Unit) -> str:
    """Return the name of a unit's claim, the same for all processes of a sweep."""
    keys = [" ".join(map(str, task.key)) for task in unit]
    return "unit-" + hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


def fill_sweep(
    pipe: Pipeline,
    plan: SweepPlan,
    jobs: Sequence[Job],
    arms: Mapping[str, Arm],
    claims: Claims,
    state: Any,
    *,
    model: str,
    auto: bool,
    progress: bool = True,
    log: Log | None = None,
) -> int:
    """Sample what a sweep lacks, together with all processes that work in its folder.

    Args:
        pipe: Pipeline that :func:`guidance.runs.run.check_sampling` has accepted for all arms.
        plan: Cells and folder.
        jobs: Prompts and seeds, the same for all cells.
        arms: Arms of the cells, by name.
        claims: Claims of this process, see :func:`guidance.runs.sweep_folder.working_in`.
        state: The processes of this launch.
        model: Name of the model in the records.
        auto: Halve the batch size when memory runs out; on an accelerator, find it first.
        progress: Show a bar over the work of all processes.
        log: Called with the number of images now and then.

    Returns:
        The number of images that this process has made.
    """
    store = RecordStore(plan.folder, claims.take_number("writer"))
    sampler = UnitSampler(pipe, store, model=model)

    def report(text: str, size: int) -> None:
        tqdm.write(text)
        remember_batch_size(plan.folder, size)

    def find() -> None:
        while remembered_batch_size(plan.folder) is None:
            if not claims.take("batch-size"):  # another launch is looking for it
                time.sleep(_POLL)
                continue
            size = AUTO_BATCH_CPU
            if pipe.unet.device.type != "cpu":
                first = list_units(plan.cells, jobs, arms, AUTO_BATCH)[: len(plan.cells)]
                size = find_batch_size(Divider(sampler, AUTO_BATCH, halve=True, report=report), first)
            remember_batch_size(plan.folder, size)
            claims.release("batch-size")

    together(state, find)
    size = remembered_batch_size(plan.folder) or AUTO_BATCH_CPU
    units = list_units(plan.cells, jobs, arms, size)
    bar = Progress(units, store, shown=progress, log=log if state.is_main_process else None)
    count = fill_units(units, Divider(sampler, size, halve=auto, report=report), claims, progress=bar)
    bar.close()
    return count


def find_batch_size(divider: Divider, units: Sequence[Unit]) -> int:
    """Sample the most expensive unit with as many images as memory allows, and keep them.

    Args:
        divider: Starts with the largest size to try.
        units: The first unit of every arm, of the divider's size.

    Returns:
        The number of images that fit.
    """
    costly = max(units, key=lambda unit: (len(unit[0].arm.guides), unit[0].sampling.cfg_scale != 1))
    missing = divider.sampler.missing(costly)
    divider.sampler.write(divider.images(costly), missing)
    return min(divider.size, len(costly))


def list_units(cells: Sequence[Cell], jobs: Sequence[Job], arms: Mapping[str, Arm], size: int) -> list[Unit]:
    """Cut a sweep into units; cells of equal cost share a batch that one of them would not fill.

    Args:
        cells: Cells of the sweep.
        jobs: Prompts and seeds, the same for all cells.
        arms: Arms of the cells, by name.
        size: Images at once.

    Returns:
        Units in the order in which to take them: all cells of the first prompts, then of the next.
    """

    def tasks(cell: Cell, batch: Sequence[Job]) -> list[Task]:
        return [Task(job, arms[cell.name], cell.sampling) for job in batch]

    if len(jobs) > size // 2:
        return [tuple(tasks(cell, batch)) for batch in list_batches(jobs, size) for cell in cells]
    by_cost: dict[Any, list[Cell]] = {}
    for cell in cells:
        by_cost.setdefault(cell.cost_key, []).append(cell)
    shared = [group for same in by_cost.values() for group in list_batches(same, size // len(jobs))]
    return [tuple(task for cell in group for task in tasks(cell, jobs)) for group in shared]


def lay_out(folder: Path, jobs: Sequence[Job], cells: Sequence[Cell], *, max_rows: int) -> list[Record]:
    """Write the grid and contact sheets of a finished sweep, and remove half-written files of killed processes.

    Returns:
        The records of the cells.
    """
    for leftover in (folder / "images").rglob(".*.tmp-*"):
        leftover.unlink(missing_ok=True)
    store, order = RecordStore(folder), {job.prompt.id: i for i, job in enumerate(jobs)}
    names = [cell.name for cell in cells]
    records = [r for r in store.load() if r.arm in names and r.prompt_id in order]
    records.sort(key=lambda r: (order[r.prompt_id], r.seed, names.index(r.arm)))
    write_grid(store, records, names, max_rows=max_rows)
    write_sheets(store, records, names)
    return records


class Progress:
    """A bar over the images of all processes, with images per second and time left.

    Args:
        units: All units of the sweep.
        store: Counts what is done.
        shown: Whether to show the bar.
        log: Called with the number of images now and then, for a tracker.
    """

    def __init__(self, units: Sequence[Unit], store: RecordStore, *, shown: bool, log: Log | None = None) -> None:
        self._keys = [task.key for unit in units for task in unit]
        self._store, self._log, self._next = store, log, 0.0
        done = store.count(self._keys)
        options: dict[str, Any] = {"unit": "image", "desc": "sweep", "smoothing": 0.1}
        self._bar = tqdm(total=len(self._keys), initial=done, disable=not shown, **options)

    def __call__(self, *, last: bool = False) -> None:
        if (self._bar.disable and self._log is None) or (time.monotonic() < self._next and not last):
            return
        self._next = time.monotonic() + 1
        self._store.refresh()
        done = self._store.count(self._keys)
        self._bar.update(done - self._bar.n)
        if self._log is not None:
            self._log({"images": float(done)}, done)

    def close(self) -> None:
        """Show the final state."""
        self(last=True)
        self._bar.close()
