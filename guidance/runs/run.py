"""A sampling run: the same prompts, seeds and noise under several arms, batch by batch into a record store.

Work is cut into fixed batches.  A batch that lacks an image is sampled as a whole and only the missing images are
written, so that a run that was killed and resumed ends with the bytes of one that was not.
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

from guidance.apply.guided import require_moving
from guidance.apply.values import GuidanceHandle
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

#: Record fields in which an existing image must agree with the one that is asked for.
_IDENTITY = (
    *("prompt", "noise_hash", "start", "guides", "conditioning", "steering"),
    *("cfg_scale", "cfg", "scheduler", "num_steps", "model_fingerprint", "dtype"),
)

#: Seeds of neighbouring prompts are this far apart, so that each draw of each prompt has its own noise.
SEED_STRIDE = 1000


@dataclasses.dataclass(frozen=True)
class Job:
    """One image to make under every arm."""

    prompt: Prompt
    seed: int
    start: ImageStart | None = None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling options of an arm besides its guides; see :func:`guidance.sampling.loop.sample_latents`."""

    num_steps: int = 25
    cfg_scale: float | ClassifierFree = 4.0
    scheduler: str | None = None
    strength: float = 0.6  # fraction of the steps to take, for jobs that start from an image

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


#: Tasks that are sampled together: a fixed batch, so that no image depends on which process samples it.  Its arms have
#: equal cost: they may differ in guidance scale and in the weight of classifier-free guidance.
Unit = tuple[Task, ...]


class UnitSampler:
    """Sample units into a record store.

    Args:
        pipe: Pipeline that :func:`check_sampling` has accepted for the arms of all units.
        store: Receives images and records, and knows which are done.
        model: Name of the model in the records.
    """

    def __init__(self, pipe: Pipeline, store: RecordStore, *, model: str) -> None:
        self.pipe, self.store = pipe, store
        self._model = {
            "model": model,
            "model_fingerprint": fingerprint(pipe.unet),
            "dtype": str(pipe.unet.dtype).removeprefix("torch."),
            "version": toolkit_version(),
        }
        self._schedulers: dict[str | None, str] = {}
        self._jobs: dict[Job, dict[str, Any]] = {}  # record fields of a job, the same under every arm

    def missing(self, unit: Unit) -> list[Task]:
        """Return the tasks of a unit that are not done."""
        return [task for task in unit if not _is_done(self.store, self._record(task))]

    def images(self, unit: Unit) -> list[tuple[Record, Any]]:
        """Sample a whole unit; nothing is written."""
        start_time = time.perf_counter()
        arm, sampling = unit[0].arm, unit[0].sampling
        options: dict[str, Any] = {"num_steps": sampling.num_steps, "scheduler": sampling.scheduler}
        options |= {"cfg_scale": sampling.cfg_scale} | _per_sample_options(unit)
        texts, seeds = [task.job.prompt.text for task in unit], [task.job.seed for task in unit]
        if arm.conditioning is not None:
            options["guide_prompts"] = texts
            texts = [arm.conditioning] * len(texts)
        if starts := [task.job.start for task in unit if task.job.start is not None]:
            options["start"] = begin_with(self.pipe, starts, sampling.strength)
        latents, measured = _sample_arm(self.pipe, texts, seeds, arm, options)
        images = decode_latents(self.pipe, latents)  # on the CPU, so the clock includes all work of the device
        seconds = round((time.perf_counter() - start_time) / len(unit), 5)
        records = (
            self._record(task, batch_size=len(unit), seconds=seconds, **facts)
            for task, facts in zip(unit, measured, strict=True)
        )
        return list(zip(records, images, strict=True))

    def write(self, images: Sequence[tuple[Record, Any]], tasks: Sequence[Task]) -> None:
        """Write the images that belong to these tasks."""
        wanted = {task.key for task in tasks}
        for record, image in images:
            if record.key in wanted:
                self.store.append(record, image)

    def _record(self, task: Task, **measured: Any) -> Record:
        """Return the record of an image: what is known before it is sampled, and what was measured."""
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
        return Record(**(self._job_fields(job) | self._model | values | measured))

    def _job_fields(self, job: Job) -> dict[str, Any]:
        if job not in self._jobs:
            prompt, tokenizer = job.prompt, self.pipe.tokenizer
            noise = initial_noise(self.pipe, [torch.Generator().manual_seed(job.seed)])
            self._jobs[job] = {
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "category": prompt.category,
                "challenge": prompt.challenge,
                "seed": job.seed,
                "noise_hash": noise_hash(noise),
                "truncated": len(tokenizer(prompt.text, verbose=False).input_ids) > tokenizer.model_max_length,
            }
        return self._jobs[job]

    def _scheduler(self, name: str | None) -> str:
        if name not in self._schedulers:
            with using_scheduler(self.pipe, name):
                self._schedulers[name] = type(self.pipe.scheduler).__name__
        return self._schedulers[name]


