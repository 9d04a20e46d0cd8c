"""CLIP score: how well images fit their captions, from embeddings of any CLIP."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from eval.feature_sets import Features, unit_pairs
from eval.similarity import MeanOverPairs
from guidance.errors import UserError, nearest


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
    texts without their end token; this takes embeddings, of :class:`guidance.clip.Clip` for example.

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
