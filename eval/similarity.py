"""Similarity of image pairs, as CLIP sees them: how much stayed, and whether the change is the one asked for.

The functions give a value a pair, for `eval.paired`; the metrics stream their mean and keep sums only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from eval.feature_sets import Features, as_tensors, unit_pairs

_NO_DIRECTION = 1e-5  # length of a difference of unit vectors; rounding of a float32 encoder alone gives 1e-6


@dataclasses.dataclass(frozen=True)
class PairMean:
    """A mean over pairs.

    Attributes:
        mean: Over the pairs that have a value; NaN if none has.
        pairs: How many those are.
        excluded: Pairs without a value.
    """

    mean: float
    pairs: float
    excluded: float


def image_similarity(before: Features, after: Features) -> Float[np.ndarray, " n"]:
    """Return ``cos(I1, I2)`` of each pair of image embeddings.

    Args:
        before, after: Embeddings of any length, row by row the pairs (tensors or arrays).

    Returns:
        float64 ``(n,)`` in -1..1.

    Raises:
        UserError: If shapes differ, or an embedding is zero or not finite.

    >>> image_similarity(np.array([[3.0, 4.0]]), np.array([[0.0, 2.0]])).round(6).tolist()
    [0.8]
    """
    a, b = unit_pairs(before, after)
    return (a * b).sum(1).cpu().numpy()


def directional_similarity(
    before: Features, after: Features, text_before: Features, text_after: Features
) -> Float[np.ndarray, " n"]:
    """Return ``cos(I2 - I1, T2 - T1)`` of each pair, differences of normalised CLIP embeddings.

    Args:
        before, after: Image embeddings ``I1``, ``I2`` (tensors or arrays).
        text_before, text_after: Embeddings ``T1``, ``T2`` of the captions, row by row, of the same CLIP.

    Returns:
        float64 ``(n,)`` in -1..1; NaN where the images or the captions do not differ (a difference shorter than
        1e-5), which has no direction.  Count those and drop them on both sides of a comparison.

    Raises:
        UserError: If shapes differ, or an embedding is zero or not finite.

    Reference:
        Gal et al. 2022, StyleGAN-NADA: CLIP-guided domain adaptation of image generators, equation 3 (a loss
        there, one minus this).

    >>> eye = np.eye(3)
    >>> directional_similarity(eye[[0, 0]], eye[[1, 0]], eye[[0, 0]], eye[[2, 2]]).round(6).tolist()
    [0.5, nan]
    """
    i1, i2, t1, t2 = unit_pairs(before, after, text_before, text_after)
    image, text = i2 - i1, t2 - t1
    lengths = torch.stack([image.norm(dim=1), text.norm(dim=1)])
    cos = (image * text).sum(1) / lengths.prod(0)
    return cos.masked_fill((lengths < _NO_DIRECTION).any(0), float("nan")).cpu().numpy()


def pair_mean(values: Float[np.ndarray, " n"]) -> PairMean:
    """Return the mean over the values that are not NaN, with the number of those that are.

    >>> pair_mean(np.array([0.5, np.nan]))
    PairMean(mean=0.5, pairs=1, excluded=1)
    """
    valid = values[~np.isnan(values)]
    mean = float(valid.mean()) if len(valid) else float("nan")
    return PairMean(mean, len(valid), len(values) - len(valid))


class MeanOverPairs(Metric):
    """Mean of a value a pair, from sums; pairs without a value are counted and left out."""

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    total: Tensor
    pairs: Tensor
    excluded: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("total", "pairs", "excluded"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return ``mean`` (NaN without pairs that have a value), ``pairs`` and ``excluded``, float64."""
        mean = float(self.total / self.pairs)
        return as_tensors(PairMean(mean, float(self.pairs), float(self.excluded)), self.device)

    def add(self, values: Float[np.ndarray, " n"]) -> None:
        """Add values of pairs, NaN where there is none."""
        part = pair_mean(values)
        self.total = self.total + float(np.nansum(values))
        self.pairs = self.pairs + part.pairs
        self.excluded = self.excluded + part.excluded


class ImageSimilarity(MeanOverPairs):
    """Mean `image_similarity` of streamed pairs.

    >>> metric = ImageSimilarity()
    >>> metric.update(np.array([[3.0, 4.0]]), np.array([[0.0, 2.0]]))
    >>> round(float(metric.compute()["mean"]), 6)
    0.8
    """

    def update(self, before: Features, after: Features) -> None:
        """Add pairs; the arguments of `image_similarity`."""
        self.add(image_similarity(before, after))


class DirectionalSimilarity(MeanOverPairs):
    """Mean `directional_similarity` of streamed pairs; `compute` says how many had no direction.

    >>> metric, eye = DirectionalSimilarity(), np.eye(3)
    >>> metric.update(eye[[0, 0]], eye[[1, 0]], eye[[0, 0]], eye[[2, 2]])
    >>> {name: round(float(value), 6) for name, value in metric.compute().items()}
    {'mean': 0.5, 'pairs': 1.0, 'excluded': 1.0}
    """

    def update(self, before: Features, after: Features, text_before: Features, text_after: Features) -> None:
        """Add pairs; the arguments of `directional_similarity`."""
        self.add(directional_similarity(before, after, text_before, text_after))