def list_batches(items: Sequence[Item], size: int) -> list[tuple[Item, ...]]:
    """Cut jobs or tasks into batches, the last of which may be smaller."""
    return [tuple(items[i : i + size]) for i in range(0, len(items), size)]


def _per_sample_options(unit: Unit) -> dict[str, Any]:
    """Return the sampler's options that differ within a unit, one value per sample; none if all arms are the same."""
    arms = [task.arm for task in unit]
    if len({arm.name for arm in arms}) == 1:
        return {}
    scales = [arm.guides[0].guidance_scale for arm in arms if arm.guides]
    weights = tuple(task.sampling.cfg_scale for task in unit)
    options: dict[str, Any] = {"cfg_scale": weights} if len(set(weights)) > 1 else {}
    return options | ({"guide_factors": [s / scales[0] for s in scales]} if scales else {})


def _is_done(store: RecordStore, planned: Record) -> bool:
    """Tell whether an image is in the store; refuse one that was made with other options."""
    found = store.get(*planned.key)
    if found is None or not store.has(*planned.key):
        return False
    for field in _IDENTITY:
        before, now = getattr(found, field), getattr(planned, field)
        if before != _of_keys(now, before):
            raise UserError(
                f"Expected '{store.folder / found.image}' to be made with {field}={now!r}, but it was with "
                f"{before!r}; choose another output folder, or set fresh=true to move this one aside."
            )
    return True


def _of_keys(now: Any, before: Any) -> Any:
    """Return what is asked for of the options that a record names; those of earlier versions name fewer of a scorer."""
    if not (isinstance(now, dict) and isinstance(before, dict)):
        return now
    return {key: _of_keys(value, before[key]) for key, value in now.items() if key in before}


