"""A sampling run: the same prompts, seeds and noise under several arms, batch by batch into a record store.

Work is cut into fixed batches.  A batch of which an image is missing is sampled whole, and only what is
missing is written: a run that was killed and taken up again ends with the bytes of one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from guidance.apply.step import StepRecord
from guidance.data.edits import EditPair, load_edit_pairs
from guidance.data.prompts import Prompt, load_prompts
from guidance.models.denoiser import fingerprint
from guidance.models.types import Pipeline
from guidance.runs.arms import Arm
from guidance.runs.records import Record, RecordStore, noise_hash, toolkit_version
from guidance.sampling.cfg import ClassifierFree
from guidance.sampling.loop import decode_latents, initial_noise, sample_latents, using_scheduler
from guidance.sampling.start import ImageStart, begin_with
from guidance.sampling.steering import check_copies, steer_latents
from guidance.utils.errors import UserError

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
    """How an arm is sampled, beside its guides; see :func:`guidance.sampling.loop.sample_latents`."""

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

    def __init__(self, pipe: Pipeline, store: RecordStore, *, model: str) -> None:
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
    pipe: Pipeline, texts: Sequence[str], seeds: Sequence[int], arm: Arm, options: dict[str, Any]
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


#: Seeds of neighbouring prompts lie this far apart, so that each draw of each prompt has noise of its own.
SEED_STRIDE = 1000


def list_jobs(prompts: Sequence[Prompt], seeds_per_prompt: int, seed: int) -> list[Job]:
    """Give draw ``j`` of prompt ``i`` the seed ``seed + 1000 i + j``; draws of a prompt are neighbours."""
    if not 1 <= seeds_per_prompt <= SEED_STRIDE:
        raise UserError(f"Expected 1 to {SEED_STRIDE} seeds per prompt, got {seeds_per_prompt}.")
    return [
        Job(p, seed + SEED_STRIDE * i + j) for i, p in enumerate(prompts) for j in range(seeds_per_prompt)
    ]


def check_sampling(
    pipe: Pipeline, arms: Sequence[Arm], *, num_steps: int, scheduler: str | None, batch_size: int
) -> str:
    """Check that what is to be sampled fits a pipeline, before anything is written.

    Returns:
        The class name of the scheduler.

    Raises:
        UserError: If they do not.
    """
    if not hasattr(pipe, "unet"):
        raise UserError(f"Expected a pipeline with a unet, got {type(pipe).__name__}, which has none.")
    if batch_size < 1:
        raise UserError(f"Expected a batch_size of at least 1, got {batch_size}.")
    with using_scheduler(pipe, scheduler):
        most = pipe.scheduler.config.num_train_timesteps
        if not 1 <= num_steps <= most:
            raise UserError(f"Expected num_steps from 1 to {most}, got {num_steps}; 25 is usual.")
        for guide in itertools.chain.from_iterable(arm.guides for arm in arms):
            guide.prepare(pipe)
        for arm in arms:
            if arm.steering is not None:
                arm.steering.guide.prepare(pipe)
                if arm.steering.particles > 1 and arm.steering.threshold > 0:
                    check_copies(pipe, arm.guides, arm.steering.eta)
        return type(pipe.scheduler).__name__


def sample_arms(
    pipe: Pipeline,
    jobs: Sequence[Job],
    arms: Sequence[Arm],
    store: RecordStore,
    *,
    model: str,
    num_steps: int = 25,
    cfg_scale: float | ClassifierFree = 4.0,
    scheduler: str | None = None,
    strength: float = 0.6,
    batch_size: int = 16,
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = True,
) -> int:
    """Sample every job under every arm from the same noise, and record each image; done ones are kept.

    Args:
        pipe, num_steps, cfg_scale, scheduler: See :func:`guidance.sampling.loop.sample_latents`.
        jobs, arms: What to sample.
        store: Where images and records go, and which are done.
        model: What to call the model in the records.
        strength: Fraction of the steps to take of jobs that start from an image.
        batch_size: Images per batch.  Another one changes an image by at most one grey level.
        process_index, num_processes: Which part of the batches and arms is this process's; the bytes of an image do not
            depend on it.
        progress: Show a bar with images per second.

    Returns:
        The number of images that were missing and have been made by this process.

    Raises:
        UserError: If the store holds images of the same name made in another way.
    """
    check_sampling(pipe, arms, num_steps=num_steps, scheduler=scheduler, batch_size=batch_size)
    sampler = UnitSampler(pipe, store, model=model)
    sampling = Sampling(num_steps, cfg_scale, scheduler, strength)
    units = [
        tuple(Task(job, arm, sampling) for job in batch)
        for i, batch in enumerate(list_batches(jobs, batch_size))
        for j, arm in enumerate(arms)
        if (i + j) % num_processes == process_index  # arms differ in cost: every process has some of each
    ]
    todo = [(unit, missing) for unit in units if (missing := sampler.missing(unit))]
    total = sum(len(missing) for _, missing in todo)
    with tqdm(total=total, disable=not progress, unit="image", desc="sample") as bar:
        for unit, missing in todo:
            bar.set_postfix_str(unit[0].arm.name, refresh=False)
            sampler.sample(unit, missing)
            bar.update(len(missing))
    return total


def read_jobs(
    prompts: str | Sequence[str],
    num_prompts: int | None,
    seeds_per_prompt: int,
    seed: int,
    *,
    category: str | Sequence[str] | None = None,
    edits: str | None = None,
) -> list[Job]:
    """List what is to be sampled.

    Args:
        prompts: See :func:`guidance.data.prompts.load_prompts`; not used with ``edits``.
        num_prompts: How many of a set, of a file or of the edits; a list is taken whole.
        seeds_per_prompt, seed: See :func:`guidance.runs.run.list_jobs`; the seed also chooses the prompts.
        category: Categories to take prompts of.
        edits: Edit pairs, see :func:`guidance.data.edits.load_edit_pairs`: their images are changed towards the edited
            captions (SDEdit).

    Raises:
        UserError: If there are no such prompts or edits, or an edit has no image.
    """
    if edits is None:
        count = num_prompts if isinstance(prompts, str) else None
        return list_jobs(load_prompts(prompts, count, seed, category=category), seeds_per_prompt, seed)
    pairs = load_edit_pairs(edits, num_prompts, seed)
    starts = {pair.id: _start(pair) for pair in pairs}
    jobs = list_jobs([Prompt(pair.id, pair.edited_caption) for pair in pairs], seeds_per_prompt, seed)
    return [Job(job.prompt, job.seed, starts[job.prompt.id]) for job in jobs]


def _start(pair: EditPair) -> ImageStart:
    image = pair.image
    if image is None:
        raise UserError(
            f"Expected edits with the images they start from, got '{pair.id}' without; name others."
        )
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]
    return ImageStart(lambda: image, digest)
