"""CMMD: maximum mean discrepancy of CLIP embeddings under a Gaussian kernel."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from eval.feature_sets import Features, FeatureSets, two_sets, unit_rows
from eval.kernels import MMD, mmd_squared, rbf_kernel

_SCALE = 1000  # of the published code, to be readable


def cmmd(real: Features, generated: Features) -> MMD:
    """Compare two sets of CLIP embeddings: ``1000 (kxx + kyy - 2 kxy)``, ``k = exp(-|x - y|^2 / 200)``.

    The published code (google-research ``cmmd/distance.py``) averages over all pairs, a row with itself
    included: that is ``biased``, the value to report as CMMD.  It is above 0 for two samples of one
    distribution, by about 1000 (1/n + 1/m) (1 - mean k); ``unbiased`` is not.

    Args:
        real, generated: Embeddings of one CLIP (tensors or arrays), of any length: they are normalised here.

    Raises:
        UserError: If widths differ, an embedding is zero or not finite, or a set is constant or has fewer than
            two rows.

    Reference:
        Jayasumana et al. 2024, Rethinking FID: Towards a better evaluation metric for image generation.

    >>> import numpy as np
    >>> round(cmmd(np.eye(4)[:2], np.eye(4)[2:]).biased, 6)  # 1000 (1 - exp(-2 / 200))
    9.950166
    """
    a, b = two_sets(unit_rows(real), unit_rows(generated))
    value = mmd_squared(a, b, rbf_kernel)
    return MMD(_SCALE * value.biased, _SCALE * value.unbiased)


class CMMD(FeatureSets):
    """`cmmd` of streamed embeddings: `compute` gives ``biased``, the published value, and ``unbiased``.

    >>> import torch
    >>> metric = CMMD(features="judge")
    >>> metric.update(torch.eye(4)[:2], real=True)
    >>> metric.update(torch.eye(4)[2:], real=False)
    >>> metric.name, round(float(metric.compute()["biased"]), 6)
    ('CMMD-judge', 9.950166)
    """

    higher_is_better = False
    short = "CMMD"

    def measure(self, real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"]) -> MMD:
        """Return `cmmd` of the two sides."""
        return cmmd(real, generated)
