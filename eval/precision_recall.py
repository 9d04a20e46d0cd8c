"""Improved precision and recall: how many generated images look real, and how much of the real is generated."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guidance.errors import UserError

_BLOCK = 1024  # rows of a distance matrix held at once


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """Shares in 0..1; equal sets have both at 1.

    Attributes:
        precision: Generated images within the manifold of real ones.
        recall: Real images within the manifold of generated ones.
    """

    precision: float
    recall: float


def precision_recall(
    real: Float[np.ndarray, "n d"], generated: Float[np.ndarray, "m d"], k: int = 3
) -> PrecisionRecall:
    """Estimate both manifolds as unions of balls that reach each point's k-th nearest neighbour of its own set.

    Args:
        real, generated: Features; sets of equal size make values of different runs comparable.
        k: Neighbour that sets the radius.

    Raises:
        UserError: If widths differ, a value is not finite, or a set has no more than k rows.

    Reference:
        Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019.

    >>> x = np.arange(8.0)[:, None]
    >>> precision_recall(x, x[:4] + 0.1, k=1)
    PrecisionRecall(precision=1.0, recall=0.625)
    """
    a, b = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (real, generated))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"Expected features (n, d) and (m, d), got {tuple(a.shape)} and {tuple(b.shape)}.")
    if min(len(a), len(b)) <= k or k < 1:
        raise UserError(f"Expected more rows than k={k} (at least 1) in each set, got {len(a)} and {len(b)}.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError("Expected finite features, got NaN or infinity; check the images.")
    return PrecisionRecall(float(_covered(b, a, k).double().mean()), float(_covered(a, b, k).double().mean()))


def _covered(points: Float[Tensor, "n d"], centres: Float[Tensor, "m d"], k: int) -> Bool[Tensor, " n"]:
    """Which points lie within the ball of some centre."""
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    own = [torch.cdist(part, centres, **exact) for part in centres.split(_BLOCK)]
    radius = torch.cat([d.kthvalue(k + 1, dim=1).values for d in own])  # the nearest is the point itself
    return torch.cat([(torch.cdist(p, centres, **exact) <= radius).any(1) for p in points.split(_BLOCK)])
