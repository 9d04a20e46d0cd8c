"""Train the testbed pipeline from scratch and export it in diffusers format.

python -m train.testbed                                 # hours on two cores, resumable at any time
python -m train.testbed device=cuda unet.minutes=20 unet.batch_size=512 compile=true
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m train.testbed          # two processes on two cores
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from guidance.training.recipes import TestbedRecipe
from guidance.utils.config import option, parse_config
from guidance.utils.errors import friendly_errors


@dataclasses.dataclass
class TestbedConfig(TestbedRecipe):
    """Options of this script."""

    output: str = option("runs/testbed/weights", "folder of the finished pipeline")
    threads: int = option(0, "CPU threads of torch; 0 keeps its default")
    steps: list[str] = option(
        ["data", "vae", "clip", "judge_classifier", "judge_clip", "unet", "export"],
        "steps to run, in this order; finished ones are skipped",
    )
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
    from guidance.training.testbed import Recipe

    if config.threads:
        torch.set_num_threads(config.threads)
    recipe = Recipe(config)
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
