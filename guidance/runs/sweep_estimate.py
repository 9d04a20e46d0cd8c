"""Estimate the cost of a sweep: images, network calls, time and disk, before anything is written."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guidance.guides.base import FRESH
from guidance.models.types import Pipeline
from guidance.runs.arms import Arm
from guidance.runs.records import Record, RecordStore, encode_png
from guidance.runs.run import Job
from guidance.runs.sweep import ArmBuilder, Cell
from guidance.sampling.cfg import ClassifierFree
from guidance.sampling.loop import decode_latents, sample_latents
from guidance.sampling.start import steps_taken

_STEPS, _IMAGES = 4, 8  # of the batch that is timed


@dataclasses.dataclass(frozen=True)
class CellCost:
    """Cost of a cell.

    Attributes:
        cell: The cell.
        images, done: Number of images in all, and of those that exist.
        steps: Steps per image.
        calls: Forward passes of the denoiser per image; with classifier-free guidance two per step.
        guided: Steps per image in which a guide takes a gradient (or predicts one).
    """

    cell: Cell
    images: int
    done: int
    steps: int
    calls: int
    guided: int


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time and size of images.

    Attributes:
        seconds: Cell name -> seconds per image in one process.
        size: Bytes per image.
        source: Description of the measurement.
    """

    seconds: dict[str, float]
    size: float
    source: str


def count_costs(
    cells: Sequence[Cell], arms: Mapping[str, Arm], jobs: Sequence[Job], store: RecordStore | None
) -> list[CellCost]:
    """Count images, forward passes and guided steps of each cell."""
    costs = []
    for cell in cells:
        done = sum(store is not None and store.has(cell.name, job.prompt.id, job.seed) for job in jobs)
        per_step = 1 if cell.cfg_scale == 1 else 2
        taken = steps_taken(cell.strength, cell.num_steps) if jobs[0].start else cell.num_steps
        phases = [g.phases(cell.num_steps, cell.num_steps - taken) for g in arms[cell.name].guides]
        gradients = sum(FRESH in kinds for kinds in zip(*phases, strict=True))
        costs.append(CellCost(cell, len(jobs), done, taken, per_step * taken, gradients))
    return costs


def speed_from_records(costs: Sequence[CellCost], store: RecordStore | None) -> Speed | None:
    """Take the speed from existing records; None if some kind of cell has none."""
    records: dict[str, list[Record]] = {}
    for record in store.load(check=None) if store is not None else []:
        records.setdefault(record.arm, []).append(record)
    known = {
        c.cell.name: statistics.median(r.seconds for r in records[c.cell.name]) for c in costs if c.cell.name in records
    }
    seconds: dict[str, float] = {}
    for c in costs:
        alike = [o for o in costs if o.cell.name in known and _kind(o.cell) == _kind(c.cell)]
        if not alike:
            return None
        like = c if c.cell.name in known else min(alike, key=lambda o: abs(o.calls - c.calls))
        seconds[c.cell.name] = known[like.cell.name] * c.calls / like.calls
    size = statistics.fmean(r.bytes for rows in records.values() for r in rows)
    return Speed(seconds, size, f"by the records of {sum(map(len, records.values()))} images in the folder")


def speed_from_batch(
    pipe: Pipeline, costs: Sequence[CellCost], builder: ArmBuilder, jobs: Sequence[Job], batch_size: int
) -> Speed:
    """Time a small batch of a few steps for each kind of cell; nothing is kept."""
    batch = list(jobs[: min(_IMAGES, batch_size)])
    step_seconds: dict[Any, float] = {}

    def seconds_per_step(cell: Cell) -> float:
        if _kind(cell) not in step_seconds:
            always = dataclasses.replace(cell, start=0.0, stop=1.0) if cell.scale else cell
            arm = builder.build(always)
            step_seconds[_kind(cell)] = _time(lambda: _sample(pipe, batch, arm, cell)) / _STEPS / len(batch)
        return step_seconds[_kind(cell)]

    first = costs[0].cell
    _sample(pipe, batch, Arm(""), first)  # the first batch of a process is slow
    latents = _sample(pipe, batch, Arm(""), first)
    decode = _time(lambda: decode_latents(pipe, latents)) / len(batch)
    size = statistics.fmean(len(encode_png(image)) for image in decode_latents(pipe, latents))
    seconds = {}
    for c in costs:
        unguided = dataclasses.replace(c.cell, scale=0.0, guide=(), head=None, start=None, stop=None)
        steps = [(unguided, c.steps - c.guided), (c.cell, c.guided)]
        seconds[c.cell.name] = decode + sum(n * seconds_per_step(cell) for cell, n in steps if n)
    source = f"timed with a batch of {len(batch)} images and {_STEPS} steps for each kind of cell"
    return Speed(seconds, size, source)


def _sample(pipe: Pipeline, jobs: Sequence[Job], arm: Arm, cell: Cell) -> Any:
    texts, seeds = [job.prompt.text for job in jobs], [job.seed for job in jobs]
    options: dict[str, Any] = {"cfg_scale": cell.cfg_scale, "scheduler": cell.scheduler}
    return sample_latents(pipe, texts, seeds, num_steps=_STEPS, guides=arm.guides, **options)


def _time(function: Any) -> float:
    start = time.perf_counter()
    result = function()
    if hasattr(result, "cpu"):
        result.cpu()  # waits for the device
    return time.perf_counter() - start


def _kind(cell: Cell) -> tuple[Any, ...]:
    """Key of the cells whose steps cost the same."""
    return cell.guide, cell.head, ClassifierFree.of(cell.cfg_scale).scale == 1


def describe_plan(
    costs: Sequence[CellCost], speed: Speed, prices: Sequence[str], *, where: str, folder: Path, noises: int
) -> str:
    """Describe the plan in a table and a few sentences.

    Args:
        costs, speed: Cost of the cells.
        prices: Cost of a guided step, a sentence for each guide.
        where: Device.
        folder: Folder of the sweep.
        noises: Prompts times seeds.
    """
    width = max(len(c.cell.name) for c in costs) + 2
    lines = [f"{'cell':<{width}}{'images':>8}{'done':>7}{'calls/image':>13}{'guided steps':>14}{'s/image':>9}"]
    for c in costs:
        row = f"{c.cell.name:<{width}}{c.images:>8}{c.done:>7}{c.calls:>13}{c.guided:>14}"
        lines.append(f"{row}{speed.seconds[c.cell.name]:>9.3f}")
    images, done = sum(c.images for c in costs), sum(c.done for c in costs)
    calls = sum((c.images - c.done) * c.calls for c in costs)
    guided = sum((c.images - c.done) * c.guided for c in costs)
    seconds = sum((c.images - c.done) * speed.seconds[c.cell.name] for c in costs)
    parent = next(p for p in folder.absolute().parents if p.exists())
    lines += [
        f"\n{len(costs)} cells x {noises} noises = {images} images, {done} of them done, into {folder}",
        f"network calls to make: {calls:,} forward passes of one image (with CFG two per step)",
        *([f"guided steps to make: {guided:,}; {'; '.join(prices)}"] if guided else []),
        f"time: about {duration(seconds)} by one process on {where} ({speed.source})",
        f"disk: about {(images - done) * speed.size / 1e6:,.1f} MB at {speed.size / 1e3:.1f} kB per image, "
        f"grid and sheets about as much again; {shutil.disk_usage(parent).free / 1e9:,.1f} GB are free",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Format a duration.

    >>> [duration(s) for s in (12.4, 100, 7300)]
    ['12 s', '1 min 40 s', '2 h 1 min']
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
