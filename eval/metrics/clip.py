"""CLIP metrics of images: agreement with a caption, similarity of two images, direction of an edit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from eval.metrics.feature_sets import Features, unit_pairs

_MIN_LENGTH = 1e-5  # of a difference of unit vectors; rounding in a float32 encoder alone gives 1e-6


def image_similarity(before: Features, after: Features) -> Float[np.ndarray, " n"]:
    """Return ``cos(I1, I2)`` of each pair of image embeddings, float64 in -1..1.

    Args:
        before, after: Embeddings of any length, paired row by row (tensors or arrays), checked by `unit_pairs`.

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
    return cos.masked_fill((lengths < _MIN_LENGTH).any(0), float("nan")).cpu().numpy()


def clip_score(image_emb: Features, text_emb: Features) -> Float[np.ndarray, " n"]:
    """Score each image against its own text: ``100 cos`` of their embeddings, float64.

    Unclamped, so that negative values are not lost in a mean.  Hessel et al. define ``2.5 max(cos, 0)``; torchmetrics'
    ``CLIPScore`` is the mean of this score, clamped at 0.

    Args:
        image_emb: Image embeddings of any length (arrays or tensors).
        text_emb: Embeddings of the images' captions, row by row.

    Reference:
        Hessel et al. 2021, CLIPScore: a reference-free evaluation metric for image captioning.

    >>> clip_score(np.array([[3.0, 4.0]]), np.array([[0.0, 2.0]])).round(6).tolist()
    [80.0]
    """
    images, texts = (x.cpu().numpy() for x in unit_pairs(image_emb, text_emb))
    return 100 * np.einsum("nd,nd->n", images, texts)


class MeanOverPairs(Metric):
    """Streaming mean of one value per pair; pairs without a value are excluded and counted."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    values: Callable[..., Float[np.ndarray, " n"]]
    total: Tensor
    pairs: Tensor
    excluded: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("total", "pairs", "excluded"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, *embeddings: Features) -> None:
        """Add pairs; arguments as for the function of the same name."""
        values = self.values(*embeddings)
        excluded = int(np.isnan(values).sum())
        self.total = self.total + float(np.nansum(values))
        self.pairs = self.pairs + len(values) - excluded
        self.excluded = self.excluded + excluded

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return ``mean`` (NaN if no pair has a value), ``pairs`` (those with a value) and ``excluded``, float64."""
        return {"mean": self.total / self.pairs, "pairs": self.pairs, "excluded": self.excluded}


class DirectionalSimilarity(MeanOverPairs):
    """Mean `directional_similarity` of streamed pairs; `compute` also counts those without a direction.

    >>> metric, eye = DirectionalSimilarity(), np.eye(3)
    >>> metric.update(eye[[0, 0]], eye[[1, 0]], eye[[0, 0]], eye[[2, 2]])
    >>> {name: round(float(value), 6) for name, value in metric.compute().items()}
    {'mean': 0.5, 'pairs': 1.0, 'excluded': 1.0}
    """

    values = staticmethod(directional_similarity)


class ClipScore(MeanOverPairs):
    """Mean `clip_score` of streamed pairs of an image and its text.

    torchmetrics' own ``CLIPScore`` runs the network itself, fails on a stock CLIPModel of transformers 5 and cuts long
    texts without their end token; this takes embeddings, for example of :class:`guidance.models.clip.Clip`.

    >>> metric = ClipScore()
    >>> metric.update(np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[0.0, 2.0], [-1.0, 0.0]]))
    >>> round(float(metric.compute()["mean"]), 6), round(float(metric.compute()["pairs"]))
    (-10.0, 2)
    """

    values = staticmethod(clip_score)
