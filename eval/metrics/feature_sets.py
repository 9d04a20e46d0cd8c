"""What the metrics of feature sets share: checks of features, one order for a set, a metric that keeps two sets."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from guidance.utils.errors import UserError

Features = Float[np.ndarray, "n d"] | Float[Tensor, "n d"]


@dataclasses.dataclass(frozen=True)
class MeanSd:
    """A value over parts of a set: its mean and its standard deviation (ddof 0, as published) over the parts."""

    mean: float
    sd: float


def feature_rows(
    features: Features, *, width: int | None = None, kind: str = "features"
) -> Float[Tensor, "n d"]:
    """Return features as a tensor in their own precision.

    Args:
        features: One row an image; whole numbers become float64.
        width: The d they must have; None takes any.
        kind: What they are, for the message.

    Raises:
        UserError: If they are no such table or a value is not finite.
    """
    x = torch.as_tensor(features)
    if x.ndim != 2 or x.shape[1] != (width or max(x.shape[1], 1)):
        raise UserError(f"Expected {kind} of shape (n, {width or 'd'}), got {tuple(x.shape)}.")
    if not torch.isfinite(x).all():
        raise UserError(f"Expected finite {kind}, got NaN or infinity; check the images and their encoder.")
    return x if x.is_floating_point() else x.double()


def unit_rows(embeddings: Features) -> Float[Tensor, "n d"]:
    """Return embeddings divided by their lengths, float64.

    Raises:
        UserError: If there is none, or one is zero or not finite.
    """
    x = feature_rows(embeddings, kind="embeddings").double()
    norm = x.norm(dim=1, keepdim=True)
    if not len(x) or not (norm > 0).all():
        raise UserError(
            f"Expected embeddings, one row or more, none of them zero, got {len(x)} with "
            f"{int((norm == 0).sum())} zero; check their source."
        )
    return x / norm


def unit_pairs(*embeddings: Features) -> list[Float[Tensor, "n d"]]:
    """Return `unit_rows` of embeddings that belong together row by row.

    Raises:
        UserError: If shapes differ, there is none, or one is zero or not finite.
    """
    units = [unit_rows(x) for x in embeddings]
    if len({u.shape for u in units}) > 1:
        shapes = ", ".join(str(tuple(u.shape)) for u in units)
        raise UserError(
            f"Expected embeddings of one shape, all of the same CLIP, a row a pair, got {shapes}."
        )
    return units


def two_sets(
    real: Features, generated: Features, least: int = 2
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Return two sets of features that can be compared, float64.

    Raises:
        UserError: If widths differ, a value is not finite, a set has fewer than ``least`` rows, or all rows of
            a set are the same.
    """
    a, b = (feature_rows(x).double() for x in (real, generated))
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"Expected features (n, d) and (m, d) of one width, got {tuple(a.shape)} and {tuple(b.shape)}; "
            "take both from the same encoder."
        )
    if min(len(a), len(b)) < least:
        raise UserError(f"Expected {least} or more rows in each set, got {len(a)} and {len(b)}.")
    for x in (a, b):
        if (x == x[0]).all():
            raise UserError(
                f"Expected features that differ between images in each set, got a set of {len(x)} equal rows; "
                "check the images and their encoder."
            )
    return a, b


def sorted_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the rows in lexicographic order.

    Seeded draws from it depend on the set alone: not on batches, on processes, or on what was merged into what.
    """
    order: Int[np.ndarray, " n"] = np.lexsort(x.cpu().numpy().T[::-1])
    return x[torch.as_tensor(order, device=x.device)]


def as_tensors(result: Any, device: torch.device) -> dict[str, Float[Tensor, ""]]:
    """Return the fields of a dataclass of numbers as float64 tensors: what a torchmetrics collection can join."""
    fields = dataclasses.asdict(result)
    return {name: torch.tensor(x, dtype=torch.float64, device=device) for name, x in fields.items()}


class FeatureSets(Metric):
    """Keep the features of a real and a generated side; a subclass says what is measured on them.

    For definitions that need all pairs of rows.  Features are kept in the precision they come in (10,000 rows
    of 2,048 float32 features are 80 MB a side) and measured in float64.

    Args:
        features: What they are, for `name`: "judge" gives "KD-judge" for the kernel distance.
        reset_real: Whether `reset` also forgets the real side; False keeps a reference over many comparisons.
    """

    is_differentiable = False
    full_state_update = False
    short = ""
    real_rows: list[Tensor]
    fake_rows: list[Tensor]

    def __init__(self, *, features: str = "features", reset_real: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features, self.reset_real = features, reset_real
        for side in ("real_rows", "fake_rows"):
            self.add_state(side, [], dist_reduce_fx="cat")

    @property
    def name(self) -> str:
        """The name to report it under."""
        return f"{self.short}-{self.features}"

    def update(self, features: Features, real: bool) -> None:
        """Add features (tensor or array) to the real or the generated side.

        Raises:
            UserError: If they are no table of numbers, one is not finite, or their width is another.
        """
        side = self.real_rows if real else self.fake_rows
        width = side[0].shape[1] if side else None
        side.append(feature_rows(features, width=width).detach().to(self.device))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return what is measured by name, float64.

        Raises:
            UserError: If a side has no samples, or the two cannot be compared.
        """
        for rows, word, flag in ((self.real_rows, "real", True), (self.fake_rows, "generated", False)):
            if not len(rows):
                raise UserError(
                    f"Expected {word} samples, got none; call update(features, real={flag}) first."
                )
        result = self.measure(dim_zero_cat(self.real_rows), dim_zero_cat(self.fake_rows))
        return as_tensors(result, self.device)

    def measure(self, real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"]) -> Any:
        """Return a dataclass of floats."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget the samples; those of the real side too unless ``reset_real=False``."""
        kept = self.real_rows[:]
        super().reset()
        if not self.reset_real:
            self.real_rows = kept
