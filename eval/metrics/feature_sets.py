"""Validation and ordering of sets of features, shared by the metrics.

Every metric takes tensors or arrays, and refuses (`UserError`) features that are not finite, of different widths or the
same for all images, and embeddings that are zero.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from guidance.utils.errors import UserError

Features = Float[np.ndarray, "n d"] | Float[Tensor, "n d"]


class MeanSd(NamedTuple):
    """Mean and standard deviation (ddof 0, as published) of a value over parts of a set."""

    mean: float
    sd: float


def feature_rows(features: Features, *, width: int | None = None, kind: str = "features") -> Float[Tensor, "n d"]:
    """Return features, one row an image, as a tensor in their own precision; integers become float64.

    Raises:
        UserError: If they are no table of `width` columns (any number if None), or a value is not finite.
    """
    x = torch.as_tensor(features)
    if x.ndim != 2 or x.shape[1] != (width or max(x.shape[1], 1)):
        raise UserError(f"Expected {kind} of shape (n, {width or 'd'}), got {tuple(x.shape)}.")
    if not torch.isfinite(x).all():
        raise UserError(f"Expected finite {kind}, got NaN or infinity; check the images and their encoder.")
    return x if x.is_floating_point() else x.double()


def unit_rows(embeddings: Features) -> Float[Tensor, "n d"]:
    """Return embeddings divided by their lengths, float64; there must be one or more."""
    x = feature_rows(embeddings, kind="embeddings").double()
    norm = x.norm(dim=1, keepdim=True)
    if not len(x) or not (norm > 0).all():
        raise UserError(f"Expected one or more embeddings other than zero, got {len(x)}; check their source.")
    return x / norm


def unit_pairs(*embeddings: Features) -> list[Float[Tensor, "n d"]]:
    """Return `unit_rows` of embeddings that belong together row by row; refuse those of different shapes."""
    units = [unit_rows(x) for x in embeddings]
    if len({u.shape for u in units}) > 1:
        shapes = ", ".join(str(tuple(u.shape)) for u in units)
        raise UserError(f"Expected embeddings of one shape, all from the same CLIP, got {shapes}.")
    return units


def two_sets(real: Features, generated: Features) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Return two comparable sets of features, float64, each of two or more rows."""
    a, b = (feature_rows(x).double() for x in (real, generated))
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"Expected features (n, d) and (m, d) of one width, got {tuple(a.shape)} and {tuple(b.shape)}; "
            "take both from the same encoder."
        )
    for x in (a, b):
        if len(x) < 2 or (x == x[0]).all():
            raise UserError(
                f"Expected two or more rows of features that differ between images, got {len(x)} rows, all equal; "
                "check the images and their encoder."
            )
    return a, b


def sorted_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the rows in lexicographic order, so that seeded draws depend on the set alone, not on its order."""
    order: Int[np.ndarray, " n"] = np.lexsort(x.cpu().numpy().T[::-1])
    return x[torch.as_tensor(order, device=x.device)]