def _sample_arm(
    pipe: Pipeline, texts: Sequence[str], seeds: Sequence[int], arm: Arm, options: dict[str, Any]
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return the latents of a batch, and what happened to each sample: fields of its record."""
    handle = GuidanceHandle()
    options = options | {"guides": arm.guides, "handle": handle}
    if arm.steering is None:
        latents = sample_latents(pipe, texts, seeds, **options)
        last = next((record.scores for record in reversed(handle.records) if record.scores), {})
        scores = next(iter(last.values())).tolist() if last else [None] * len(texts)
        return latents, _facts(handle, scores, _count_skipped(handle, len(texts)))
    particles = arm.steering.particles
    steered = steer_latents(pipe, texts, seeds, arm.steering.guide, **arm.steering.options(), **options)
    assert steered.chosen is not None  # select="best"
    best = steered.scores.gather(1, steered.chosen[:, None])[:, 0].tolist()
    skipped = [max(group) for group in list_batches(_count_skipped(handle, len(texts) * particles), particles)]
    return steered.latents, _facts(handle, best, skipped)


def _count_skipped(handle: GuidanceHandle, batch: int) -> list[int]:
    """Return for each sample the steps in which its gradient was not finite."""
    masks = [record.finite for record in handle.records if record.finite is not None]
    return sum((~mask).long() for mask in masks).tolist() if masks else [0] * batch


def _facts(handle: GuidanceHandle, scores: Sequence[float | None], skipped: Sequence[int]) -> list[dict[str, Any]]:
    run = {"steps": handle.steps, "gradients": handle.gradients, "pushes": handle.pushes}
    rounded = (None if score is None else round(score, 6) for score in scores)
    return [{"score": score, "nan_skipped": n} | run for score, n in zip(rounded, skipped, strict=True)]


def check_sampling(pipe: Pipeline, arms: Sequence[Arm], sampling: Sampling, batch_size: int = 1) -> None:
    """Check that arms and options fit a pipeline, before anything is written."""
    if not hasattr(pipe, "unet"):
        raise UserError(f"Expected a pipeline with a unet, got {type(pipe).__name__}, which has none.")
    if batch_size < 1:
        raise UserError(f"Expected a batch_size of at least 1, got {batch_size}.")
    with using_scheduler(pipe, sampling.scheduler):
        most = pipe.scheduler.config.num_train_timesteps
        if not 1 <= sampling.num_steps <= most:
            raise UserError(f"Expected num_steps from 1 to {most}, got {sampling.num_steps}; 25 is usual.")
        modulate = ClassifierFree.of(sampling.cfg_scale).modulate
        if modulate is not None:
            modulate.prepare(pipe)
        for guide in itertools.chain.from_iterable(arm.guides for arm in arms):
            guide.prepare(pipe)
            require_moving([guide], pipe.scheduler)
        for steering, guides in ((arm.steering, arm.guides) for arm in arms if arm.steering is not None):
            steering.guide.prepare(pipe)
            if steering.particles > 1 and steering.threshold > 0:
                check_copies(pipe, guides, steering.eta)


def sample_arms(
    pipe: Pipeline,
    jobs: Sequence[Job],
    arms: Sequence[Arm],
    store: RecordStore,
    sampling: Sampling = Sampling(),
    *,
    model: str,
    batch_size: int = 16,
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = True,
) -> int:
    """Sample every job under every arm from the same noise, and record each image; finished ones are kept.

    Args:
        pipe: A pipeline with a UNet.
        jobs, arms, sampling: What to sample, and how.
        store: Receives images and records, and knows which are done.
        model: Name of the model in the records.
        batch_size: Images per batch.  Another one changes an image by at most one grey level.
        process_index, num_processes: This process's part of the batches and arms; the bytes of an image do not depend
            on it.
        progress: Show a bar with images per second.

    Returns:
        The number of missing images that this process has made.

    Raises:
        UserError: If the store holds images of the same name made with other options.
    """
    check_sampling(pipe, arms, sampling, batch_size)
    sampler = UnitSampler(pipe, store, model=model)
    units = [
        tuple(Task(job, arm, sampling) for job in batch)
        for i, batch in enumerate(list_batches(jobs, batch_size))
        for j, arm in enumerate(arms)
        if (i + j) % num_processes == process_index  # arms differ in cost: every process gets some of each
    ]
    todo = [(unit, missing) for unit in units if (missing := sampler.missing(unit))]
    total = sum(len(missing) for _, missing in todo)
    with tqdm(total=total, disable=not progress, unit="image", desc="sample") as bar:
        for unit, missing in todo:
            bar.set_postfix_str(unit[0].arm.name, refresh=False)
            sampler.write(sampler.images(unit), missing)
            bar.update(len(missing))
    return total


def list_jobs(prompts: Sequence[Prompt], seeds_per_prompt: int, seed: int) -> list[Job]:
    """Give draw ``j`` of prompt ``i`` the seed ``seed + 1000 i + j``; the draws of a prompt are neighbours."""
    if not 1 <= seeds_per_prompt <= SEED_STRIDE:
        raise UserError(f"Expected 1 to {SEED_STRIDE} seeds per prompt, got {seeds_per_prompt}.")
    return [Job(p, seed + SEED_STRIDE * i + j) for i, p in enumerate(prompts) for j in range(seeds_per_prompt)]


def read_jobs(
    prompts: Any,
    num_prompts: int | None,
    seeds_per_prompt: int,
    seed: int,
    *,
    category: Any = None,
    edits: str | None = None,
) -> list[Job]:
    """List the images to sample, from the options of a script.

    Args:
        prompts: A set, a file or a list of texts, see :func:`guidance.data.prompts.load_prompts`; not used with
            ``edits``.
        num_prompts: Number of prompts of a set or file, or of edits; a list is taken as it is.
        seeds_per_prompt, seed: See :func:`list_jobs`; the seed also chooses the prompts.
        category: A category or a list of categories to take prompts from.
        edits: Edit pairs, see :func:`guidance.data.edits.load_edit_pairs`, whose images are changed towards their
            edited captions (SDEdit).
    """
    if not isinstance(prompts, str) and not _are_texts(prompts):
        raise UserError(f"Expected prompts as a set, a file or a list of texts, got {prompts!r}.")
    if not (category is None or isinstance(category, str) or _are_texts(category)):
        raise UserError(f"Expected a category or a list of categories, got {category!r}.")
    if edits is None:
        count = num_prompts if isinstance(prompts, str) else None
        return list_jobs(load_prompts(prompts, count, seed, category=category), seeds_per_prompt, seed)
    pairs = load_edit_pairs(edits, num_prompts, seed)
    starts = {pair.id: _image_start(pair) for pair in pairs}
    jobs = list_jobs([Prompt(pair.id, pair.edited_caption) for pair in pairs], seeds_per_prompt, seed)
    return [Job(job.prompt, job.seed, starts[job.prompt.id]) for job in jobs]


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _image_start(pair: EditPair) -> ImageStart:
    image = pair.image
    if image is None:
        raise UserError(f"Expected edits with the images they start from, but '{pair.id}' has none; name others.")
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]
    return ImageStart(lambda: image, digest)
