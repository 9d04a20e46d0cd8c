"""A sampling run: the same prompts, seeds and noise under several arms, image by image into a record store.

Work is cut into fixed batches.  A batch of which an image is missing is sampled whole, and only what is
missing is written: a run that was killed and taken up again ends with the bytes of one that was not.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from guidance.apply import StepRecord
from guidance.arms import Arm
from guidance.cfg import ClassifierFree
from guidance.errors import UserError
from guidance.pipelines import fingerprint
from guidance.prompts import Prompt
from guidance.records import Record, RecordStore, noise_hash, toolkit_version
from guidance.sampling import decode_latents, initial_noise, sample_latents, using_scheduler
from guidance.steering import check_copies, steer_latents

#: Seeds of neighbouring prompts lie this far apart, so that each draw of each prompt has noise of its own.
SEED_STRIDE = 1000


@dataclasses.dataclass(frozen=True)
class Job:
    """One image to make under every arm."""

    prompt: Prompt
    seed: int


def list_jobs(prompts: Sequence[Prompt], seeds_per_prompt: int, seed: int) -> list[Job]:
    """Give draw ``j`` of prompt ``i`` the seed ``seed + 1000 i + j``; draws of a prompt are neighbours."""
    if not 1 <= seeds_per_prompt <= SEED_STRIDE:
        raise UserError(f"Expected 1 to {SEED_STRIDE} seeds per prompt, got {seeds_per_prompt}.")
    return [
        Job(p, seed + SEED_STRIDE * i + j) for i, p in enumerate(prompts) for j in range(seeds_per_prompt)
    ]


def check_sampling(
    pipe: Any, arms: Sequence[Arm], *, num_steps: int, scheduler: str | None, batch_size: int
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
    pipe: Any,
    jobs: Sequence[Job],
    arms: Sequence[Arm],
    store: RecordStore,
    *,
    model: str,
    num_steps: int = 25,
    cfg_scale: float | ClassifierFree = 4.0,
    scheduler: str | None = None,
    batch_size: int = 16,
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = True,
) -> int:
    """Sample every job under every arm from the same noise, and record each image; done ones are kept.

    Args:
        pipe, num_steps, cfg_scale, scheduler: See :func:`guidance.sampling.sample_latents`.
        jobs, arms: What to sample.
        store: Where images and records go, and which are done.
        model: What to call the model in the records.
        batch_size: Images per batch.  Another one changes an image by at most one grey level.
        process_index, num_processes: Which part of the batches and arms is this process's; the bytes of an image do not
            depend on it.
        progress: Show a bar with images per second.

    Returns:
        The number of images that were missing and have been made by this process.

    Raises:
        UserError: If the store holds images of the same name made in another way.
    """
    name = check_sampling(pipe, arms, num_steps=num_steps, scheduler=scheduler, batch_size=batch_size)
    cfg = ClassifierFree.of(cfg_scale)
    common: dict[str, Any] = {"cfg_scale": float(cfg.scale), "cfg": cfg.describe()}
    common |= {"scheduler": name, "num_steps": num_steps}
    common |= {"model": model, "model_fingerprint": fingerprint(pipe.unet), "version": toolkit_version()}
    common["dtype"] = str(pipe.unet.dtype).removeprefix("torch.")
    options: dict[str, Any] = {"num_steps": num_steps, "cfg_scale": cfg, "scheduler": scheduler}
    units = [
        (batch, arm)
        for i, batch in enumerate(_batches(jobs, batch_size))
        for j, arm in enumerate(arms)
        if (i + j) % num_processes == process_index  # arms differ in cost: every process has some of each
    ]
    planned = {(arm.name, job): _plan(pipe, job, arm, common) for batch, arm in units for job in batch}
    missing = {key for key, record in planned.items() if not _is_done(store, record)}
    with tqdm(total=len(missing), disable=not progress, unit="image", desc="sample") as bar:
        for batch, arm in units:
            todo = [job for job in batch if (arm.name, job) in missing]
            if todo:
                bar.set_postfix_str(arm.name, refresh=False)
                for job, record, image in _sample_batch(pipe, batch, arm, planned, options):
                    if job in todo:
                        store.append(record, image)
                bar.update(len(todo))
    return len(missing)


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    for i in range(0, len(jobs), size):
        yield list(jobs[i : i + size])


def _plan(pipe: Any, job: Job, arm: Arm, common: dict[str, Any]) -> Record:
    """The record of an image with everything that is known before it is sampled."""
    noise = initial_noise(pipe, [torch.Generator().manual_seed(job.seed)])
    prompt = job.prompt
    return Record(
        prompt_id=prompt.id,
        prompt=prompt.text,
        category=prompt.category,
        challenge=prompt.challenge,
        seed=job.seed,
        noise_hash=noise_hash(noise),
        arm=arm.name,
        guides=list(arm.descriptions),
        **common,
        image=f"images/{arm.name}/{prompt.id}_seed{job.seed}.png",
        sha256="",
        bytes=0,
        seconds=0.0,
        batch_size=0,
        score=None,
        nan_skipped=0,
        truncated=_is_truncated(pipe, prompt.text),
        head=arm.head,
        conditioning=arm.conditioning,
        steering=None if arm.steering is None else arm.steering.describe(),
    )


def _is_truncated(pipe: Any, text: str) -> bool:
    tokenizer = pipe.tokenizer
    return len(tokenizer(text, verbose=False).input_ids) > tokenizer.model_max_length


def _is_done(store: RecordStore, planned: Record) -> bool:
    """Tell whether an image is in the store, and refuse one that was made in another way."""
    found = store.get(*planned.key)
    if found is None or not store.has(*planned.key):
        return False
    made_by = (
        "prompt",
        "noise_hash",
        "guides",
        "conditioning",
        "steering",
        "cfg_scale",
        "cfg",
        "scheduler",
        "num_steps",
        "model_fingerprint",
        "dtype",
    )
    for field in made_by:
        was, now = getattr(found, field), getattr(planned, field)
        if was != now:
            raise UserError(
                f"Expected '{store.folder / found.image}' to be made with {field}={now!r}, but it was with "
                f"{was!r}; choose another output folder, or set fresh=true to move this one aside."
            )
    return True


def _sample_batch(
    pipe: Any, batch: Sequence[Job], arm: Arm, planned: dict[tuple[str, Job], Record], options: dict[str, Any]
) -> Iterator[tuple[Job, Record, Any]]:
    begun = time.perf_counter()
    texts, seeds = [job.prompt.text for job in batch], [job.seed for job in batch]
    if arm.conditioning is not None:
        options = options | {"guide_prompts": texts}
        texts = [arm.conditioning] * len(texts)
    latents, scores, skipped = _sample_arm(pipe, texts, seeds, arm, options)
    images = decode_latents(pipe, latents)  # ends on the CPU: the clock sees all of the device's work
    seconds = (time.perf_counter() - begun) / len(batch)
    for i, job in enumerate(batch):
        measured: dict[str, Any] = {"seconds": round(seconds, 5), "batch_size": len(batch)}
        measured |= {"score": scores[i], "nan_skipped": skipped[i]}
        yield job, dataclasses.replace(planned[arm.name, job], **measured), images[i]


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
