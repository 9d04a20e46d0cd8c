"""Before a head is trained: targets, the network, its first weights and the statistics it standardises by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guidance.errors import UserError
from guidance.feature_cache import FeatureSource
from guidance.head_embeddings import clip_name
from guidance.head_losses import class_labels, encode_targets
from guidance.heads import Head, HeadConfig, build_head
from guidance.recipes import HeadRecipe

_STATISTICS_ROWS = 4096  # enough for a mean and a deviation per channel


def prepare_head(
    sources: Mapping[str, FeatureSource], recipe: HeadRecipe, settings: Mapping[str, Any]
) -> tuple[Head, dict[str, Tensor]]:
    """Build and initialise the head of a recipe, and encode the targets of every split.

    Args:
        sources: "train" and other splits.
        recipe: What the head predicts, and its network.
        settings: How the features were computed, see :func:`guidance.features.describe_features`.

    Returns:
        The untrained head and its targets by split.
    """
    columns = {split: source.column(recipe.target) for split, source in sources.items()}
    ratings = [str(k) for k in range(1, 11)] if recipe.task == "rating" else []
    labels = class_labels(columns["train"], recipe.target) if recipe.task == "class" else ratings
    targets = {s: encode_targets(values, recipe.task, labels, recipe.target) for s, values in columns.items()}
    described = (
        "tap",
        "base_model",
        "base_fingerprint",
        "prediction_type",
        "num_train_timesteps",
        "timesteps",
    )
    config = HeadConfig(
        kind=recipe.kind,
        in_channels=sources["train"].read([0])[0].shape[1],
        outputs=targets["train"].shape[1] if recipe.task == "embedding" else len(labels) or 1,
        time_conditioned=recipe.time_conditioned,
        hidden=recipe.hidden,
        target=recipe.target,
        task=recipe.task,
        labels=labels,
        noise=settings["noise"],
        caption=settings["caption"],
        tap_channels=settings.get("tap_channels", []),
        **_clip_of(recipe, settings),
        **{name: settings[name] for name in described},
    )
    torch.manual_seed(recipe.seed)
    head = build_head(config)
    if recipe.init == "kaiming":
        kaiming_init(head)
    set_statistics(head, sources["train"], targets["train"], recipe)
    return head, targets


def _clip_of(recipe: HeadRecipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Which CLIP an embedding head is to predict, as the cache recorded it."""
    if recipe.task != "embedding":
        return {}
    name = clip_name(recipe.target)
    if name is None:
        raise UserError(
            f"Expected a target clip:NAME for task=embedding, got target={recipe.target}; for example "
            "target=clip:testbed."
        )
    return {"clip": name, "clip_fingerprint": settings["clip"][name]}


def kaiming_init(head: Head) -> None:
    """Draw all weights but the zero-initialised ones by He et al. 2015; zero biases."""
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not name.startswith("film"):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)


def set_statistics(head: Head, train: FeatureSource, target: Tensor, recipe: HeadRecipe) -> None:
    """Set the feature (and, for regression, output) mean and deviation from evenly spaced training rows."""
    if recipe.standardize:
        rows = np.linspace(0, len(train) - 1, min(len(train), _STATISTICS_ROWS)).astype(np.int64)
        parts = [train.read(rows[i : i + 256])[0].float().cpu() for i in range(0, len(rows), 256)]
        mean = torch.stack([p.mean((0, 2, 3)) * len(p) for p in parts]).sum(0) / len(rows)
        square = torch.stack([(p - mean[:, None, None]).square().mean((0, 2, 3)) * len(p) for p in parts])
        head.feature_mean.copy_(mean)
        head.feature_std.copy_((square.sum(0) / len(rows)).sqrt().clamp(min=1e-4))
    if head.config.task == "regression":
        head.output_mean.copy_(target.mean(0))
        head.output_std.copy_(target.std(0).clamp(min=1e-6))
