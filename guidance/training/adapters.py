"""Train an adapter: record teacher pairs into shards, fit, measure on held-out prompts.

A pair is what the adapter will see in a denoiser call, ``(x_t, eps, x0, t)``, and the direction in which
:func:`guidance.apply_guidance` pushes there for the teacher.  Pairs lie in the shards of a
:class:`~guidance.data.cache.FeatureCache`, ``h = [x_t, eps, x0, direction]``; a shard is one recorded run and a
function of (seed, split, index) alone, so a killed recording goes on with the shards that are missing, and
several processes record the bytes that one does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from guidance.apply.apply import apply_guidance
from guidance.apply.guided import unit_rms
from guidance.apply.values import Observation
from guidance.data.cache import (
    FORMAT_VERSION,
    MANIFEST,
    FeatureCache,
    FeatureSource,
    first_difference,
    has_shard,
    shard_name,
)
from guidance.guides.base import Guide
from guidance.guides.midblock import MidBlockGuide
from guidance.heads.adapter import Adapter, direction_loss
from guidance.heads.networks import load_head
from guidance.heads.objectives import Target
from guidance.models.types import Pipeline
from guidance.sampling.loop import sample_latents, using_scheduler
from guidance.schedule import NUM_BINS, timestep_bins
from guidance.training.loop import FitResult, Stage, batch_indices, fit, world
from guidance.utils.errors import UserError, nearest
from guidance.utils.io import atomic_dir, read_json, write_json

if TYPE_CHECKING:
    from accelerate import PartialState


SPLITS = ("train", "test")

_STATISTICS_ROWS = 2048


@runtime_checkable
class PairSource(Protocol):
    """A source of teacher pairs: sampling runs, or noised images."""

    def settings(self) -> dict[str, Any]:
        """Return everything that decides which pairs these are."""

    def record(
        self, pipe: Pipeline, teacher: Sequence[Guide], split: str, n: int, calls: int, rng: np.random.Generator
    ) -> PairRecorder:
        """Record ``calls`` denoiser calls of ``n`` samples."""


@dataclasses.dataclass(frozen=True)
class SampledStates:
    """Teacher pairs at states of sampling runs under the teacher, which an adapter visits.

    Attributes:
        prompts: Texts by split; none is in both.
        scales: Multiples of the teacher's shift, drawn per sample; 0 is unguided sampling.
        num_steps: Lowest and highest number of sampling steps, drawn per run.
        cfg_scales: Classifier-free guidance weights, drawn per run.
        scheduler: Key of :data:`guidance.sampling.loop.SCHEDULERS`; None keeps the pipeline's.
    """

    prompts: Mapping[str, Sequence[str]]
    scales: Sequence[float] = (-1.0, 0.0, 0.5, 1.0, 2.0)
    num_steps: tuple[int, int] = (12, 40)
    cfg_scales: Sequence[float] = (4.0,)
    scheduler: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return everything that decides which pairs these are; of the prompts a checksum."""
        texts = {split: zlib.crc32("\n".join(texts).encode()) for split, texts in self.prompts.items()}
        return {"source": "sampling"} | dataclasses.asdict(self) | {"prompts": texts}

    def record(
        self, pipe: Pipeline, teacher: Sequence[Guide], split: str, n: int, calls: int, rng: np.random.Generator
    ) -> PairRecorder:
        """Record ``calls`` random steps of one sampling run, out of those in which the teacher guides."""
        low, high = self.num_steps
        guided = {steps: guided_steps(teacher, steps) for steps in range(low, high + 1)}
        choices = [steps for steps, found in guided.items() if len(found) >= calls]
        if not choices:
            raise UserError(
                f"Expected num_steps with {calls} guided steps or more, got {low} to {high} (the teacher guides in "
                f"at most {max(map(len, guided.values()), default=0)}); raise num_steps or lower calls_per_run."
            )
        steps = int(rng.choice(choices))
        kept = rng.choice(guided[steps], calls, replace=False).tolist()
        recorder, factors = PairRecorder(kept), rng.choice(self.scales, n).tolist()
        texts = [self.prompts[split][i] for i in rng.integers(len(self.prompts[split]), size=n)]
        seeds = rng.integers(2**48, size=n).tolist()
        options: dict[str, Any] = {"num_steps": steps, "cfg_scale": float(rng.choice(self.cfg_scales))}
        options |= {"guides": teacher, "guide_factors": factors, "observe": [recorder]}
        sample_latents(pipe, texts, seeds, scheduler=self.scheduler, **options)
        return recorder


