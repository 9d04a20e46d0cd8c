"""CLIP score: how well images fit their captions, from embeddings of any CLIP."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from eval.feature_sets import unit_pairs
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
