"""Train an adapter that predicts the directions of mid-u guidance, so that sampling needs no backward pass.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m train.amortise   # two cores
    python -m train.amortise                  # one process; the testbed's aesthetic head is the teacher
    python -m train.amortise 'teacher=[{head: runs/heads/testbed-colour, target: red}]' output=runs/adapters/red

Teacher pairs are recorded first where they are absent. Processes share the recording, whose bytes do not
depend on their number, and every batch of the training. The same command resumes a killed run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guidance.training.recipes import FeatureRecipe, check_positive, decisive_options
from guidance.utils.config import option, parse_config, to_yaml
from guidance.utils.errors import UserError, friendly_errors

if TYPE_CHECKING:
    from guidance.heads.adapter import Adapter
    from guidance.training.adapters import NoisedLatents, SampledStates


@dataclasses.dataclass
class PairOptions:
    """Source and number of the teacher pairs."""

    source: Literal["sampling", "latents"] = option(
        "sampling", "states of sampling runs under the teacher, or noised latents of images"
    )
    prompts: str = option("testbed:train", "sampling: a set of prompts or a file of them")
    num_prompts: int | None = option(600, "sampling: how many; null for all of a file")
    held_out: float = option(0.1, "sampling: share of the prompts kept for the test, above 0 and below 1")
    scales: list[float] = option(
        [-1.0, 0.0, 0.5, 1.0, 2.0], "sampling: multiples of the teacher's shift, drawn per sample"
    )
    num_steps: list[int] = option([12, 40], "sampling: lowest and highest number of steps, drawn per run")
    cfg_scales: list[float] = option([4.0], "sampling: classifier-free guidance weights, drawn per run")
    scheduler: str | None = option(None, "sampling: scheduler; null keeps the model's")
    dataset: str = option("testbed", "latents: testbed, a data file, an image folder or a hub id")
    image_column: str = option("image", "latents: dataset column of the images")
    caption_column: str | None = option("caption", "latents: dataset column of the captions; null for none")
    train: int = option(17_500, "pairs to train on, rounded up to whole runs")
    test: int = option(2_000, "pairs of held-out prompts or images, rounded up to whole runs")
    batch_size: int = option(50, "samples per run")
    calls_per_run: int = option(10, "denoiser calls recorded of each run; a killed recording loses at most one run")

    def __post_init__(self) -> None:
        check_positive(self, "train", "test", "batch_size", "calls_per_run", prefix="data.")
        if not 0 < self.held_out < 1:
            raise UserError(f"Expected data.held_out above 0 and below 1, got {self.held_out}.")
        if not self.scales or not self.cfg_scales:
            raise UserError("Expected at least one of data.scales and of data.cfg_scales, got an empty list.")
        if len(self.num_steps) != 2 or not 1 <= self.num_steps[0] <= self.num_steps[1]:
            raise UserError(f"Expected data.num_steps as [low, high] from 1 on, got {self.num_steps}.")


@dataclasses.dataclass
class AmortiseConfig:
    """Options of this script."""

    output: str = option("runs/adapters/testbed-aesthetic", "folder of the finished adapter", identity=False)
    overwrite: bool = option(False, "replace an adapter of another config in the output folder", identity=False)
    teacher: list[dict[str, Any]] = option(
        [{"head": "runs/heads/testbed-aesthetic"}],
        "heads to sum: a list of {head: FOLDER, guidance_scale: 1.0, objective: null, target: null}",
    )
    pairs: str = option("runs/pairs/testbed-aesthetic", "folder of recorded teacher pairs", identity=False)
    data: PairOptions = option(PairOptions, "where pairs come from when they are absent")
    model: str = option("testbed", "diffusers pipeline: testbed, a folder or a hub id")
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "precision of the model")
    device: str | None = option(None, "device of model and training; null picks CUDA, MPS or CPU", identity=False)
    width: int = option(16, "channels of the adapter's blocks")
    depth: int = option(2, "number of the adapter's blocks")
    patch: int = option(2, "the blocks run on squares of this side in pixels of the latents")
    steps: int = option(1500, "optimiser steps")
    batch_size: int = option(128, "pairs per step")
    lr: float = option(2e-3, "peak learning rate of AdamW: linear warm-up, then cosine to 2%")
    warmup: float = option(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    mse_weight: float = option(0.1, "weight of the squared error beside 1 - cosine")
    seed: int = option(0, "seed of recorded runs, first weights and data order")
    checkpoint_every: float = option(30.0, "seconds between checkpoints of the training", identity=False)

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_size", "lr", "width", "depth", "patch")
        for name in ("warmup", "weight_decay", "mse_weight"):
            if not getattr(self, name) >= 0:
                raise UserError(f"Expected {name} of 0 or more, got {getattr(self, name)}.")


def amortise(config: AmortiseConfig) -> Adapter:
    """Train an adapter, or return the one that this config has already trained.

    All processes of a launch call this, share the work, and return the same adapter.

    Args:
        config: Teacher, pairs, network, training, and where to put the result.

    Returns:
        The adapter, frozen, in eval mode on the CPU; it lies in ``config.output``.

    Raises:
        UserError: If teacher, model, prompts or output cannot be used.
    """
    from guidance.heads.adapter import Adapter, AdapterConfig, build_adapter, load_adapter, save_adapter
    from guidance.models.denoiser import fingerprint, latent_channels
    from guidance.models.pipelines import load_on
    from guidance.schedule import NoiseSchedule
    from guidance.training.adapters import cache_pairs, describe_teacher, fit_adapter, measure_adapter, read_teacher
    from guidance.training.caching import load_finished
    from guidance.training.loop import Stage
    from guidance.utils.io import check_writable
    from guidance.utils.processes import join_processes

    terms = read_teacher(config.teacher)
    finished = load_finished(Adapter, config, decisive_options, FeatureRecipe(model=config.model))
    if finished is not None:
        return finished
    check_writable(config.output)
    guides, source = [term.guide() for term in terms], _source(config)
    state = join_processes()
    pipe = load_on(state, config.model, revision=None, device=config.device, dtype=config.dtype)
    schedule, device = NoiseSchedule.from_scheduler(pipe.scheduler), pipe.unet.device
    model: dict[str, Any] = {
        "base_model": config.model,
        "base_fingerprint": fingerprint(pipe.unet),
        "prediction_type": schedule.prediction_type,
        "num_train_timesteps": schedule.num_train_timesteps,
        "teacher": describe_teacher(terms, guides),
    }
    pairs = cache_pairs(
        pipe,
        guides,
        source,
        config.pairs,
        rows={"train": config.data.train, "test": config.data.test},
        described=model,
        batch_size=config.data.batch_size,
        calls_per_run=config.data.calls_per_run,
        seed=config.seed,
        state=state,
    )
    t = pairs.column("t")
    shape = AdapterConfig(latent_channels(pipe.unet), config.width, config.depth, config.patch, **model)
    shape.timesteps = [int(t.min()), int(t.max())]
    shape.start, shape.stop = (f(g.interval[i] for g in guides) for f, i in ((min, 0), (max, 1)))
    adapter = build_adapter(shape, config.seed).to(device)
    stage = Stage(config.steps, config.batch_size, config.lr, weight_decay=config.weight_decay)
    stage.warmup = max(1, round(config.warmup * config.steps))
    identity = json.dumps([decisive_options(config), pairs.manifest], sort_keys=True, default=str)
    work = Path(f"{config.output}.training")
    result = fit_adapter(
        adapter,
        pairs.select("train"),
        stage,
        work / hashlib.sha256(identity.encode()).hexdigest()[:12],
        mse_weight=config.mse_weight,
        seed=config.seed,
        device=device,
        checkpoint_every=config.checkpoint_every,
    )
    state.wait_for_everyone()  # all have read the checkpoint before it goes
    if state.is_main_process:
        shape.metrics = measure_adapter(adapter, pairs.select("test"))
        facts: dict[str, Any] = {"pairs": len(pairs.select("train")), "steps": result.steps}
        facts |= {"processes": state.num_processes, "seconds": round(result.seconds, 1)}
        save_adapter(adapter, config.output, _card(adapter, config.output, facts), train=to_yaml(config))
        shutil.rmtree(work, ignore_errors=True)
    state.wait_for_everyone()
    return load_adapter(config.output)


def _source(config: AmortiseConfig) -> SampledStates | NoisedLatents:
    """Build the source of the teacher pairs; its test part shares no prompt or image with the training part."""
    from guidance.data.prompts import load_prompts
    from guidance.data.sources import load_examples
    from guidance.training.adapters import NoisedLatents, SampledStates

    data = config.data
    columns: dict[str, Any] = {"image_column": data.image_column, "caption_column": data.caption_column}
    if data.source == "latents":
        splits = {"train": "train", "test": "validation"}
        examples = {s: load_examples(data.dataset, name, target_columns=(), **columns) for s, name in splits.items()}
        return NoisedLatents(data.dataset, examples, **columns)
    prompts = [prompt.text for prompt in load_prompts(data.prompts, data.num_prompts, config.seed)]
    if len(prompts) < 2:
        raise UserError(f"Expected two prompts or more in '{data.prompts}', got one; one part is held out.")
    cut = min(max(1, round(len(prompts) * (1 - data.held_out))), len(prompts) - 1)
    split = {"train": prompts[:cut], "test": prompts[cut:]}
    return SampledStates(split, data.scales, (data.num_steps[0], data.num_steps[1]), data.cfg_scales, data.scheduler)


def _card(adapter: Adapter, output: str, facts: dict[str, Any]) -> str:
    """Return the model card of a trained adapter as Markdown."""
    from guidance.heads.hub import adapter_card

    metrics, bins = adapter.config.metrics, adapter.config.metrics["bins"]
    cells = [(b["low"], b["high"], b["rows"], "-" if b["cosine"] is None else f"{b['cosine']:.3f}") for b in bins]
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)
    trained = f"trained: {', '.join(f'{key} {value}' for key, value in facts.items())}"
    measured = f"""Cosine between predicted and true direction on {metrics["rows"]} held-out pairs: \
{metrics["cosine"]:.3f}. By timestep:

| low | high | pairs | cosine |
| ---: | ---: | ---: | ---: |
{table}"""
    return adapter_card(adapter, output, facts=[trained], measured=measured)


@friendly_errors("train/amortise.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    config = parse_config(
        AmortiseConfig,
        argv,
        prog="python -m train.amortise",
        description="Train an adapter that predicts the directions of mid-u guidance.",
        default_config="configs/amortise/testbed.yaml",
    )
    from guidance.utils.processes import join_processes, leave_processes

    metrics = amortise(config).config.metrics
    state = join_processes()
    if state.is_main_process:
        bins = ", ".join(f"{b['cosine']:.2f}" for b in metrics["bins"] if b["cosine"] is not None)
        print(f"{config.output}: cosine {metrics['cosine']:.3f} on held-out pairs; from t = 0 to the highest: {bins}")
    leave_processes(state)


if __name__ == "__main__":
    main()