@dataclasses.dataclass(frozen=True)
class NoisedLatents:
    """Teacher pairs at noised latents of a dataset's images, one full forward each: no sampling, for large models.

    Attributes:
        dataset: As :func:`guidance.data.sources.load_examples` takes it.
        examples: Its splits, by "train" and "test".
        image_column, caption_column: Their columns; None for a dataset without captions.
    """

    dataset: str
    examples: Mapping[str, Any]
    image_column: str = "image"
    caption_column: str | None = "caption"

    def settings(self) -> dict[str, Any]:
        """Return everything that decides which pairs these are."""
        sizes = {split: len(rows) for split, rows in self.examples.items()}
        return {"source": "latents", "dataset": self.dataset, "examples": sizes}

    @torch.no_grad()
    def record(
        self, pipe: Pipeline, teacher: Sequence[Guide], split: str, n: int, calls: int, rng: np.random.Generator
    ) -> PairRecorder:
        """Record ``n`` random images, noised to ``calls`` timesteps in which the teacher guides."""
        from guidance.data.encoding import FeatureEncoder
        from guidance.data.sources import decode_image

        encoder, unet = FeatureEncoder(pipe), pipe.unet
        rows = rng.integers(len(self.examples[split]), size=n)
        picked = self.examples[split][rows]
        cells = zip(picked[self.image_column], rows.tolist(), strict=True)
        x0 = encoder.latents([decode_image(cell, row) for cell, row in cells])
        captions = picked[self.caption_column] if self.caption_column else [""] * n
        text = encoder.text([caption or "" for caption in captions])
        total = encoder.schedule.num_train_timesteps
        times = total - 1 - rng.choice(guided_steps(teacher, total), calls, replace=False)
        recorder = PairRecorder()
        generator = torch.Generator().manual_seed(int(rng.integers(2**48)))
        with using_scheduler(pipe, None), apply_guidance(pipe, teacher, parts=1, observe=[recorder]):
            for t in torch.from_numpy(np.sort(times)[::-1].copy()):
                eps = torch.randn(x0.shape, generator=generator).to(x0)
                x_t = encoder.schedule.add_noise(x0, eps, t).to(unet.dtype)
                unet(x_t, t.to(unet.device), **text, return_dict=False)
        return recorder


