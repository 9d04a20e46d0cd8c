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

from guidance.training.recipes import FeatureRecipe, PairOptions, Stage, check_positive, decisive_options
from guidance.utils.config import option, parse_config, to_yaml
from guidance.utils.errors import UserError, friendly_errors

if TYPE_CHECKING:
    from guidance.heads.adapter import Adapter
    from guidance.training.adapters import NoisedLatents, SampledStates


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
    """Train an adapter, or return the one that this config has already trained, frozen, in eval mode on the CPU.

    All processes of a launch call this, share the work, and return the same adapter.

    Raises:
        UserError: If teacher, model, prompts or output cannot be used.
    """
    from guidance.heads.adapter import Adapter, AdapterConfig, build_adapter, load_adapter, save_adapter
    from guidance.models.denoiser import fingerprint, latent_channels
    from guidance.models.pipelines import load_on
    from guidance.schedule import NoiseSchedule
    from guidance.training.adapters import cache_pairs, describe_teacher, fit_adapter, measure_adapter, read_teacher
    from guidance.training.caching import load_finished
    from guidance.utils.io import check_writable
    from guidance.utils.processes import join_processes

    guides = read_teacher(config.teacher)
    finished = load_finished(Adapter, config, decisive_options, FeatureRecipe(model=config.model))
    if finished is not None:
        return finished
    check_writable(config.output)
    for guide in guides:
        guide.load()
    source = _source(config)
    state = join_processes()
    pipe = load_on(state, config.model, revision=None, device=config.device, dtype=config.dtype)
    schedule, device = NoiseSchedule.from_scheduler(pipe.scheduler), pipe.unet.device
    model: dict[str, Any] = {
        "base_model": config.model,
        "base_fingerprint": fingerprint(pipe.unet),
        "prediction_type": schedule.prediction_type,
        "num_train_timesteps": schedule.num_train_timesteps,
        "teacher": describe_teacher(guides),
    }
    pairs = cache_pairs(pipe, guides, source, config.pairs, config.data, described=model, seed=config.seed, state=state)
    t = pairs.column("t")
    shape = AdapterConfig(latent_channels(pipe.unet), config.width, config.depth, config.patch, **model)
    shape.timesteps = [int(t.min()), int(t.max())]
    shape.start, shape.stop = (f(g.interval[i] for g in guides) for f, i in ((min, 0), (max, 1)))
    adapter = build_adapter(shape, config.seed).to(device)
    stage = Stage(config.steps, config.batch_size, config.lr, weight_decay=config.weight_decay)
    stage.warmup = max(1, round(config.warmup * config.steps))
    identity = json.dumps([decisive_options(config), pairs.manifest], sort_keys=True, default=str)
    work = Path(f"{config.output}.training")
    part = work / hashlib.sha256(identity.encode()).hexdigest()[:12]
    options = {"seed": config.seed, "device": device, "checkpoint_every": config.checkpoint_every}
    result = fit_adapter(adapter, pairs.select("train"), stage, part, mse_weight=config.mse_weight, **options)
    state.wait_for_everyone()  # all have read the checkpoint before it goes
    if state.is_main_process:
        shape.metrics = measure_adapter(adapter, pairs.select("test"))
        facts: dict[str, Any] = {"pairs": len(pairs.select("train")), "steps": result["steps"]}
        facts |= {"processes": state.num_processes, "seconds": round(result["seconds"], 1)}
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
    if data.source == "latents":
        columns: dict[str, Any] = {name: getattr(data, name) for name in ("image_column", "caption_column")}
        train, test = (load_examples(data.dataset, s, target_columns=(), **columns) for s in ("train", "validation"))
        return NoisedLatents({"train": train, "test": test}, data)
    prompts = [prompt.text for prompt in load_prompts(data.prompts, data.num_prompts, config.seed)]
    if len(prompts) < 2:
        raise UserError(f"Expected two prompts or more in '{data.prompts}', got one; one part is held out.")
    cut = min(max(1, round(len(prompts) * (1 - data.held_out))), len(prompts) - 1)
    return SampledStates({"train": prompts[:cut], "test": prompts[cut:]}, data)


def _card(adapter: Adapter, output: str, facts: dict[str, Any]) -> str:
    """Return the model card of a trained adapter as Markdown."""
    from guidance.heads.hub import adapter_card

    metrics, bins = adapter.config.metrics, adapter.config.metrics["bins"]
    cosines = ["-" if b["cosine"] is None else f"{b['cosine']:.3f}" for b in bins]
    rows = zip(bins, cosines, strict=True)
    table = "\n".join(f"| {b['low']} | {b['high']} | {b['rows']} | {cosine} |" for b, cosine in rows)
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
