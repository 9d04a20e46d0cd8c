"""Targets, losses and learning rates of head training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from guidance.heads.networks import Head
from guidance.training.recipes import HeadRecipe
from guidance.utils.errors import UserError


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
    squared error.  Embedding: see :func:`guidance.training.tasks.embedding_loss`.

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


#: Fixed temperature of the contrastive loss: the one CLIP's training starts from.
CONTRASTIVE_TEMPERATURE = 0.07

#: Images a prediction is compared with, its own included.
CANDIDATES = 100

_CHUNK = 1024  # rows compared with all images at once


def embedding_loss(
    outputs: Float[Tensor, "b d"],
    target: Float[Tensor, "b d"],
    contrastive_weight: float = 1.0,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """``1 - cos(e_i, y_i)`` plus InfoNCE, ``-log exp(cos(e_i, y_i) / T) / sum_j exp(cos(e_i, y_j) / T)``.

    Rows of one image (several noise draws) share a target: each of them counts as right.

    Args:
        outputs: Predicted embeddings ``e``, of any length.
        target: Unit-length true embeddings ``y``.
        contrastive_weight: Weight of the second term; 0 leaves it out.
        chunk: Rows that are contrasted with each other; None for all.  Only for rows of one chunk size are
            losses comparable: among more rows the right one is harder to find.

    Reference:
        van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018; the fixed
        temperature T is the initial one of Radford et al. 2021 (CLIP).
    """
    unit = F.normalize(outputs, dim=1)
    loss = 1 - (unit * target).sum(1).mean()
    if not contrastive_weight:
        return loss
    parts = zip(unit.split(chunk or len(unit)), target.split(chunk or len(unit)), strict=True)
    contrastive = torch.stack([_info_nce(e, y) * len(e) for e, y in parts]).sum() / len(unit)
    return loss + contrastive_weight * contrastive


def _info_nce(unit: Tensor, target: Tensor) -> Tensor:
    _, image = target.unique(dim=0, return_inverse=True)
    same = (image[:, None] == image).to(unit.dtype)
    return F.cross_entropy(unit @ target.T / CONTRASTIVE_TEMPERATURE, same / same.sum(1, keepdim=True))


@torch.no_grad()
def compare_embeddings(
    outputs: Float[Tensor, "n d"], target: Float[Tensor, "n d"]
) -> tuple[dict[str, Float[Tensor, " n"]], int]:
    """Compare predicted embeddings with those of all images.

    Args:
        outputs: Predicted embeddings, of any length.
        target: Unit-length true embeddings; equal ones are one image.

    Returns:
        Per row ``cosine`` with its own image, ``cosine_other``, the mean cosine with all other images (what a
        head that ignores its input reaches), and ``retrieval``, the probability that its own image has the
        highest cosine among :data:`CANDIDATES` images, the others drawn at random from the rest; and the
        number of candidates, fewer where there are fewer images.
    """
    images, own = target.unique(dim=0, return_inverse=True)
    candidates = min(CANDIDATES, len(images))
    parts = []
    for rows in torch.arange(len(outputs)).split(_CHUNK):
        cosines = F.normalize(outputs[rows], dim=1) @ images.T
        cosine = cosines.gather(1, own[rows, None])
        # ties count as lost, or a constant head would find every image
        better = (cosines >= cosine).sum(1) - 1
        other = (cosines.sum(1) - cosine[:, 0]) / max(len(images) - 1, 1)
        first = _first_among(better, len(images) - 1, candidates - 1)
        parts.append(torch.stack([cosine[:, 0], other, first.to(cosine.dtype)]))
    names = ("cosine", "cosine_other", "retrieval")
    return dict(zip(names, torch.cat(parts, dim=1), strict=True)), candidates


def _first_among(better: Tensor, others: int, drawn: int) -> Float[Tensor, " b"]:
    """The probability that none of ``better`` of the ``others`` is among the ``drawn``: hypergeometric.

    >>> _first_among(torch.tensor([0, 1, 6]), others=9, drawn=4)
    tensor([1.0000, 0.5556, 0.0000], dtype=torch.float64)
    """
    left = others - better.double()
    known = torch.tensor([others + 1.0, others - drawn + 1.0], dtype=torch.float64).lgamma()
    kept = (left - drawn + 1).clamp(min=1).lgamma()
    return torch.where(left < drawn, 0.0, ((left + 1).lgamma() - kept - known[0] + known[1]).exp())