def cache_pairs(
    pipe: Pipeline,
    teacher: Sequence[Guide],
    source: PairSource,
    folder: str | os.PathLike[str],
    *,
    rows: Mapping[str, int],
    described: Mapping[str, Any],
    batch_size: int = 50,
    calls_per_run: int = 10,
    seed: int = 0,
    progress: bool = True,
    state: PartialState | None = None,
) -> FeatureCache:
    """Record teacher pairs into shards, one run each; complete shards are kept.

    Args:
        pipe: The diffusion model.
        teacher: Guides with ``every=1`` in eps space.
        source: Source of the pairs.
        folder: Folder of the cache.
        rows: Pairs by split ("train", "test"), rounded up to whole runs.
        described: Model and teacher, for the manifest.
        batch_size: Samples per run.
        calls_per_run: Denoiser calls recorded of each run.
        seed: Seed of prompts, noise, scales and steps.
        progress: Show a progress bar on the main process, of its own share.
        state: Processes that share the runs and all call this; None for one process.

    Returns:
        The cache, finished by all processes.

    Raises:
        UserError: If the cache was recorded with other settings, or predictions are not finite.
    """
    folder, per_run = Path(folder), batch_size * calls_per_run
    settings = {"target_columns": [], **described, **source.settings(), "seed": seed}
    settings |= {"batch_size": batch_size, "calls_per_run": calls_per_run}
    splits = {s: {"rows": math.ceil(rows[s] / per_run) * per_run, "rows_per_shard": per_run} for s in SPLITS}
    manifest = {"format_version": FORMAT_VERSION, "settings": settings, "splits": splits}
    _check_plan(folder, manifest)
    index, processes = (state.process_index, state.num_processes) if state else (0, 1)
    if state:
        state.wait_for_everyone()  # all have looked before any writes
    shards = [(split, i) for split in SPLITS for i in range(splits[split]["rows"] // per_run)]
    shards = shards[index::processes]
    todo = [(s, i) for s, i in shards if not has_shard(folder / shard_name(s, i), per_run, [])]
    total = len(todo) * per_run
    silent = not progress or index > 0 or not todo
    with tqdm(total=total, desc="record pairs", unit="pair", disable=silent) as bar:
        for split, i in todo:
            rng = np.random.default_rng([seed, zlib.crc32(split.encode()), i])
            recorder = source.record(pipe, teacher, split, batch_size, calls_per_run, rng)
            write_json(folder / MANIFEST, manifest)  # not before: a refused run leaves nothing
            with atomic_dir(folder / shard_name(split, i)) as temporary:
                np.save(temporary / "h.npy", torch.cat(recorder.pairs).numpy())
                np.save(temporary / "t.npy", torch.cat(recorder.times).numpy())
            bar.update(per_run)
    if state:
        state.wait_for_everyone()
    return FeatureCache(folder)


def _check_plan(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a cache of other settings."""
    if not (folder / MANIFEST).exists():
        return
    both = read_json(folder / MANIFEST), json.loads(json.dumps(manifest))
    old, new = ({**m["settings"], **m["splits"]} for m in both)
    key = first_difference(old, new)
    if key is not None:
        raise UserError(
            f"Expected teacher pairs of these settings in '{folder}', found {key}={old.get(key)} "
            f"instead of {new.get(key)}; choose another folder with pairs=FOLDER, or delete this one."
        )


def read_pairs(pairs: FeatureSource, rows: Any, device: Any = "cpu") -> tuple[tuple[Tensor, ...], Tensor]:
    """Read the inputs ``(x_t, eps, x0, t)`` of an adapter and the teacher's directions, float32."""
    h, t = (value.to(device, torch.float32) for value in pairs.read(rows))
    x_t, eps, x0, direction = h.chunk(4, dim=1)
    return (x_t, eps, x0, t), direction


def fit_adapter(
    adapter: Adapter, pairs: FeatureSource, stage: Stage, work: Path, *, mse_weight: float = 0.1, **options: Any
) -> FitResult:
    """Train an adapter in place: AdamW, learning rate up and down once; resumes from its checkpoint in ``work``.

    Several processes of ``torch.distributed`` share each batch; the weights are those of one, up to rounding.

    Args:
        adapter: Built; its input statistics are set first.
        pairs: The training split.
        stage: Steps, batch size and learning rate.
        work: Folder of the checkpoint.
        mse_weight: See :func:`direction_loss`.
        **options: ``seed``, ``device``, ``checkpoint_every`` of :func:`guidance.training.loop.fit`.
    """
    rows = np.linspace(0, len(pairs) - 1, min(len(pairs), _STATISTICS_ROWS)).astype(np.int64)
    adapter.standardize(*read_pairs(pairs, rows)[0][:3])
    device, seed = options.get("device", "cpu"), options.get("seed", 0)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rank, size = world()
        rows = batch_indices(len(pairs), stage.batch_size, step, seed)[rank::size]
        inputs, wanted = read_pairs(pairs, rows, device)
        value = direction_loss(adapter(*inputs), wanted, mse_weight)
        if step % 20 == 0 and not value.isfinite():
            raise UserError(f"Expected a finite loss, got {value.item()} at step {step}; lower the lr.")
        return value if size == 1 else value * _share(wanted) * size

    result = fit("adapter", adapter.train(), loss, stage, work, **options)
    adapter.eval().requires_grad_(False)
    return result


def _share(wanted: Tensor) -> Tensor:
    """Return this process's share of the batch's samples with a direction: its weight in the mean over all."""
    here = wanted.flatten(1).any(1).sum().float()
    everywhere = here.clone()
    dist.all_reduce(everywhere)
    return here / everywhere.clamp(min=1)


@torch.no_grad()
def measure_adapter(adapter: Adapter, pairs: FeatureSource, batch_size: int = 256) -> dict[str, Any]:
    """Mean cosine between predicted and true directions, over all pairs and by timestep bin."""
    cosines = torch.zeros(len(pairs))
    known = torch.zeros(len(pairs), dtype=torch.bool)
    for rows in np.array_split(np.arange(len(pairs)), math.ceil(len(pairs) / batch_size)):
        inputs, wanted = read_pairs(pairs, rows, adapter.input_mean.device)
        cosines[rows] = F.cosine_similarity(adapter(*inputs).flatten(1), wanted.flatten(1)).cpu()
        known[rows] = wanted.flatten(1).any(1).cpu()
    if not known.any():
        raise UserError("Expected a teacher that pushes somewhere, got none; check its heads and scales.")
    total = adapter.config.num_train_timesteps
    index = timestep_bins(torch.from_numpy(pairs.column("t")), total)
    bins = []
    for k in range(NUM_BINS):
        here = cosines[known & (index == k)]
        row = {"low": k * total // NUM_BINS, "high": (k + 1) * total // NUM_BINS - 1, "rows": len(here)}
        bins.append(row | {"cosine": float(here.mean()) if len(here) else None})
    return {"cosine": float(cosines[known].mean()), "rows": int(known.sum()), "bins": bins}


_FLOAT16 = 6e4  # largest value of pairs, which are saved in half precision


class PairRecorder:
    """An observer that records what an adapter would be given, and the direction in which the teacher pushes.

    Args:
        steps: Solver steps whose first denoiser call is recorded; None records every call.
    """

    taps: Sequence[str] = ()

    def __init__(self, steps: Collection[int] | None = None) -> None:
        self.steps = steps
        self.pairs: list[Tensor] = []
        self.times: list[Tensor] = []

    def __call__(self, seen: Observation) -> None:
        """Record a call."""
        if self.steps is not None and not (seen.step.first and seen.step.number in self.steps):
            return
        direction = torch.zeros_like(seen.eps) if seen.shift is None else unit_rms(-seen.shift)
        rows = torch.cat([seen.latents, seen.eps, seen.x0, direction], 1)
        if not rows.isfinite().all():
            raise UserError(
                f"Expected finite predictions, got others at timestep {float(seen.t[0]):g}; run the model in float32, "
                "or check its weights."
            )
        self.pairs.append(rows.clamp(-_FLOAT16, _FLOAT16).to("cpu", torch.float16))
        self.times.append(seen.t.float().cpu())


def guided_steps(teacher: Sequence[Guide], num_steps: int) -> list[int]:
    """Return the indices of the sampling steps in which any of the teacher's guides pushes."""
    return [i for i in range(num_steps) if any(g.active(i / num_steps) for g in teacher)]


@dataclasses.dataclass(frozen=True)
class TeacherHead:
    """One term of the teacher's sum: arguments of :class:`MidBlockGuide`, the head by its folder."""

    head: str
    guidance_scale: float = 1.0
    objective: str | None = None
    target: Target = None

    def guide(self) -> MidBlockGuide:
        """Build the guide of this term."""
        head = load_head(self.head)
        return MidBlockGuide(head, self.guidance_scale, objective=self.objective, target=self.target)


def describe_teacher(teacher: Sequence[TeacherHead], guides: Sequence[MidBlockGuide]) -> list[dict[str, Any]]:
    """Describe the teacher for the config of an adapter."""
    facts = [{"predicts": g.heads[0].config.target, "fingerprint": g.networks()[0]} for g in guides]
    return [dataclasses.asdict(part) | fact for part, fact in zip(teacher, facts, strict=True)]


def read_teacher(terms: Sequence[Mapping[str, Any]]) -> list[TeacherHead]:
    """Read the terms of a teacher from plain dicts.

    Raises:
        UserError: If a term has an unknown key or no head, or none of them pushes.
    """
    known = [field.name for field in dataclasses.fields(TeacherHead)]
    for term in terms:
        unknown = [key for key in term if key not in known]
        if unknown:
            hint = nearest(str(unknown[0]), known)
            raise UserError(f"Expected options of a head in 'teacher', got '{unknown[0]}'.{hint}")
        if "head" not in term:
            raise UserError(f"Expected a head in each term of 'teacher', got {dict(term)}; add head: FOLDER.")
    heads = [TeacherHead(**term) for term in terms]
    if not any(head.guidance_scale for head in heads):
        raise UserError("Expected a teacher with a guidance_scale other than 0, got none; add a head.")
    return heads
