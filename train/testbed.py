"""Train the testbed pipeline from scratch and export it in diffusers format.

python -m train.testbed                                 # hours on two cores, resumable at any time
python -m train.testbed device=cuda unet.minutes=20 unet.batch_size=512 compile=true
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m train.testbed          # two processes on two cores
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from guidance.utils.config import option, parse_config
from guidance.utils.errors import friendly_errors


@dataclasses.dataclass
class StageConfig:
    """Length and learning rate of one training."""

    steps: int = option(100_000, "optimiser steps")
    batch_size: int = option(64, "samples a step")
    lr: float = option(1e-3, "peak learning rate of AdamW; warm-up, then cosine to 2%")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    warmup: int = option(100, "warm-up steps")
    ema: float = option(0.0, "decay of the averaged weights that are kept; 0 for none")
    minutes: float = option(0.0, "end after so many minutes of training instead (0: no limit)")
    optimizer: Literal["adamw", "muon"] = option("adamw", "AdamW, or Muon for the hidden matrices and AdamW else")


@dataclasses.dataclass
class TestbedConfig:
    """Options of this script."""

    output: str = option("runs/testbed/weights", "folder of the finished pipeline")
    work: str = option("runs/testbed/work", "folder of rendered scenes and checkpoints; resumes from it")
    num_scenes: int = option(40_000, "training scenes, a multiple of 500")
    seed: int = option(0, "seed of the world and of all training")
    device: str = option("cpu", "cpu or cuda")
    compile: bool = option(False, "torch.compile the long trainings (needs a C++ compiler on a CPU)")
    workers: int = option(2, "processes that render scenes")
    threads: int = option(0, "CPU threads of torch; 0 keeps its default")
    steps: list[str] = option(
        ["data", "vae", "clip", "judge_classifier", "judge_clip", "unet", "export"],
        "steps to run, in this order; finished ones are skipped",
    )
    unet_channels: list[int] = option([32, 64, 128], "channels of the UNet's three levels")
    vae: StageConfig = option(StageConfig(batch_size=8, lr=2e-3, warmup=50, ema=0.99, minutes=6.5), "decoder")
    clip: StageConfig = option(StageConfig(minutes=7, steps=1600), "guiding CLIP")
    judge_classifier: StageConfig = option(StageConfig(minutes=17, steps=2500, lr=1.5e-3, ema=0.99), "judge")
    judge_clip: StageConfig = option(StageConfig(minutes=6, steps=1200), "judge CLIP")
    unet: StageConfig = option(StageConfig(lr=1.5e-3, warmup=200, ema=0.999, minutes=48), "denoiser")
    emphasis: float = option(3.0, "added weight of the object's surroundings in the denoising loss; 0 for none")
    start_from: str | None = option(
        None, "an exported pipeline: keep its other networks and go on training its denoiser"
    )
    notes: str = option("", "a paragraph for the model card")


def train_testbed(config: TestbedConfig) -> Path:
    """Run the steps of a config; each resumes, and is skipped once it is finished.

    Returns:
        The folder of the finished pipeline.
    """
    import torch
    from accelerate import PartialState

    from guidance.training.export import adopt, export
    from guidance.training.loop import Stage
    from guidance.training.testbed import Recipe

    if config.threads:
        torch.set_num_threads(config.threads)
    names = ("vae", "clip", "judge_classifier", "judge_clip", "unet")
    recipe = Recipe(
        work=Path(config.work),
        num_scenes=config.num_scenes,
        stages={n: Stage(**dataclasses.asdict(getattr(config, n))) for n in names},
        seed=config.seed,
        device=config.device,
        compile=config.compile,
        workers=config.workers,
        unet_channels=tuple(config.unet_channels),  # type: ignore[arg-type]
        emphasis=config.emphasis,
    )
    state = PartialState(cpu=config.device == "cpu")
    for step in config.steps:
        state.print(f"[{step}]", flush=True)
        if state.is_main_process and step != "data" and config.start_from:
            adopt(recipe, Path(config.start_from))
        state.wait_for_everyone()
        if step in ("data", "export"):
            if state.is_main_process and step == "export":
                print(f"wrote {export(recipe, Path(config.output), config.notes)}")
            elif state.is_main_process:
                recipe.run(step)
        else:
            state.print({k: v for k, v in recipe.run(step).items() if k != "stage"}, flush=True)
        state.wait_for_everyone()
    return Path(config.output)


@friendly_errors("train.testbed")
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this script."""
    config = parse_config(TestbedConfig, argv, prog="train.testbed", description=__doc__ or "")
    train_testbed(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
