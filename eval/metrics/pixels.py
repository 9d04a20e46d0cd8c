"""What single images, or the images of one prompt, say without any reference: truth, rating, saturation, diversity.

The functions give a value an image, for `eval.stats.paired`; the metrics stream their mean and keep sums only
(diversity keeps embeddings).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from eval.features.extractors import Extractor
from eval.metrics.clip import MeanOverPairs, pair_mean
from eval.metrics.feature_sets import Features, as_tensors, unit_rows
from guidance.testbed.truth import truth_score
from guidance.utils.errors import UserError

Images = UInt8[np.ndarray, "n y x 3"] | UInt8[Tensor, "n y x 3"]


def saturation(images: Images) -> Float[np.ndarray, " n"]:
    """Return the mean saturation of each image, ``(max - min) / max`` of a pixel's channels (HSV).

    Args:
        images: RGB, 0..255.

    Returns:
        float64 ``(n,)`` in 0..1.

    Raises:
        UserError: If the images are not uint8 ``(n, y, x, 3)``.

    >>> saturation(np.array([[[[200, 100, 100], [9, 9, 9]]]], np.uint8)).tolist()
    [0.25]
    """
    x = _rgb(images)
    high, low = x.max(3).astype(np.float64), x.min(3).astype(np.float64)
    ratio = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    return ratio.mean((1, 2))


def clipping(images: Images) -> Float[np.ndarray, " n"]:
    """Return the share of each image's pixels in which a channel is 0 or 255.

    Args:
        images: RGB, 0..255.

    Returns:
        float64 ``(n,)`` in 0..1.

    Raises:
        UserError: If the images are not uint8 ``(n, y, x, 3)``.

    >>> clipping(np.array([[[[255, 100, 100], [9, 9, 9]]]], np.uint8)).tolist()
    [0.5]
    """
    x = _rgb(images)
    return ((x.min(3) == 0) | (x.max(3) == 255)).mean((1, 2))


def diversity(embeddings: Features, prompt: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the mean ``1 - cos`` of each image to the others of its prompt; NaN for an image that is alone.

    Args:
        embeddings: Of the images, any length.
        prompt: Number of each image's prompt.

    Returns:
        float64 ``(n,)`` in 0..2; 0 where all seeds look alike.

    Raises:
        UserError: If lengths differ, or an embedding is zero or not finite.

    >>> diversity(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), np.array([0, 0, 1])).tolist()
    [1.0, 1.0, nan]
    """
    rows_of, numbers = _of_prompts(embeddings, prompt)
    x, prompt = rows_of.cpu().numpy(), numbers.cpu().numpy()
    found = np.full(len(x), np.nan)
    for number in np.unique(prompt):
        rows = np.flatnonzero(prompt == number)
        if len(rows) > 1:
            cos = x[rows] @ x[rows].T
            found[rows] = 1 - (cos.sum(1) - cos.diagonal()) / (len(rows) - 1)
    return found


class _ImageMean(MeanOverPairs):
    """Mean of a function of single images; ``pairs`` counts the images."""

    score: Callable[[Any], Float[np.ndarray, " n"]]

    def update(self, images: Images) -> None:
        """Add images, uint8 RGB ``(n, y, x, 3)``."""
        self.add(type(self).score(images))


class TruthScore(_ImageMean):
    """Mean `guidance.testbed.truth.truth_score` of streamed images, in standard deviations of training scenes.

    >>> metric = TruthScore()
    >>> metric.update(np.full((1, 64, 64, 3), 128, np.uint8))
    >>> bool(metric.compute()["mean"] < -1)
    True
    """

    score = staticmethod(lambda images: truth_score(_rgb(images)))


class Saturation(_ImageMean):
    """Mean `saturation` of streamed images.  Compare two arms: guidance that is too strong drifts upwards."""

    higher_is_better: bool | None = None
    score = staticmethod(saturation)


class Clipping(_ImageMean):
    """Mean `clipping` of streamed images."""

    higher_is_better = False
    score = staticmethod(clipping)


class HeadRating(MeanOverPairs):
    """Mean score that a head gives finished images.

    Args:
        rating: See :func:`eval.features.extractors.rating_extractor`.  A head that guided the images
            does not grade them.
    """

    def __init__(self, rating: Extractor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rating = rating

    def update(self, images: Sequence[Image.Image]) -> None:
        """Add images, RGB; their prompts stand in ``image.info["prompt"]`` where the head knows captions."""
        self.add(np.asarray(self.rating.embed(images), np.float64)[:, 0])


class Diversity(Metric):
    """Mean `diversity` of streamed images over those that have another of their prompt.

    Prompts may be split between batches and processes; embeddings are kept (10,000 of 512 numbers are 20 MB).

    >>> metric = Diversity()
    >>> metric.update(np.array([[1.0, 0.0]]), np.array([7]))
    >>> metric.update(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([7, 8]))
    >>> {name: float(value) for name, value in metric.compute().items()}
    {'mean': 1.0, 'pairs': 2.0, 'excluded': 1.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    rows: list[Tensor]
    prompts: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("rows", "prompts"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, embeddings: Features, prompt: Int[np.ndarray, " n"] | Int[Tensor, " n"]) -> None:
        """Add images; the arguments of `diversity`."""
        unit, numbers = _of_prompts(embeddings, prompt)
        self.rows.append(unit.to(self.device))
        self.prompts.append(numbers.long().to(self.device))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return ``mean`` (NaN if every image is alone), ``pairs`` (images with a value) and ``excluded``.

        Raises:
            UserError: If there are no images.
        """
        if not len(self.rows):
            raise UserError("Expected images, got none; call update(embeddings, prompt) first.")
        values = diversity(dim_zero_cat(self.rows), dim_zero_cat(self.prompts).cpu().numpy())
        return as_tensors(pair_mean(values), self.device)


def _of_prompts(embeddings: Features, prompt: Any) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """Embeddings of unit length, and the prompt of each."""
    unit, numbers = unit_rows(embeddings), torch.as_tensor(prompt)
    if numbers.shape != unit.shape[:1]:
        raise UserError(
            f"Expected the prompt of each of {len(unit)} images, got shape {tuple(numbers.shape)}."
        )
    return unit, numbers


def _rgb(images: Images) -> UInt8[np.ndarray, "n y x 3"]:
    x = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if x.ndim != 4 or x.shape[3] != 3 or x.dtype != np.uint8:
        raise UserError(f"Expected uint8 images of shape (n, y, x, 3), got {x.dtype} {x.shape}.")
    return x
