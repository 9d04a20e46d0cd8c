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
from guidance.head_embeddings import embedding_loss
from guidance.heads import Head
from guidance.recipes import HeadRecipe


def encode_targets(values: NDArray[Any], task: str, labels: list[str], column: str = "target") -> Tensor:
    """Turn a target column into what the loss takes.

    Args:
        values: Column of n values.
        task: "rating": class probabilities (n, 10), a fraction shared between its two neighbours; "class":
            indices (n,) int64; "regression": numbers (n, 1); "binary": 0 or 1, (n,) int64; "embedding":
            unit-length vectors (n, d).
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
    if task == "embedding":
        return _unit_vectors(values, column)
    if values.dtype.kind not in "fiu":
        raise UserError(f"Expected numbers in '{column}' for task={task}, got text; use task=class.")
    if task == "binary":
        return _zero_or_one(values, column)
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


def _unit_vectors(values: NDArray[Any], column: str) -> Tensor:
    if values.dtype.kind != "f" or values.ndim != 2:
        raise UserError(
            f"Expected vectors in '{column}' for task=embedding, got {values.dtype} of shape {values.shape}; "
            "use a target such as clip:testbed."
        )
    y = torch.from_numpy(values.astype(np.float32))
    bad = ~(y.isfinite().all(1) & (y.norm(dim=1) > 0))
    if bad.any():
        raise UserError(
            f"Expected finite vectors other than 0 in '{column}', got another in row {int(bad.nonzero()[0])} "
            f"and {int(bad.sum())} bad rows in all; remove these images, or run CLIP in float32."
        )
    return F.normalize(y, dim=1)


def _zero_or_one(values: NDArray[Any], column: str) -> Tensor:
    y = torch.from_numpy(values.astype(np.float64))
    if set(y.unique().tolist()) != {0.0, 1.0}:
        found = ", ".join(f"{value:g}" for value in y.unique().tolist()[:5])
        raise UserError(
            f"Expected both 0 and 1, and nothing else, in '{column}' for task=binary, got {found}."
        )
    return y.long()


def two_class_logits(outputs: Float[Tensor, "b 1"]) -> Float[Tensor, "b 2"]:
    """Write log-odds ``z`` as the logits (0, z) of two classes, for ``softmax((0, z))_1 = sigmoid(z)``.

    So losses, temperatures and calibration of classes serve a binary head too.

    >>> two_class_logits(torch.zeros(1, 1)).softmax(1)
    tensor([[0.5000, 0.5000]])
    """
    return torch.cat([torch.zeros_like(outputs), outputs], dim=1)


def class_labels(values: NDArray[Any], column: str = "target") -> list[str]:
    """Return the sorted classes of a column, numbers by value."""
    labels = [str(value) for value in np.unique(values)]
    if len(labels) < 2:
        raise UserError(f"Expected at least two classes in '{column}', got {labels}; choose another target.")
    return labels


def head_loss(
    outputs: Float[Tensor, "b outputs"], target: Tensor, head: Head, recipe: HeadRecipe, scale: float = 1.0
) -> Float[Tensor, ""]:
    """The loss of the head's task.

    Ratings and classes: cross entropy, for ratings with ``expected_weight ((E[rating] - rating) / scale)^2``.
    Binary: ``-log d`` of real and ``-log(1 - d)`` of generated rows, ``d = sigmoid(output)``.  Regression: the
    squared error.  Embedding: see :func:`guidance.head_embeddings.embedding_loss`.

    Args:
        outputs: Outputs of the head.
        target: See :func:`encode_targets`.
        head: For its task.
        recipe: For its weights.
        scale: Standard deviation of the training targets.
    """
    if head.config.task == "regression":
        return F.mse_loss(outputs / scale, target / scale)
    if head.config.task == "embedding":
        return embedding_loss(outputs, target, recipe.contrastive_weight, chunk=recipe.batch_size)
    if head.config.task == "binary":
        outputs = two_class_logits(outputs)
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
