"""Inception score: are single images classified surely, and all of them as many classes?

Report it as "Inception score" for the real Inception's 1,000 classes only; else name the classifier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from eval.metrics.feature_sets import Features, MeanSd, as_tensors, feature_rows, sorted_rows
from guidance.utils.errors import UserError

_SUM_TOLERANCE = 1e-3  # a softmax in half precision stays below it


def inception_score(probabilities: Features, *, splits: int = 10, seed: int = 0) -> MeanSd:
    """Score class probabilities: ``exp(mean_i KL(p_i || mean_j p_j))``, within each of some random splits.

    Args:
        probabilities: ``(n, classes)``, rows that sum to 1 (tensor or array); the order of rows does not matter.
        splits: Parts of nearly equal size.  The score is biased downwards for small parts: keep n and splits
            the same in all comparisons.
        seed: Of the assignment to parts.

    Returns:
        Mean and standard deviation over parts; each lies between 1 and the number of classes.

    Raises:
        UserError: If rows are no probabilities, all rows are the same, or there are fewer than two rows a part.

    Reference:
        Salimans et al. 2016, Improved techniques for training GANs; the standard deviation has ddof 0 as in
        their code (torchmetrics has ddof 1).

    >>> round(inception_score(np.eye(4), splits=1).mean, 6)
    4.0
    """
    p = _probabilities(probabilities).double()
    if splits < 1 or len(p) < 2 * splits:
        raise UserError(
            f"Expected a number of splits from 1 and two or more rows in each, got {splits} splits of {len(p)} "
            "rows; take fewer splits or more images."
        )
    if (p == p[0]).all():
        raise UserError(
            f"Expected probabilities that differ between images, got {len(p)} equal rows; check the classifier."
        )
    shuffled = sorted_rows(p)[torch.as_tensor(np.random.default_rng(seed).permutation(len(p)))]
    # mean KL(p || q) with q the mean of p is the entropy of q less the mean entropy of p; 0 log 0 = 0
    scores = [
        float((torch.special.entr(part.mean(0)).sum() - torch.special.entr(part).sum(1).mean()).exp())
        for part in shuffled.tensor_split(splits)
    ]
    return MeanSd(float(np.mean(scores)), float(np.std(scores)))


class InceptionScore(Metric):
    """`inception_score` of streamed class probabilities: `compute` gives ``mean`` and ``sd``.

    Random splits are only known once all images are, so the probabilities are kept (10,000 images of 1,000
    classes in float32: 40 MB).

    Args:
        splits, seed: As of `inception_score`.

    >>> metric = InceptionScore(splits=1)
    >>> metric.update(torch.eye(4))
    >>> round(float(metric.compute()["mean"]), 6)
    4.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    probabilities: list[Tensor]

    def __init__(self, *, splits: int = 10, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.splits, self.seed = splits, seed
        self.add_state("probabilities", [], dist_reduce_fx="cat")

    def update(self, probabilities: Features) -> None:
        """Add class probabilities ``(n, classes)`` of images.

        Raises:
            UserError: If they are no probabilities, or of another number of classes.
        """
        width = self.probabilities[0].shape[1] if self.probabilities else None
        self.probabilities.append(_probabilities(probabilities, width).detach().to(self.device))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the mean and standard deviation over splits, float64.

        Raises:
            UserError: If there are too few images.
        """
        if not len(self.probabilities):
            raise UserError("Expected class probabilities, got none; call update(probabilities) first.")
        result = inception_score(dim_zero_cat(self.probabilities), splits=self.splits, seed=self.seed)
        return as_tensors(result, self.device)


def _probabilities(probabilities: Features, width: int | None = None) -> Float[Tensor, "n classes"]:
    p = feature_rows(probabilities, width=width, kind="class probabilities")
    if (p < 0).any() or ((p.double().sum(1) - 1).abs() > _SUM_TOLERANCE).any():
        raise UserError(
            "Expected class probabilities, rows of non-negative numbers that sum to 1, got others; take the "
            "softmax of logits first."
        )
    return p
