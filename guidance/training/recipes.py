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
        check_positive(self, "num_steps", "batch_size", "shard_size", prefix="generated.")
        splits = [name for name in ("train", "validation", "test") if getattr(self, name) is not None]
        check_positive(self, *splits, prefix="generated.")


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
