"""Improved precision and recall: how many generated images look real, and how much of the real is generated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eval.metrics.feature_sets import Features, two_sets
from guidance.utils.errors import UserError

_BLOCK = 1024  # rows of a distance matrix held at once
_EXACT = {"compute_mode": "donot_use_mm_for_euclid_dist"}  # else equal points are not at distance 0


class PrecisionRecall(NamedTuple):
    """Shares in 0..1; equal sets have both at 1."""

    precision: float  # generated images within the manifold of real ones
    recall: float  # real images within the manifold of generated ones


def precision_recall(real: Features, generated: Features, k: int = 3) -> PrecisionRecall:
    """Estimate both manifolds as unions of balls that reach each point's k-th nearest neighbour in its own set.

    Args:
        real, generated: Features (tensors or arrays); sets of equal size make values of different runs comparable.
        k: Neighbour that sets the radius.

    Reference:
        Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019.

    >>> x = torch.arange(8.0)[:, None]
    >>> precision_recall(x, x[:4] + 0.1, k=1)
    PrecisionRecall(precision=1.0, recall=0.625)
    """
    a, b = two_sets(real, generated)
    if min(len(a), len(b)) <= k or k < 1:
        raise UserError(f"Expected more rows than k={k} (at least 1) in each set, got {len(a)} and {len(b)}.")
    shares = [covered(points, centres, radii(centres, k)).double().mean() for points, centres in ((b, a), (a, b))]
    return PrecisionRecall(*map(float, shares))


def radii(centres: Float[Tensor, "n d"], k: int) -> Float[Tensor, " n"]:
    """Return the distance of each centre to its k-th nearest neighbour among the others."""
    distances = (torch.cdist(part, centres, **_EXACT) for part in centres.split(_BLOCK))
    # the first neighbour is the point itself
    return torch.cat([d.topk(k + 1, dim=1, largest=False).values[:, -1] for d in distances])


def covered(
    points: Float[Tensor, "n d"], centres: Float[Tensor, "m d"], radius: Float[Tensor, " m"]
) -> Bool[Tensor, " n"]:
    """Tell which points lie within some centre's ball."""
    return torch.cat([(torch.cdist(p, centres, **_EXACT) <= radius).any(1) for p in points.split(_BLOCK)])
