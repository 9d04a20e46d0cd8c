"""What an image goes through before CLIP sees it: resize, crop, normalise, or random cutouts; all differentiable."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from guidance.errors import UserError

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as image processors write them


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """What happens to an image before CLIP's first layer, as the model's ``preprocessor_config.json`` says.

    Attributes:
        size: Side of the square the network takes, in pixels.
        short_side: Resize the shorter side to this and keep the aspect, then crop the centre (CLIP); None squeezes
            the whole image into the square (SigLIP).
        mean, std: Per channel, for pixels in 0..1.
        mode: "bicubic" or "bilinear".
    """

    size: int
    short_side: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], size: int) -> Preprocess:
        """Read an image processor's configuration, of transformers 5 or older, for a network of this input size.

        Raises:
            UserError: If the processor does anything else than resize, crop and normalise to this size.
        """
        wanted, crop = config.get("size", size), config.get("crop_size", size)
        short = wanted.get("shortest_edge") if isinstance(wanted, Mapping) else wanted
        given = _sides(wanted) if short is None else _sides(crop)
        mode = _RESAMPLE.get(config.get("resample", 3))
        known = {"image_mean", "image_std"} <= config.keys() and config.get("do_normalize", True)
        in_unit = abs(config.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-4
        if given != {size} or (short or size) < size or mode is None or not known or not in_unit:
            keys = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
            got = {key: config[key] for key in keys if key in config}
            raise UserError(
                f"Expected an image processor that makes normalised {size}x{size} images by bilinear or bicubic "
                f"resizing, got {got}; choose a CLIP or SigLIP of fixed "
                "image size and keep its own preprocessor_config.json."
            )
        return cls(size, short, tuple(config["image_mean"]), tuple(config["image_std"]), mode)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize and before the crop."""
        if self.short_side is None:
            return self.size, self.size
        short = min(height, width)
        return int(self.short_side * height / short), int(self.short_side * width / short)

    def fit(self, x: Float[Tensor, "... h w"]) -> Float[Tensor, "... size size"]:
        """Resize and crop to the network's square."""
        return self.crop(resize(x, *self.resized(*x.shape[-2:]), self.mode))

    def crop(self, x: Float[Tensor, "... h w"]) -> Float[Tensor, "... size size"]:
        """Cut the network's square out of the centre."""
        top, left = (x.shape[-2] - self.size) // 2, (x.shape[-1] - self.size) // 2
        return x[..., top : top + self.size, left : left + self.size]

    def normalize(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """From pixels in -1..1 to the network's units: ``((x + 1) / 2 - mean) / std``."""
        mean, std = (rearrange(x.new_tensor(values), "c -> c 1 1") for values in (self.mean, self.std))
        return ((x + 1) / 2 - mean) / std


def _sides(size: Any) -> set[Any]:
    """The sides a processor's ``size`` or ``crop_size`` names; the first CLIPs have plain numbers."""
    return {size.get("height"), size.get("width")} if isinstance(size, Mapping) else {size}


def resize(x: Float[Tensor, "... h w"], height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Resize with antialiasing, as ``F.interpolate(..., antialias=True)`` and Pillow do.

    ``Y = R_h X R_w^T``: the filter is separable, so two products with fixed matrices are the whole resize.  Unlike the
    built-in kernel its gradient is deterministic on CUDA, and it runs on every device and in float64.

    Args:
        x: Images, any range; values may overshoot the range at edges.
        height, width: New size in pixels.  A side that has it already is left alone, bit for bit.
        mode: "bicubic" or "bilinear".

    Returns:
        Shape (..., height, width), dtype of ``x``.

    >>> resize(torch.ones(1, 3, 8, 6), 4, 4).shape
    torch.Size([1, 3, 4, 4])
    """
    if x.shape[-1] != width:
        x = x @ _matrix(x.shape[-1], width, mode).to(x).mT
    if x.shape[-2] != height:
        x = _matrix(x.shape[-2], height, mode).to(x) @ x
    return x


@functools.lru_cache(maxsize=64)
def _matrix(old: int, new: int, mode: str) -> Float[Tensor, "new old"]:
    """The resize of one axis as a matrix: column ``i`` is the resized ``i``-th unit vector."""
    # an inference tensor in the cache would spoil later backward passes
    with torch.inference_mode(False), torch.no_grad():
        basis = rearrange(torch.eye(old, dtype=torch.float64), "i x -> 1 i 1 x")
        columns = F.interpolate(basis, size=(1, new), mode=mode, antialias=True, align_corners=False)
        return rearrange(columns, "1 i 1 x -> x i").float().contiguous()


def cutouts(
    x: Float[Tensor, "b c h w"],
    n: int,
    generator: torch.Generator,
    min_size: float = 0.5,
    *,
    size: int,
    power: float = 1.0,
    flip: float = 0.0,
    noise: float = 0.02,
    mode: str = "bicubic",
) -> Float[Tensor, "n b c size size"]:
    """Cut ``n`` random squares out of every image and resize them to CLIP's size; differentiable.

    A gradient that holds for many crops moves what CLIP sees, not the pixels of an adversarial pattern.  The side of a
    square is ``s (m + (1 - m) u^power)`` with ``s`` the shorter side, ``m = min_size`` and ``u`` uniform in 0..1; its
    place is uniform.

    All images of a batch get the same squares, flips and noise: what a sample sees depends on the generator alone, not
    on the samples beside it.

    Args:
        x: Images, any range.
        n: Cutouts per image.
        generator: CPU generator; everything is drawn from it.
        min_size: Smallest side as a fraction of the shorter side, above 0 up to 1; 1 keeps squares whole.
        size: Height and width of the result in pixels.
        power: Above 1 prefers small squares, below 1 large ones.
        flip: Probability of a horizontal flip.
        noise: Standard deviation of Gaussian noise, in the images' units.
        mode: See :func:`resize`.

    Returns:
        The cutouts, first axis the cutout, in the dtype and on the device of ``x``.

    Raises:
        UserError: If ``n`` or ``min_size`` is out of range.

    Reference:
        K. Crowson, "CLIP guided diffusion" (notebooks and repository), 2021: ``MakeCutouts``.
    """
    if n < 1:
        raise UserError(f"Expected one or more cutouts, got {n}; embed the whole image instead.")
    if not 0 < min_size <= 1:
        raise UserError(f"Expected a min_size above 0 and up to 1, a fraction of the image, got {min_size}.")
    height, width = x.shape[-2:]
    short = min(height, width)
    cuts = []
    for u, where_y, where_x, coin in torch.rand(n, 4, generator=generator).tolist():
        side = max(1, round(short * (min_size + (1 - min_size) * u**power)))
        top, left = int(where_y * (height - side + 1)), int(where_x * (width - side + 1))
        cut = resize(x[..., top : top + side, left : left + side], size, size, mode)
        cuts.append(cut.flip(-1) if coin < flip else cut)
    out = torch.stack(cuts)
    if noise == 0:
        return out
    return out + noise * torch.randn(n, 1, *out.shape[2:], generator=generator).to(out)
