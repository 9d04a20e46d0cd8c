"""Options of caching features and of training a head, with their help texts.

Plain data without heavy imports, so that a script's ``--help`` is instant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from guidance.utils.config import flat_options, incidental_options, option
from guidance.utils.errors import UserError


@dataclasses.dataclass
class FeatureRecipe:
    """The model, the examples, and how features of them are computed."""

    model: str = option("testbed", "diffusers pipeline: testbed, a folder or a hub id")
    revision: str | None = option(None, "branch, tag or commit of the model on the hub")
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "precision of the model")
    device: str | None = option(None, "device of the model; null picks CUDA, MPS or CPU", identity=False)
    dataset: str = option("testbed", "testbed, a parquet/CSV/JSON-lines file, an image folder or a hub id")
    train: int | None = option(None, "training examples; null for all (testbed: 4000)")
    validation: int | None = option(None, "validation examples; null for all (testbed: 1000)")
    test: int | None = option(None, "test examples; null for all (testbed: 1000)")
    image_column: str = option("image", "dataset column of the images")
    caption_column: str | None = option("caption", "dataset column of the captions; null for none")
    target_columns: list[str] = option(["rating"], "dataset columns to store beside the features")
    rating_column: str | None = option("rating", "column to check for ratings in 1..10; null for none")
    group_column: str | None = option(None, "rows with the same value stay in one split; null for rows alone")
    tap: str = option("mid_block", "module of the denoiser to read, or several: down_blocks.2+mid_block")
    noise: Literal["random", "none"] = option("random", "random noise levels, or clean latents at t = 0")
    caption: Literal["caption", "empty"] = option("caption", "condition on the caption or on an empty prompt")
    draws: int = option(1, "noise draws per image")
    timesteps: list[int] | None = option(None, "lowest and highest timestep, inclusive; null for all")
    batch_size: int = option(64, "rows per forward of the model", identity=False)
    shard_size: int = option(2048, "rows per shard; a killed run loses at most one", identity=False)
    seed: int = option(0, "seed of the noise and of the choice of examples")

    def __post_init__(self) -> None:
        if self.timesteps is not None and len(self.timesteps) != 2:
            raise UserError(f"Expected timesteps as [low, high], got {self.timesteps}.")


@dataclasses.dataclass
class HeadRecipe:
    """A head's target, its network, and its training."""

    target: str = option("rating", "dataset column to predict")
    task: str = option(
        "rating",
        "rating (ten classes 1..10), class (the classes found in the data), regression (a number), embedding (of "
        "CLIP: target=clip:NAME), or binary (real against generated: target=real)",
    )
    kind: str = option("conv", "network: conv (the report's), linear, attention or multiscale")
    hidden: int = option(256, "width of the network")
    time_conditioned: bool = option(True, "give the head the timestep")
    standardize: bool = option(True, "standardise the features' channels by training statistics")
    init: Literal["default", "kaiming"] = option("default", "torch's initialisation or Kaiming normal")
    epochs: int = option(6, "passes over the training rows")
    batch_size: int = option(128, "rows per step, over all processes")
    optimizer: Literal["adamw", "adam"] = option("adamw", "optimizer")
    lr: float = option(1e-3, "peak learning rate")
    weight_decay: float = option(0.05, "weight decay; of adam: an L2 penalty")
    schedule: Literal["one-cycle", "cosine", "constant"] = option("one-cycle", "learning rate over the steps")
    label_smoothing: float = option(0.0, "probability mass spread over all classes, 0..1")
    expected_weight: float = option(0.0, "rating: weight of the squared error of the expected rating")
    contrastive_weight: float = option(1.0, "embedding: weight of the contrastive loss beside the cosine")
    patience: int | None = option(
        2, "epochs without a better validation loss before stopping at the best; null keeps the last"
    )
    seed: int = option(0, "seed of initial weights and data order")

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "batch_size", "hidden", "lr")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"Expected label_smoothing from 0 to below 1, got {self.label_smoothing}.")
        if not self.contrastive_weight >= 0:
            raise UserError(f"Expected contrastive_weight of at least 0, got {self.contrastive_weight}.")


@dataclasses.dataclass
class Stage:
    """Length, batch size and optimiser of the training of one network."""

    steps: int = option(100_000, "optimiser steps")
    batch_size: int = option(64, "samples a step, over all processes")
    lr: float = option(1e-3, "peak learning rate of AdamW; warm-up, then cosine to 2%")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    warmup: int = option(100, "warm-up steps")
    ema: float = option(0.0, "decay of the averaged weights that are kept, reached gradually; 0 for none")
    minutes: float = option(0.0, "end after so many minutes of training instead, at the lowest lr (0: no limit)")
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "AdamW, or Muon (of the same update size) for the hidden matrices and AdamW else"
    )


@dataclasses.dataclass
class TestbedRecipe:
    """Scenes, networks and trainings of the testbed."""

    work: str = option("runs/testbed/work", "folder of rendered scenes and checkpoints; resumes from it")
    num_scenes: int = option(40_000, "training scenes, a multiple of 500")
    seed: int = option(0, "seed of the world and of all training")
    device: str = option("cpu", "cpu or cuda")
    compile: bool = option(False, "torch.compile the long trainings (needs a C++ compiler on a CPU)")
    workers: int = option(2, "processes that render scenes")
    unet_channels: list[int] = option([32, 64, 128], "channels of the UNet's three levels")
    vae: Stage = option(Stage(batch_size=8, lr=2e-3, warmup=50, ema=0.99, minutes=6.5), "decoder")
    clip: Stage = option(Stage(minutes=7, steps=1600), "guiding CLIP")
    judge_classifier: Stage = option(Stage(minutes=17, steps=2500, lr=1.5e-3, ema=0.99), "judge")
    judge_clip: Stage = option(Stage(minutes=6, steps=1200), "judge CLIP")
    unet: Stage = option(Stage(lr=1.5e-3, warmup=200, ema=0.999, minutes=48), "denoiser")
    emphasis: float = option(3.0, "added weight of the object's surroundings in the denoising loss; 0 for none")


@dataclasses.dataclass
class GenerationRecipe:
    """Number and sampling of the generated images that a discriminator tells from real ones."""

    folder: str | None = option(None, "folder of their latents and features; null for none", identity=False)
    train: int | None = option(None, "images with training captions; null for one per real image")
    validation: int | None = option(None, "images with validation captions; null for one per real image")
    test: int | None = option(None, "images with test captions; null for one per real image")
    cfg_scale: float = option(4.0, "weight of classifier-free guidance; 1 is off")
    num_steps: int = option(25, "sampling steps")
    scheduler: str | None = option(None, "ddim, dpm++, euler or ddpm; null keeps the model's own")
    seed: int = option(0, "seed of the initial noise")
    batch_size: int = option(32, "images sampled at once", identity=False)
    shard_size: int = option(256, "images per file; a killed run loses at most one", identity=False)

    def __post_init__(self) -> None:
        splits = [name for name in ("train", "validation", "test") if getattr(self, name) is not None]
        check_positive(self, "num_steps", "batch_size", "shard_size", *splits, prefix="generated.")


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


def decisive_options(config: Any, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """Return the options with ``identity``, of groups too: those that decide what is trained."""
    omitted = incidental_options(type(config)) | set(leave_out)
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        if dataclasses.is_dataclass(group):
            omitted |= {f"{field.name}.{name}" for name in incidental_options(type(group))}
    return flat_options(config, omitted)


def check_positive(config: Any, *names: str, prefix: str = "") -> None:
    """Refuse a config in which one of these options is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"Expected {prefix}{name} above 0, got {getattr(config, name)}.")
