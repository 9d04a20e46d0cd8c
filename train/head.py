"""Train a head on features of a diffusion model.

    accelerate launch train/head.py                       # the testbed's aesthetic head
    accelerate launch train/head.py --config configs/head/midu-report.yaml
    accelerate launch train/head.py --config configs/head/testbed-clip.yaml           # predicts CLIP embeddings
    accelerate launch train/head.py --config configs/head/testbed-discriminator.yaml  # samples the fakes first
    python -m train.head task=class target=colour output=runs/heads/testbed-colour

Features are cached first where the cache is absent. The same command resumes a killed run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guidance.training.recipes import FeatureRecipe, GenerationRecipe, HeadRecipe, decisive_options
from guidance.utils.config import option, parse_config, to_yaml
from guidance.utils.errors import UserError, friendly_errors

if TYPE_CHECKING:
    from guidance.data.cache import FeatureSource
    from guidance.heads import Head


@dataclasses.dataclass
class HeadTrainConfig(HeadRecipe):
    """Options of this script."""

    output: str = option("runs/heads/testbed-aesthetic", "folder of the finished head", identity=False)
    overwrite: bool = option(False, "replace a head of another config in the output folder", identity=False)
    cache: str | None = option(
        "runs/cache/testbed", "folder of cached features; null computes them on the fly", identity=False
    )
    data: FeatureRecipe = option(FeatureRecipe, "where features come from when the cache is absent")
    generated: GenerationRecipe = option(GenerationRecipe, "task=binary: images to tell from the real ones")
    calibrate: bool = option(True, "fit a temperature per timestep bin on validation rows")
    compare: list[str] = option([], "further numeric columns to rank the head's score against")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "precision of the training")
    log_with: Literal["none", "tensorboard", "wandb"] = option(
        "none", "tracker; wandb is offline without account", identity=False
    )
    checkpoint_every: float = option(
        60.0, "seconds between checkpoints; one is also written after each epoch", identity=False
    )


def train_head(config: HeadTrainConfig) -> Head:
    """Train a head, or return the one that this config has already trained, frozen, in eval mode on the CPU.

    Raises:
        UserError: If data, model or output cannot be used.
    """
    from guidance.heads import Head, load_head
    from guidance.training.caching import load_finished
    from guidance.training.heads import HeadTrainer, prepare_head
    from guidance.training.report import measure_head, write_folder
    from guidance.utils.io import check_writable
    from guidance.utils.tracking import start_tracking, stop_tracking

    _check_target(config)
    finished = load_finished(Head, config, _plain, config.data)
    if finished is not None:
        return finished
    check_writable(config.output)
    work = Path(f"{config.output}.training")
    accelerator = _accelerator(config, work)
    sources, settings = _features(config, accelerator)
    head, targets = prepare_head(sources, config, settings)
    identity = json.dumps([_plain(config), settings], sort_keys=True, default=str)
    options = {"identity": identity, "checkpoint_every": config.checkpoint_every}
    trainer = HeadTrainer(head, sources, targets, config, accelerator, work, **options)
    log = start_tracking(accelerator, "midblock-guidance", dataclasses.asdict(config), Path(config.output).name)
    state = trainer.fit(log)
    results = measure_head(head, sources, targets, accelerator, calibrate=config.calibrate, compare=config.compare)
    log({f"test/{name}": value for name, value in head.config.metrics.items()}, state.step)
    stop_tracking(accelerator)
    if accelerator.is_main_process:
        facts = {"rows": len(sources["train"]), "processes": accelerator.num_processes}
        facts |= {"device": accelerator.device.type, "mixed_precision": config.mixed_precision}
        write_folder(head, config.output, results, state, config_yaml=to_yaml(config), trained=facts)
        trainer.path.unlink(missing_ok=True)
        if work.is_dir() and not any(work.iterdir()):  # a tracker's log may stay
            work.rmdir()
    accelerator.wait_for_everyone()
    return load_head(config.output)


def _check_target(config: HeadTrainConfig) -> None:
    """Refuse an unknown task or network, or a target that does not suit the task, before any work."""
    from guidance.data.features import CLIP_PREFIX, clip_name
    from guidance.heads.networks import find_network
    from guidance.heads.tasks import get_task

    task = get_task(config.task)
    find_network(config.kind)
    if (clip_name(config.target) is not None) != task.clip_target:
        raise UserError(
            f"Expected task=embedding with a target such as {CLIP_PREFIX}testbed, and no other task with one, got "
            f"task={config.task} and target={config.target}; change one of them."
        )
    if not task.generated:
        return
    if config.generated.folder is None:
        raise UserError(
            f"Expected settings of generated images for task={config.task}, got generated.folder=null; start from "
            "--config configs/head/testbed-discriminator.yaml."
        )
    if config.target != "real" or config.cache is None or config.compare:
        raise UserError(
            f"Expected target=real, a cache and no columns to compare for task={config.task}, got "
            f"target={config.target}, cache={config.cache} and compare={config.compare}; change them."
        )


def _plain(config: HeadTrainConfig) -> dict[str, Any]:
    """Return the options that decide what is trained, as flat plain values."""
    from guidance.heads.tasks import get_task

    unused = () if get_task(config.task).generated else ("generated",)
    return decisive_options(config, leave_out=unused)


def _accelerator(config: HeadTrainConfig, work: Path) -> Any:
    """Build the accelerator; refuse a precision or tracker that it does not support here."""
    from accelerate import Accelerator

    from guidance.utils.processes import join_processes

    tracker = None if config.log_with == "none" else config.log_with
    join_processes()
    try:
        return Accelerator(mixed_precision=config.mixed_precision, log_with=tracker, project_dir=str(work))
    except (ValueError, ImportError) as error:
        raise UserError(
            f"Expected accelerate to start with mixed_precision={config.mixed_precision} and "
            f"log_with={config.log_with}, got: {error}; choose others."
        ) from error


def _features(config: HeadTrainConfig, accelerator: Any) -> tuple[Mapping[str, FeatureSource], dict[str, Any]]:
    """Open the cache, fill it first where it is absent or unfinished, or compute features on the fly."""
    from guidance.heads.tasks import get_task
    from guidance.training.caching import build_cache, live_splits, open_cache, with_targets

    task = get_task(config.task)
    targets = [*([] if task.generated else [config.target]), *config.compare]
    recipe = with_targets(config.data, targets, config.target if task.rated else None)
    if config.cache is None:
        return live_splits(recipe)
    cache = open_cache(recipe, config.cache)
    accelerator.wait_for_everyone()  # all have looked before any writes
    if cache is None:
        cache = build_cache(recipe, config.cache, state=accelerator)
    splits = {split: cache.select(split) for split in cache.splits}
    if task.generated:
        from guidance.training.discriminator import pair_with_generated

        folder = str(config.generated.folder)
        paired = pair_with_generated(splits, recipe, config.generated, folder, accelerator=accelerator)
        return paired, cache.manifest["settings"]
    return splits, cache.manifest["settings"]


@friendly_errors("train/head.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    config = parse_config(
        HeadTrainConfig,
        argv,
        prog="accelerate launch train/head.py",
        description="Train a head on features of a diffusion model.",
        default_config="configs/head/testbed-aesthetic.yaml",
    )
    head = train_head(config)
    from guidance.utils.processes import join_processes, leave_processes

    state = join_processes()
    if state.is_main_process:
        headline = ", ".join(f"{name} {value:.3f}" for name, value in head.config.metrics.items())
        print(f"{config.output}: {headline} on test rows; guides from {head.config.start} to {head.config.stop}")
    leave_processes(state)


if __name__ == "__main__":
    main()
