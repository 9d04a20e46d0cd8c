"""Units of a sampling run: batches of one cost, sampled whole, image by image into a record store.

Work is cut into fixed batches.  A batch of which an image is missing is sampled whole, and only what is
missing is written: a run that was killed and taken up again ends with the bytes of one that was not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from guidance.apply import StepRecord
from guidance.arms import Arm
from guidance.cfg import ClassifierFree
from guidance.errors import UserError
from guidance.pipelines import fingerprint
from guidance.prompts import Prompt
from guidance.records import Record, RecordStore, noise_hash, toolkit_version
from guidance.sampling import decode_latents, initial_noise, sample_latents, using_scheduler
from guidance.start import ImageStart, begin_with
from guidance.steering import steer_latents

Item = TypeVar("Item")

#: What must be equal between an image that is there and the one that is asked for.
_MADE_BY: tuple[str, ...] = ("prompt", "noise_hash", "start", "guides", "conditioning", "steering")
_MADE_BY += ("cfg_scale", "cfg", "scheduler", "num_steps", "model_fingerprint", "dtype")


@dataclasses.dataclass(frozen=True)
class Job:
    """One image to make under every arm."""

    prompt: Prompt
    seed: int
    start: ImageStart | None = None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an arm is sampled, beside its guides; see :func:`guidance.sampling.sample_latents`."""

    num_steps: int = 25
    cfg_scale: float | ClassifierFree = 4.0
    scheduler: str | None = None
    strength: float = 0.6  # of jobs that start from an image: the fraction of the steps to take

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(
                f"Expected a strength above 0 and up to 1, got {self.strength:g}; 0.6 keeps the composition, 1 "
                "forgets the image."
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """One image to make: a job under an arm."""

    job: Job
    arm: Arm
    sampling: Sampling

    @property
    def key(self) -> tuple[str, str, int]:
        """The key of its record."""
        return self.arm.name, self.job.prompt.id, self.job.seed


#: What is sampled at once: a fixed batch, so that no image depends on who samples it.  Its arms are of equal cost:
#: they may differ in the guidance scale and in the weight of classifier-free guidance.
Unit = tuple[Task, ...]


class UnitSampler:
    """Samples units, image by image into a record store.

    Args:
        pipe: Pipeline that :func:`check_sampling` has passed for the arms of all units.
        store: Where images and records go, and which are done.
        model: What to call the model in the records.
    """

    def __init__(self, pipe: Any, store: RecordStore, *, model: str) -> None:
        self.pipe, self.store = pipe, store
        self._model = {"model": model, "model_fingerprint": fingerprint(pipe.unet)}
        self._model |= {"dtype": str(pipe.unet.dtype).removeprefix("torch."), "version": toolkit_version()}
        self._schedulers: dict[str | None, str] = {}
        self._jobs: dict[Job, dict[str, Any]] = {}  # what a record says of a job under any arm

    def missing(self, unit: Unit) -> list[Task]:
        """The tasks of a unit that are not done.

        Raises:
            UserError: If an image of the same name was made in another way.
        """
        return [task for task in unit if not _is_done(self.store, self._plan(task))]

    def images(self, unit: Unit) -> list[tuple[Record, Any]]:
        """Sample a unit whole; nothing is written."""
        begun = time.perf_counter()
        arm, options = unit[0].arm, dict(vars(unit[0].sampling)) | _mixture(unit)
        strength = options.pop("strength")
        texts, seeds = [task.job.prompt.text for task in unit], [task.job.seed for task in unit]
        if arm.conditioning is not None:
            options["guide_prompts"] = texts
            texts = [arm.conditioning] * len(texts)
        if starts := [task.job.start for task in unit if task.job.start is not None]:
            options["start"] = begin_with(self.pipe, starts, strength)
        latents, scores, skipped = _sample_arm(self.pipe, texts, seeds, arm, options)
        images = decode_latents(self.pipe, latents)  # on the CPU: the clock sees all of the device's work
        measured: dict[str, Any] = {"batch_size": len(unit)}
        measured["seconds"] = round((time.perf_counter() - begun) / len(unit), 5)
        return [
            (self._plan(task, **measured, score=scores[i], nan_skipped=skipped[i]), images[i])
            for i, task in enumerate(unit)
        ]

    def sample(self, unit: Unit, tasks: Sequence[Task]) -> None:
        """Sample a unit whole, and write the images of some of its tasks."""
        self.write(self.images(unit), tasks)

    def write(self, made: Sequence[tuple[Record, Any]], tasks: Sequence[Task]) -> None:
        """Write those of the images that are of these tasks."""
        wanted = {task.key for task in tasks}
        for record, image in made:
            if record.key in wanted:
                self.store.append(record, image)

    def _plan(self, task: Task, **measured: Any) -> Record:
        """The record of an image, with everything that is known before it is sampled and what was measured."""
        job, arm, sampling = task.job, task.arm, task.sampling
        cfg, start = ClassifierFree.of(sampling.cfg_scale), job.start
        values: dict[str, Any] = {
            "arm": arm.name,
            "guides": list(arm.descriptions),
            "head": arm.head,
            "conditioning": arm.conditioning,
            "steering": None if arm.steering is None else arm.steering.describe(),
            "cfg_scale": float(cfg.scale),  # type: ignore[arg-type]  # of one image
            "cfg": cfg.describe(),
            "scheduler": self._scheduler(sampling.scheduler),
            "num_steps": sampling.num_steps,
            "start": start and {"image": start.digest, "strength": sampling.strength},
            "image": f"images/{arm.name}/{job.prompt.id}_seed{job.seed}.png",
        }
        values |= {"seconds": 0.0, "batch_size": 0, "score": None, "nan_skipped": 0, "sha256": "", "bytes": 0}
        return Record(**(self._job(job) | self._model | values | measured))

    def _job(self, job: Job) -> dict[str, Any]:
        if job not in self._jobs:
            prompt = job.prompt
            noise = initial_noise(self.pipe, [torch.Generator().manual_seed(job.seed)])
            told: dict[str, Any] = {
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "category": prompt.category,
            }
            told |= {"challenge": prompt.challenge, "seed": job.seed, "noise_hash": noise_hash(noise)}
            tokenizer = self.pipe.tokenizer
            told["truncated"] = (
                len(tokenizer(prompt.text, verbose=False).input_ids) > tokenizer.model_max_length
            )
            self._jobs[job] = told
        return self._jobs[job]

    def _scheduler(self, name: str | None) -> str:
        if name not in self._schedulers:
            with using_scheduler(self.pipe, name):
                self._schedulers[name] = type(self.pipe.scheduler).__name__
        return self._schedulers[name]


def list_batches(items: Sequence[Item], size: int) -> list[tuple[Item, ...]]:
    """Cut jobs or tasks into batches, the last of which may be smaller."""
    return [tuple(items[i : i + size]) for i in range(0, len(items), size)]


def _mixture(unit: Unit) -> dict[str, Any]:
    """Options of the sampler that differ within a unit, one value a sample; none if all tasks have the same arm."""
    arms = [task.arm for task in unit]
    if len({arm.name for arm in arms}) == 1:
        return {}
    scales = [arm.guides[0].strength.guidance_scale for arm in arms if arm.guides]
    weights = tuple(task.sampling.cfg_scale for task in unit)
    options: dict[str, Any] = {"cfg_scale": weights} if len(set(weights)) > 1 else {}
    return options | ({"guide_factors": [s / scales[0] for s in scales]} if scales else {})


def _is_done(store: RecordStore, planned: Record) -> bool:
    """Tell whether an image is in the store, and refuse one that was made in another way."""
    found = store.get(*planned.key)
    if found is None or not store.has(*planned.key):
        return False
    for field in _MADE_BY:
        was, now = getattr(found, field), getattr(planned, field)
        if was != now:
            raise UserError(
                f"Expected '{store.folder / found.image}' to be made with {field}={now!r}, but it was with "
                f"{was!r}; choose another output folder, or set fresh=true to move this one aside."
            )
    return True


def _sample_arm(
    pipe: Any, texts: Sequence[str], seeds: Sequence[int], arm: Arm, options: dict[str, Any]
) -> tuple[Tensor, list[float | None], list[int]]:
    """Latents of one batch, each sample's last score, and its number of skipped gradients."""
    if arm.steering is None:
        watch = _Watch(len(texts))
        latents = sample_latents(pipe, texts, seeds, guides=arm.guides, callback=watch, **options)
        return latents, watch.scores, watch.skipped
    n = arm.steering.particles
    watch = _Watch(len(texts) * n)
    options = options | arm.steering.options() | {"guides": arm.guides, "callback": watch}
    steered = steer_latents(pipe, texts, seeds, arm.steering.guide, **options)
    assert steered.chosen is not None  # select="best"
    best = steered.scores.gather(1, steered.chosen[:, None])[:, 0]
    skipped = [max(watch.skipped[i * n : (i + 1) * n]) for i in range(len(texts))]
    return steered.latents, [round(s, 6) for s in best.tolist()], skipped


class _Watch:
    """Callback of the sampler that keeps each sample's last score and counts its skipped gradients."""

    def __init__(self, batch: int) -> None:
        self.scores: list[float | None] = [None] * batch
        self.skipped = [0] * batch
        self._seen: StepRecord | None = None

    def __call__(self, step: int, latents: Tensor, record: StepRecord | None) -> None:
        if record is None or record is self._seen:  # between gradients the last record is shown again
            return
        self._seen = record
        if record.scores:
            self.scores = [round(s, 6) for s in next(iter(record.scores.values())).tolist()]
        if record.skipped and record.grad_norm is not None:  # a skipped gradient was set to 0
            self.skipped = [
                n + int(g == 0) for n, g in zip(self.skipped, record.grad_norm.tolist(), strict=True)
            ]
