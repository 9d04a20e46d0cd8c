"""Heads that predict CLIP image embeddings: their targets, their loss, and how well they tell images apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

#: A target column ``clip:NAME`` is the unit-length embedding of the clean image by the CLIP of that name.
CLIP_PREFIX = "clip:"
#: Fixed temperature of the contrastive loss: the one CLIP's training starts from.
CONTRASTIVE_TEMPERATURE = 0.07
#: Images a prediction is compared with, its own included.
CANDIDATES = 100
_CHUNK = 1024  # rows compared with all images at once


def clip_name(column: str) -> str | None:
    """Return NAME of a target column ``clip:NAME``; None for any other column.

    >>> clip_name("clip:testbed"), clip_name("rating")
    ('testbed', None)
    """
    return column.removeprefix(CLIP_PREFIX) if column.startswith(CLIP_PREFIX) else None


def load_embedders(columns: Iterable[str], device: Any = None) -> dict[str, Any]:
    """Load the CLIP of each column ``clip:NAME``, see :func:`guidance.clip.load_clip`: column -> CLIP."""
    wanted = [(column, name) for column in columns if (name := clip_name(column)) is not None]
    if not wanted:
        return {}
    from guidance.clip import load_clip

    return {column: load_clip(name, device=device) for column, name in wanted}


def describe_embedders(embedders: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"clip": {NAME: fingerprint}}`` for a manifest; nothing where there is no CLIP."""
    known = {str(clip_name(column)): clip.fingerprint for column, clip in embedders.items()}
    return {"clip": known} if known else {}


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
