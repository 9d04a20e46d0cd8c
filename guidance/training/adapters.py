"""Train an adapter: record teacher pairs into shards, fit, measure on held-out prompts.

A pair is what the adapter will see in a denoiser call, ``(x_t, eps, x0, t)``, and the direction in which
:func:`guidance.apply_guidance` pushes there for the teacher.  Pairs lie in the shards of a
:class:`~guidance.data.cache.FeatureCache`, ``h = [x_t, eps, x0, direction]``; a shard is one recorded run and a
function of (seed, split, index) alone, so a killed recording goes on with the shards that are missing, and
several processes record the bytes that one does.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from guidance.apply.apply import apply_guidance
from guidance.apply.guided import unit_rms
from guidance.apply.values import Observation
from guidance.data.cache import FeatureCache, FeatureSource, write_shards
from guidance.data.encoding import FeatureEncoder
from guidance.data.sources import decode_image
from guidance.guides.base import OFF, Guide
from guidance.guides.midblock import MidBlockGuide
from guidance.heads.adapter import Adapter, direction_loss
from guidance.models.types import Pipeline
from guidance.sampling.loop import sample_latents, using_scheduler
from guidance.schedule import NUM_BINS, timestep_bins
from guidance.training.loop import batch_indices, fit, world
from guidance.training.recipes import PairOptions, Stage
from guidance.utils.errors import UserError, nearest

_STATISTICS_ROWS = 2048

_TERM = ("head", "guidance_scale", "objective", "target")  # of a teacher's head, arguments of MidBlockGuide


class SampledStates:
    """Teacher pairs at states of sampling runs under the teacher, which an adapter visits.

    Args:
        prompts: Texts by split; none is in both.
        data: Scales (multiples of the teacher's shift, drawn per sample), steps, guidance weights and scheduler.
    """

    def __init__(self, prompts: Mapping[str, Sequence[str]], data: PairOptions) -> None:
        self.prompts, self.data = prompts, data

    def settings(self) -> dict[str, Any]:
        """Return everything that decides which pairs these are; of the prompts a checksum."""
        texts = {split: zlib.crc32("\n".join(texts).encode()) for split, texts in self.prompts.items()}
        decisive = {name: getattr(self.data, name) for name in ("scales", "num_steps", "cfg_scales", "scheduler")}
        return {"source": "sampling", "prompts": texts} | decisive

    def record(
        self, pipe: Pipeline, teacher: Sequence[Guide], split: str, n: int, calls: int, rng: np.random.Generator
    ) -> PairRecorder:
        """Record ``calls`` random steps of a sampling run of ``n`` samples, of those in which the teacher guides."""
        low, high = self.data.num_steps
        guided = {steps: guided_steps(teacher, steps) for steps in range(low, high + 1)}
        choices = [steps for steps, found in guided.items() if len(found) >= calls]
        if not choices:
            raise UserError(
                f"Expected num_steps with {calls} guided steps or more, got {low} to {high} (the teacher guides in "
                f"at most {max(map(len, guided.values()), default=0)}); raise num_steps or lower calls_per_run."
            )
        steps = int(rng.choice(choices))
        kept = rng.choice(guided[steps], calls, replace=False).tolist()
        recorder, factors = PairRecorder(kept), rng.choice(self.data.scales, n).tolist()
        texts = [self.prompts[split][i] for i in rng.integers(len(self.prompts[split]), size=n)]
        seeds = rng.integers(2**48, size=n).tolist()
        options: dict[str, Any] = {"num_steps": steps, "cfg_scale": float(rng.choice(self.data.cfg_scales))}
        options |= {"guides": teacher, "guide_factors": factors, "observe": [recorder]}
        sample_latents(pipe, texts, seeds, scheduler=self.data.scheduler, **options)
        return recorder


class NoisedLatents:
    """Teacher pairs at noised latents of a dataset's images, one full forward each: no sampling, for large models.

    Args:
        examples: Splits of the dataset, by "train" and "test".
        data: Its name and columns.
    """

    def __init__(self, examples: Mapping[str, Any], data: PairOptions) -> None:
        self.examples, self.data = examples, data

    def settings(self) -> dict[str, Any]:
        """Return everything that decides which pairs these are."""
        sizes = {split: len(rows) for split, rows in self.examples.items()}
        return {"source": "latents", "dataset": self.data.dataset, "examples": sizes}

    @torch.no_grad()
    def record(
        self, pipe: Pipeline, teacher: Sequence[Guide], split: str, n: int, calls: int, rng: np.random.Generator
    ) -> PairRecorder:
        """Record ``n`` random images, noised to ``calls`` timesteps in which the teacher guides."""
        encoder, unet = FeatureEncoder(pipe), pipe.unet
        rows = rng.integers(len(self.examples[split]), size=n)
        picked = self.examples[split][rows]
        cells = zip(picked[self.data.image_column], rows.tolist(), strict=True)
        x0 = encoder.latents([decode_image(cell, row) for cell, row in cells])
        captions = picked[self.data.caption_column] if self.data.caption_column else [""] * n
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
    source: Any,
    folder: str | os.PathLike[str],
    data: PairOptions,
    *,
    described: Mapping[str, Any],
    seed: int = 0,
    progress: bool = True,
    state: Any = None,
) -> FeatureCache:
    """Record teacher pairs into shards, one run each; complete shards are kept.

    Args:
        pipe: The diffusion model.
        teacher: Guides with ``every=1`` in eps space.
        source: Source of the pairs, :class:`SampledStates` or :class:`NoisedLatents`.
        folder: Folder of the cache.
        data: Number of the pairs, rounded up to whole runs, and size of a run.
        described: Model and teacher, for the manifest.
        seed: Seed of prompts, noise, scales and steps.
        progress, state: See :func:`guidance.data.cache.write_shards`.

    Raises:
        UserError: If the cache was recorded with other settings, or predictions are not finite.
    """
    n, calls = data.batch_size, data.calls_per_run
    settings = {"target_columns": [], **described, **source.settings(), "seed": seed}
    settings |= {"batch_size": n, "calls_per_run": calls}
    for split, rows in (("train", data.train), ("test", data.test)):

        def record(part: range, update: Callable[[int], Any], split: str = split) -> dict[str, NDArray[Any]]:
            rng = np.random.default_rng([seed, zlib.crc32(split.encode()), part.start // len(part)])
            found = source.record(pipe, teacher, split, n, calls, rng)
            update(len(part))
            return {"h": torch.cat(found.pairs).numpy(), "t": torch.cat(found.times).numpy()}

        words: dict[str, Any] = {"label": f"record {split} pairs", "unit": "pair", "files": ["h", "t"]}
        total = math.ceil(rows / (n * calls)) * n * calls
        write_shards(folder, settings, split, total, n * calls, record, state=state, progress=progress, **words)
    if state:
        state.wait_for_everyone()
    return FeatureCache(folder)


def read_pairs(pairs: FeatureSource, rows: Any, device: Any = "cpu") -> tuple[tuple[Tensor, ...], Tensor]:
    """Read the inputs ``(x_t, eps, x0, t)`` of an adapter and the teacher's directions, float32."""
    h, t = (value.to(device, torch.float32) for value in pairs.read(rows))
    x_t, eps, x0, direction = h.chunk(4, dim=1)
    return (x_t, eps, x0, t), direction


def fit_adapter(
    adapter: Adapter, pairs: FeatureSource, stage: Stage, work: Path, *, mse_weight: float = 0.1, **options: Any
) -> dict[str, Any]:
    """Train an adapter in place: AdamW, learning rate up and down once; resumes from its checkpoint in ``work``.

    Several processes of ``torch.distributed`` share each batch; the weights are those of one, up to rounding.

    Its input statistics are set first.  Further options (seed, device, checkpoint_every) and the result are those of
    :func:`guidance.training.loop.fit`.
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
    phases = zip(*(guide.phases(num_steps) for guide in teacher), strict=True)
    return [i for i, each in enumerate(phases) if set(each) != {OFF}]


def describe_teacher(guides: Sequence[MidBlockGuide]) -> list[dict[str, Any]]:
    """Describe the teacher for the config of an adapter."""
    facts = [{"predicts": g.heads[0].config.target, "fingerprint": g.networks()[0]} for g in guides]
    return [{name: getattr(g, name) for name in _TERM} | fact for g, fact in zip(guides, facts, strict=True)]


def read_teacher(terms: Sequence[Mapping[str, Any]]) -> list[MidBlockGuide]:
    """Read the terms of the teacher's sum from plain dicts; no head is loaded.

    Raises:
        UserError: If a term has an unknown key or no head, or none of them pushes.
    """
    for term in terms:
        unknown = [key for key in term if key not in _TERM]
        if unknown:
            hint = nearest(str(unknown[0]), _TERM)
            raise UserError(f"Expected options of a head in 'teacher', got '{unknown[0]}'.{hint}")
        if "head" not in term:
            raise UserError(f"Expected a head in each term of 'teacher', got {dict(term)}; add head: FOLDER.")
    guides = [MidBlockGuide(**term) for term in terms]
    if not any(guide.guidance_scale for guide in guides):
        raise UserError("Expected a teacher with a guidance_scale other than 0, got none; add a head.")
    return guides
