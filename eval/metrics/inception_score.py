"""Inception score: is each image classified with confidence, and does the set spread over many classes?

Report it as "Inception score" for the real Inception's 1,000 classes only; otherwise name the classifier.
"""

from __future__ import annotations

import numpy as np
import torch

from eval.metrics.feature_sets import Features, MeanSd, feature_rows, sorted_rows
from guidance.utils.errors import UserError

_SUM_TOLERANCE = 1e-3  # a softmax in half precision stays below it


def inception_score(probabilities: Features, *, splits: int = 10, seed: int = 0) -> MeanSd:
    """Score class probabilities: ``exp(mean_i KL(p_i || mean_j p_j))`` within each of several random splits.

    Args:
        probabilities: ``(n, classes)``, rows that sum to 1 (tensor or array); the order of rows does not matter.
        splits: Parts of nearly equal size.  The score is biased downwards for small parts: keep n and splits
            the same in all comparisons.
        seed: Of the assignment to parts.

    Returns:
        Mean and standard deviation over parts; each score lies between 1 and the number of classes.

    Reference:
        Salimans et al. 2016, Improved techniques for training GANs; the standard deviation has ddof 0 as in
        their code (torchmetrics has ddof 1).

    >>> round(inception_score(np.eye(4), splits=1).mean, 6)
    4.0
    """
    p = feature_rows(probabilities, kind="class probabilities")
    if (p < 0).any() or ((p.double().sum(1) - 1).abs() > _SUM_TOLERANCE).any():
        raise UserError("Expected class probabilities, non-negative with rows that sum to 1; take a softmax first.")
    p = p.double()
    if splits < 1 or len(p) < 2 * splits:
        raise UserError(f"Expected two or more rows in each split, got {len(p)} rows in {splits} splits.")
    if (p == p[0]).all():
        raise UserError(f"Expected probabilities that differ between images, got {len(p)} equal rows.")
    shuffled = sorted_rows(p)[torch.as_tensor(np.random.default_rng(seed).permutation(len(p)))]
    # mean KL(p || q) with q the mean of p is the entropy of q less the mean entropy of p; 0 log 0 = 0
    scores = [
        float((torch.special.entr(part.mean(0)).sum() - torch.special.entr(part).sum(1).mean()).exp())
        for part in shuffled.tensor_split(splits)
    ]
    return MeanSd(float(np.mean(scores)), float(np.std(scores)))
