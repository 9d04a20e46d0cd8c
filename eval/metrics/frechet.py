"""Frechet distance between two sets of features, as a function and as a streaming torchmetrics metric.

Name it after its features: "FID" is the distance on the real Inception's features only, "FD-<features>" on others.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from eval.metrics.feature_sets import Features, feature_rows
from guidance.utils.errors import UserError
from guidance.utils.io import atomic_path

Mean = Float[np.ndarray, " d"] | Float[Tensor, " d"]
Covariance = Float[np.ndarray, "d d"] | Float[Tensor, "d d"]

_WELL_CONDITIONED = 1e-10  # least pivot relative to the largest


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (d,) and covariance (d, d), ddof 1, of features (n, d), in float64."""
    wide = features.astype(np.float64)
    return wide.mean(0), np.cov(wide, rowvar=False)


def frechet_distance(mu1: Mean, s1: Covariance, mu2: Mean, s2: Covariance) -> float:
    """Return the squared Frechet (2-Wasserstein) distance of two Gaussians.

    ``|mu1 - mu2|^2 + tr S1 + tr S2 - 2 sum sqrt(lambda)``, ``lambda`` the eigenvalues of ``R^T S2 R`` with ``S1 = R
    R^T``, clipped at 0: those of ``S1^1/2 S2 S1^1/2``, which the root chosen does not change.  All in float64, by
    symmetric eigenproblems: an order of magnitude faster than a matrix square root, and never complex.

    Args:
        mu1, mu2: Means (tensors or arrays).
        s1, s2: Covariances, symmetric and positive semi-definite.

    Reference:
        Dowson and Landau 1982; Heusel et al. 2017.

    >>> eye = torch.eye(2)
    >>> round(frechet_distance(torch.zeros(2), eye, torch.tensor([3.0, 4.0]), 4 * eye), 9)
    27.0
    """
    mu1, s1, mu2, s2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, s1, mu2, s2))
    d = len(mu1)
    if mu2.shape != (d,) or s1.shape != (d, d) or s2.shape != (d, d):
        raise UserError(
            f"Expected statistics of the same features, got means of {d} and {len(mu2)}; name the reference's network."
        )
    root = _root(s1)
    eigenvalues = torch.linalg.eigvalsh(root.T @ s2 @ root).clamp(min=0)
    return float((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * eigenvalues.sqrt().sum())


def save_statistics(
    path: str | os.PathLike[str], mu: Float[np.ndarray, " d"], sigma: Float[np.ndarray, "d d"], n: int | None = None
) -> None:
    """Write ``mu``, ``sigma`` and, where known, ``n`` into an ``.npz``, which pytorch-fid and clean-fid read too."""
    assert os.fspath(path).endswith(".npz"), path
    arrays: dict[str, Any] = {"mu": mu, "sigma": sigma} | ({} if n is None else {"n": np.int64(n)})
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def load_statistics(
    path: str | os.PathLike[str],
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"], int | None]:
    """Read ``mu``, ``sigma`` (float64) and ``n`` from an ``.npz``; n is None where another package left it out.

    Raises:
        UserError: If the file is missing or is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
            n = int(file["n"]) if "n" in file else None
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not np.isfinite(mu.sum() + sigma.sum()):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"Expected reference statistics at '{path}', found none; check the path.") from None
    # raised by a text file, a truncated file, a bare array; OSError by a folder
    except (KeyError, ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"Expected reference statistics, finite mu (d,) and sigma (d, d), in '{path}', got something else; write "
            "them with save_statistics."
        ) from error
    return mu, sigma, n


def _root(s: Float[Tensor, "d d"]) -> Float[Tensor, "d k"]:
    """Return R with ``s = R R^T``: Cholesky's where s is far from singular, else from eigenvectors of its support."""
    lower, failed = torch.linalg.cholesky_ex(s)
    pivots = lower.diagonal().square()
    if not failed and pivots.min() > _WELL_CONDITIONED * pivots.max():
        return lower  # a tenth of the time of eigenvectors
    values, vectors = torch.linalg.eigh(s)
    support = values > values.max().clamp(min=0) * len(s) * torch.finfo(torch.float64).eps
    return vectors[:, support] * values[support].sqrt()


class FrechetDistance(Metric):
    """Frechet distance from streamed sums: features are not kept, and processes merge by addition.

    The state of each side is ``n``, ``sum x`` and ``sum x x^T`` in float64; the covariance has ddof 1.  The
    distance is biased upwards at small n, strongly below ``n = 2 d``, where `compute` warns.  Save a side by
    ``save_statistics(path, *metric.statistics(real=True), n)``, and compare one with a file by `frechet_distance`.

    Args:
        num_features: Width d of the features.
        reset_real: Let `reset` clear the real side too; False keeps a reference over many comparisons.

    >>> fd = FrechetDistance(2, reset_real=False)
    >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> fd.update(x, real=True)
    >>> fd.update(x + 1, real=False)
    >>> round(float(fd.compute()), 9)
    2.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    n: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, num_features: int, *, reset_real: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_features, self.reset_real = num_features, reset_real
        for name, shape in (("n", ()), ("total", (num_features,)), ("outer", (num_features, num_features))):
            self.add_state(name, torch.zeros(2, *shape, dtype=torch.float64), dist_reduce_fx="sum")  # generated, real

    def update(self, features: Features, real: bool) -> None:
        """Add features (tensor or array) to the real or the generated side."""
        x = feature_rows(features, width=self.num_features).to(self.total)
        self.n[int(real)] += len(x)
        self.total[int(real)] += x.sum(0)
        self.outer[int(real)] += x.T @ x

    def compute(self) -> Float[Tensor, ""]:
        """Return the distance of the two sides, float64; each needs two or more samples."""
        least = int(self.n.min())
        if 2 <= least < 2 * self.num_features:
            warnings.warn(
                f"Frechet distance of {least} samples with {self.num_features} features is biased upwards: "
                f"compare it only at equal sample sizes, or take {2 * self.num_features} or more.",
                stacklevel=2,
            )
        value = frechet_distance(*self.statistics(real=True), *self.statistics(real=False))
        return torch.tensor(value, dtype=torch.float64, device=self.n.device)

    def statistics(self, *, real: bool) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """Return mean and covariance (ddof 1) of a side."""
        n, total, outer = (state[int(real)] for state in (self.n, self.total, self.outer))
        if n < 2:
            raise UserError(f"Expected two or more samples, got {int(n)}; call update(features, real={real}) first.")
        mean = total / n
        return mean, (outer - n * torch.outer(mean, mean)) / (n - 1)

    def reset(self) -> None:
        """Clear the generated side, and the real side too unless ``reset_real=False``."""
        real = {name: state[1] for name, state in self.metric_state.items()}
        super().reset()
        if not self.reset_real:
            for name, value in real.items():
                getattr(self, name)[1] = value
