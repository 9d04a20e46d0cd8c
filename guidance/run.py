"""A sampling run: the same prompts, seeds and noise under several arms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from guidance.arms import Arm
from guidance.cfg import ClassifierFree
from guidance.errors import UserError
from guidance.prompts import Prompt
from guidance.records import RecordStore
from guidance.sampling import using_scheduler
from guidance.steering import check_copies
from guidance.units import Job, Sampling, Task, UnitSampler, list_batches

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
    strength: float = 0.6,
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
