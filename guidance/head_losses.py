"""Targets, losses and learning rates of head training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from guidance.errors import UserError
from guidance.heads import Head
from guidance.recipes import HeadRecipe


def encode_targets(values: NDArray[Any], task: str, labels: list[str], column: str = "target") -> Tensor:
    """Turn a target column into what the loss takes.

    Args:
        values: Column of n values.
        task: "rating": class probabilities (n, 10), a fraction shared between its two neighbours; "class":
            indices (n,) int64; "regression": numbers (n, 1).
        labels: Names of the classes.
        column: Name for messages.

    Raises:
        UserError: If a value is missing, out of range, or of an unknown class.
    """
    if task == "class":
        index = {label: i for i, label in enumerate(labels)}
        names = [str(value) for value in values]
        unknown = sorted({name for name in names if name not in index})
        if unknown:
            raise UserError(
                f"Expected classes of '{column}' that occur in the training split, got '{unknown[0]}' too; "
                "add training examples of it or leave it out."
            )
        return torch.tensor([index[name] for name in names])
    if values.dtype.kind not in "fiu":
        raise UserError(f"Expected numbers in '{column}' for task={task}, got text; use task=class.")
    y = torch.from_numpy(values.astype(np.float64))
    bad = ~y.isfinite() if task == "regression" else ~((y >= 1) & (y <= len(labels)))
    if bad.any():
        row = int(bad.nonzero()[0])
        wanted = "finite numbers" if task == "regression" else f"ratings from 1 to {len(labels)}"
        raise UserError(
            f"Expected {wanted} in '{column}', got {values[row]} in row {row} and {int(bad.sum())} bad "
            "rows in all; correct or remove them."
        )
    if task == "regression":
        return y.float()[:, None]
    low = y.floor().clamp(max=len(labels) - 1)
    share = (y - low)[:, None]
    lower, upper = (F.one_hot((low + i).long() - 1, len(labels)) for i in (0, 1))
    return ((1 - share) * lower + share * upper).float()


def class_labels(values: NDArray[Any], column: str = "target") -> list[str]:
    """Return the sorted classes of a column, numbers by value."""
    labels = [str(value) for value in np.unique(values)]
    if len(labels) < 2:
        raise UserError(f"Expected at least two classes in '{column}', got {labels}; choose another target.")
    return labels


def head_loss(
    outputs: Float[Tensor, "b outputs"], target: Tensor, head: Head, recipe: HeadRecipe, scale: float = 1.0
) -> Float[Tensor, ""]:
    """Cross entropy, with ``expected_weight ((E[rating] - rating) / scale)^2`` for ratings; or squared error.

    Args:
        outputs: Outputs of the head.
        target: See :func:`encode_targets`.
        head: For its task.
        recipe: For its weights.
        scale: Standard deviation of the training targets.
    """
    if head.config.task == "regression":
        return F.mse_loss(outputs / scale, target / scale)
    loss = F.cross_entropy(outputs, target, label_smoothing=recipe.label_smoothing)
    if head.config.task == "rating" and recipe.expected_weight:
        ratings = torch.arange(1, outputs.shape[1] + 1, device=outputs.device, dtype=outputs.dtype)
        error = (outputs.softmax(1) - target) @ ratings
        loss = loss + recipe.expected_weight * (error / scale).square().mean()
    return loss


def learning_rate(schedule: str, step: int, total: int, peak: float) -> tuple[float, float]:
    """Return (learning rate, momentum beta1) of a step.

    "one-cycle" (Smith and Topin 2018) equals torch's ``OneCycleLR``: up from peak / 25 over 30% of the steps,
    down to peak / 250,000, along cosines, with momentum 0.95 -> 0.85 -> 0.95.  "cosine" falls to 0.
    """
    if schedule == "constant":
        return peak, 0.9
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * step / total)), 0.9
    turn = max(0.3 * total - 1, 1e-9)
    if step <= turn:
        share, rates, momenta = step / turn, (peak / 25, peak), (0.95, 0.85)
    else:
        share = (step - turn) / max(total - 1 - turn, 1e-9)
        rates, momenta = (peak, peak / 25e4), (0.85, 0.95)
    return _cosine(*rates, share), _cosine(*momenta, share)


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) / 2 * (math.cos(math.pi * share) + 1)
