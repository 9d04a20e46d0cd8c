"""Metrics of pixels, and diversity among the images of a prompt: one value an image, without any reference."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, UInt8

from eval.metrics.feature_sets import Features, unit_rows

Images = UInt8[np.ndarray, "n y x 3"]  # RGB, 0..255


def saturation(images: Images) -> Float[np.ndarray, " n"]:
    """Return the mean saturation of each image, ``(max - min) / max`` of a pixel's channels (HSV), in 0..1.

    >>> saturation(np.array([[[[200, 100, 100], [9, 9, 9]]]], np.uint8)).tolist()
    [0.25]
    """
    high, low = images.max(3).astype(np.float64), images.min(3).astype(np.float64)
    ratio = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    return ratio.mean((1, 2))


def clipping(images: Images) -> Float[np.ndarray, " n"]:
    """Return the share of each image's pixels in which a channel is 0 or 255.

    >>> clipping(np.array([[[[255, 100, 100], [9, 9, 9]]]], np.uint8)).tolist()
    [0.5]
    """
    return ((images.min(3) == 0) | (images.max(3) == 255)).mean((1, 2))


def diversity(embeddings: Features, prompt: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the mean ``1 - cos`` of each image to the others of its prompt; NaN for an image that is alone.

    Args:
        embeddings: Of the images, any length.
        prompt: Number of each image's prompt.

    Returns:
        float64 ``(n,)`` in 0..2; 0 where all seeds look alike.

    >>> diversity(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), np.array([0, 0, 1])).tolist()
    [1.0, 1.0, nan]
    """
    x = unit_rows(embeddings).cpu().numpy()
    assert prompt.shape == x.shape[:1]
    found = np.full(len(x), np.nan)
    for number in np.unique(prompt):
        rows = np.flatnonzero(prompt == number)
        if len(rows) > 1:
            cos = x[rows] @ x[rows].T
            found[rows] = 1 - (cos.sum(1) - cos.diagonal()) / (len(rows) - 1)
    return found
