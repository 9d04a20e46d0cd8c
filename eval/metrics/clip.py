"""What CLIP says of images: how well they fit their captions, how much of a pair stayed, and which way it changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from eval.metrics.feature_sets import Features, as_tensors, unit_pairs
from guidance.utils.errors import UserError, nearest


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


def _cosine(cos: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return 100 * cos


def _hessel(cos: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return 2.5 * np.maximum(cos, 0)


def _torchmetrics(cos: Float[np.ndarray, " n"]) -> Float[np.ndarray, ""]:
    return np.maximum(100 * cos.mean(), 0)


VARIANTS = {"cosine": _cosine, "hessel": _hessel, "torchmetrics": _torchmetrics}


def clip_score(
    image_emb: Float[np.ndarray, "n d"], text_emb: Float[np.ndarray, "n d"], variant: str = "cosine"
) -> Float[np.ndarray, " n"] | Float[np.ndarray, ""]:
    """Score each image against its own text by the angle of their embeddings.

    ``cosine``: ``100 cos``, unclamped, so that negative values are not lost in a mean.  ``hessel``:
    ``2.5 max(cos, 0)``.  ``torchmetrics``: the one number that library's ``CLIPScore`` gives, ``max(mean(100
    cos), 0)``.

    Args:
        image_emb: Image embeddings of any length (arrays or tensors).
        text_emb: Text embeddings, row by row those of the images' captions.
        variant: See above.

    Returns:
        float64 ``(n,)``; a single number, shape ``()``, for ``torchmetrics``.

    Raises:
        UserError: If shapes differ, a row is zero or not finite, or the variant is unknown.

    Reference:
        Hessel et al. 2021, CLIPScore: a reference-free evaluation metric for image captioning.

    >>> clip_score(np.array([[3.0, 4.0]]), np.array([[0.0, 2.0]])).round(6).tolist()
    [80.0]
    """
    if variant not in VARIANTS:
        raise UserError(
            f"Expected a variant of the CLIP score, got {variant!r}.{nearest(str(variant), VARIANTS)}"
        )
    images, texts = (x.cpu().numpy() for x in unit_pairs(image_emb, text_emb))
    return np.asarray(VARIANTS[variant](np.einsum("nd,nd->n", images, texts)))


class ClipScore(MeanOverPairs):
    """Mean `clip_score` of streamed pairs of an image and its text.

    torchmetrics' own ``CLIPScore`` runs the network itself, fails on a stock CLIPModel of transformers 5 and cuts long
    texts without their end token; this takes embeddings, of :class:`guidance.models.clip.Clip` for example.

    Args:
        variant: As of `clip_score`; "torchmetrics" clamps the mean at 0, as that library does.

    >>> metric = ClipScore()
    >>> metric.update(np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[0.0, 2.0], [-1.0, 0.0]]))
    >>> round(float(metric.compute()["mean"]), 6), round(float(metric.compute()["pairs"]))
    (-10.0, 2)
    """

    def __init__(self, variant: str = "cosine", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if variant not in VARIANTS:
            raise UserError(
                f"Expected a variant of the CLIP score, got {variant!r}.{nearest(variant, VARIANTS)}"
            )
        self.variant = variant

    def update(self, image_emb: Features, text_emb: Features) -> None:
        """Add pairs; the arguments of `clip_score`."""
        clamped = self.variant == "torchmetrics"
        self.add(np.asarray(clip_score(image_emb, text_emb, "cosine" if clamped else self.variant)))

    def compute(self) -> dict[str, Any]:
        """Return ``mean``, ``pairs`` and ``excluded`` (always 0), float64."""
        found = super().compute()
        return found | ({"mean": found["mean"].clamp(min=0)} if self.variant == "torchmetrics" else {})


_NO_DIRECTION = 1e-5  # length of a difference of unit vectors; rounding of a float32 encoder alone gives 1e-6
