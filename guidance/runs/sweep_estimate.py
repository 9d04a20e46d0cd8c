"""What a sweep will cost: images, network calls, time and disk, before anything is written."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guidance.guides.phases import FRESH
from guidance.models.types import Pipeline
from guidance.runs.arms import Arm
from guidance.runs.records import Record, RecordStore, encode_png
from guidance.runs.run import Job
from guidance.runs.sweep import ArmBuilder, Cell
from guidance.sampling.cfg import ClassifierFree
from guidance.sampling.loop import decode_latents, sample_latents
from guidance.sampling.start import steps_taken

_STEPS = 4  # of the batch that is timed

_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class CellCost:
    """What a cell costs.

    Attributes:
        cell: The cell.
        images, done: To make in all, and there already.
        steps: Taken for an image.
        calls: Forward passes of the denoiser an image; with classifier-free guidance two a step.
        guided: Steps an image in which a guide takes a gradient (or predicts one).
    """

    cell: Cell
    images: int
    done: int
    steps: int
    calls: int
    guided: int


@dataclasses.dataclass(frozen=True)
class Speed:
    """How long images take and how large they are.

    Attributes:
        seconds: Cell name -> seconds an image, of one process.
        size: Bytes an image.
        source: What was measured, in words.
    """

    seconds: dict[str, float]
    size: float
    source: str


def count_costs(
    cells: Sequence[Cell], arms: Mapping[str, Arm], jobs: Sequence[Job], store: RecordStore | None
) -> list[CellCost]:
    """Count what each cell takes, and what is in the store already."""
    costs = []
    for cell in cells:
        done = sum(store is not None and store.has(cell.name, job.prompt.id, job.seed) for job in jobs)
        per_step = 1 if cell.cfg_scale == 1 else 2
        taken = steps_taken(cell.strength, cell.num_steps) if jobs[0].start else cell.num_steps
        phases = [g.strength.phases(cell.num_steps, cell.num_steps - taken) for g in arms[cell.name].guides]
        gradients = sum(FRESH in kinds for kinds in zip(*phases, strict=True))
        costs.append(CellCost(cell, len(jobs), done, taken, per_step * taken, gradients))
    return costs


def speed_from_records(costs: Sequence[CellCost], store: RecordStore | None) -> Speed | None:
    """Read the speed off records; None if there are none for some kind of cell."""
    records: dict[str, list[Record]] = {}
    for record in store.load(check=None) if store is not None else []:
        records.setdefault(record.arm, []).append(record)
    known = {
        c.cell.name: statistics.median(r.seconds for r in records[c.cell.name])
        for c in costs
        if c.cell.name in records
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
    """Sample one small batch of a few steps for each kind of cell, and keep nothing of it."""
    few = list(jobs[: min(_IMAGES, batch_size)])
    steps: dict[Any, float] = {}

    def a_step(cell: Cell) -> float:
        if _kind(cell) not in steps:
            always = dataclasses.replace(cell, start=0.0, stop=1.0) if cell.scale else cell
            arm = builder.build(always)
            steps[_kind(cell)] = _time(lambda: _sample(pipe, few, arm, cell)) / _STEPS / len(few)
        return steps[_kind(cell)]

    first = costs[0].cell
    _sample(pipe, few, Arm(""), first)  # the first batch of a process is slow
    latents = _sample(pipe, few, Arm(""), first)
    decode = _time(lambda: decode_latents(pipe, latents)) / len(few)
    size = statistics.fmean(len(encode_png(image)) for image in decode_latents(pipe, latents))
    seconds = {}
    for c in costs:
        plain = dataclasses.replace(c.cell, scale=0.0, guide=(), head=None, start=None, stop=None)
        steps_of = {plain: c.steps - c.guided, c.cell: c.guided} if c.guided else {plain: c.steps}
        seconds[c.cell.name] = decode + sum(n * a_step(cell) for cell, n in steps_of.items() if n)
    source = f"timed with a batch of {len(few)} images and {_STEPS} steps for each kind of cell"
    return Speed(seconds, size, source)


def _sample(pipe: Pipeline, jobs: Sequence[Job], arm: Arm, cell: Cell) -> Any:
    texts, seeds = [job.prompt.text for job in jobs], [job.seed for job in jobs]
    options: dict[str, Any] = {"cfg_scale": cell.cfg_scale, "scheduler": cell.scheduler}
    return sample_latents(pipe, texts, seeds, num_steps=_STEPS, guides=arm.guides, **options)


def _time(function: Any) -> float:
    begun = time.perf_counter()
    result = function()
    if hasattr(result, "cpu"):
        result.cpu()  # waits for the device
    return time.perf_counter() - begun


def _kind(cell: Cell) -> tuple[Any, ...]:
    """What a step costs depends on."""
    return cell.guide, cell.head, ClassifierFree.of(cell.cfg_scale).scale == 1


def describe_plan(
    costs: Sequence[CellCost], speed: Speed, floors: Sequence[str], *, where: str, folder: Path, noises: int
) -> str:
    """The plan in words and a table.

    Args:
        costs, speed: What it costs.
        floors: What a guided step costs, a sentence for each guide.
        where: Device.
        folder: Of the sweep.
        noises: Prompts times seeds.
    """
    width = max(len(c.cell.name) for c in costs) + 2
    lines = [
        f"{'cell':<{width}}{'images':>8}{'done':>7}{'calls/image':>13}{'guided steps':>14}{'s/image':>9}"
    ]
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
        f"network calls to make: {calls:,} forward passes of one image (with CFG two a step)",
        *([f"guided steps to make: {guided:,}; {'; '.join(floors)}"] if guided else []),
        f"time: about {duration(seconds)} by one process on {where} ({speed.source})",
        f"disk: about {(images - done) * speed.size / 1e6:,.1f} MB at {speed.size / 1e3:.1f} kB an image, "
        f"grid and sheets about as much again; {shutil.disk_usage(parent).free / 1e9:,.1f} GB are free",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Time as people say it.

    >>> [duration(s) for s in (12.4, 100, 7300)]
    ['12 s', '1 min 40 s', '2 h 1 min']
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
