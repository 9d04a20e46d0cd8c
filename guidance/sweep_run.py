"""Run a sweep: find the batch size, fill the grid, show what is done, and lay it out for the eye."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from guidance.arms import Arm
from guidance.claims import Claims
from guidance.records import Record, RecordStore
from guidance.run_folder import write_grid, write_sheets
from guidance.sweep import Cell
from guidance.sweep_folder import SweepPlan, remember_batch_size, remembered_batch_size, together
from guidance.sweep_units import Divider, fill_units, image_keys
from guidance.units import Job, Task, Unit, UnitSampler, list_batches

#: Images a batch that was not named: where the search begins on an accelerator, and what it is on a CPU, which gains
#: nothing from more.
AUTO_BATCH, AUTO_BATCH_CPU = 64, 16

Log = Callable[[dict[str, float], int], None]


def fill_sweep(
    pipe: Any,
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
    """Sample what is missing of a sweep, together with all processes that work in its folder.

    Args:
        pipe: Pipeline that :func:`guidance.run.check_sampling` has passed for all arms.
        plan: Cells and folder.
        jobs: Prompts and seeds, the same for all cells.
        arms: Of the cells, by name.
        claims: Of this process, see :func:`guidance.sweep_folder.working_in`.
        state: The processes of this launch.
        model: What to call the model in the records.
        auto: Halve the batch size where memory does not suffice, and find it first on an accelerator.
        progress: Show a bar over the work of all processes.
        log: Told the number of images now and then.

    Returns:
        The number of images that this process has made.
    """
    store = RecordStore(plan.folder, claims.take_number("writer"))
    sampler = UnitSampler(pipe, store, model=model)

    def say(text: str, size: int) -> None:
        tqdm.write(text)
        remember_batch_size(plan.folder, size)

    def units(size: int) -> list[Unit]:
        return list_units(plan.cells, jobs, arms, size)

    def find() -> None:
        while remembered_batch_size(plan.folder) is None:
            if not claims.take("batch-size"):  # another launch is looking for it
                time.sleep(0.3)
                continue
            size = AUTO_BATCH_CPU
            if pipe.unet.device.type != "cpu":
                first = units(AUTO_BATCH)[: len(plan.cells)]
                size = find_batch_size(Divider(sampler, AUTO_BATCH, halve=True, say=say), first)
            remember_batch_size(plan.folder, size)
            claims.release("batch-size")

    together(state, find)
    size = remembered_batch_size(plan.folder) or AUTO_BATCH_CPU
    work = units(size)
    bar = Progress(work, store, shown=progress, log=log if state.is_main_process else None)
    made = fill_units(work, Divider(sampler, size, halve=auto, say=say), claims, progress=bar)
    bar.close()
    return made


def find_batch_size(divider: Divider, units: Sequence[Unit]) -> int:
    """Sample the most costly unit with as many images as memory allows, and keep them.

    Args:
        divider: Begins with as many images as are worth trying.
        units: The first unit of every arm, of the divider's size.

    Returns:
        The number of images that fit.
    """
    costly = max(units, key=lambda unit: (len(unit[0].arm.guides), unit[0].sampling.cfg_scale != 1))
    missing = divider.sampler.missing(costly)
    divider.sampler.write(divider.images(costly), missing)
    return min(divider.size, len(costly))


def list_units(cells: Sequence[Cell], jobs: Sequence[Job], arms: Mapping[str, Arm], size: int) -> list[Unit]:
    """Cut a sweep into what is sampled at once; cells of equal cost share a batch that one of them would not fill.

    Args:
        cells: Of the sweep.
        jobs: The same for all cells.
        arms: Of the cells, by name.
        size: Images at once.

    Returns:
        Units in the order in which to take them: all cells of the first prompts, then of the next.
    """

    def tasks(cell: Cell, batch: Sequence[Job]) -> list[Task]:
        return [Task(job, arms[cell.name], cell.sampling) for job in batch]

    if len(jobs) > size // 2:
        return [tuple(tasks(cell, batch)) for batch in list_batches(jobs, size) for cell in cells]
    alike: dict[Any, list[Cell]] = {}
    for cell in cells:
        alike.setdefault(cell.cost_key, []).append(cell)
    shared = [group for same in alike.values() for group in list_batches(same, size // len(jobs))]
    return [tuple(task for cell in group for task in tasks(cell, jobs)) for group in shared]


def lay_out(folder: Path, jobs: Sequence[Job], cells: Sequence[Cell], *, max_rows: int) -> list[Record]:
    """Write grid and contact sheets of a finished sweep, and remove what killed processes have left half-written.

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
        units: All of the sweep.
        store: Counts what is done.
        shown: Whether to show a bar at all.
        log: Told the number of images now and then, for a tracker.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        store: RecordStore,
        *,
        shown: bool,
        log: Log | None = None,
    ) -> None:
        self._keys, self._store, self._log, self._next = image_keys(units), store, log, 0.0
        self._bar = tqdm(
            total=len(self._keys),
            initial=store.count(self._keys),
            disable=not shown,
            unit="image",
            desc="sweep",
            smoothing=0.1,
        )

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
        """Show the end."""
        self(last=True)
        self._bar.close()
