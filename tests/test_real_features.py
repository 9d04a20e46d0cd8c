"""Set metrics on real photographs in a real network's features: MobileNetV2 of ImageNet on CIFAR-10 and Tiny-ImageNet.

Skipped where the data is absent.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eval.features.extractors import extractor_from_module
from eval.features.reference import load_reference
from eval.metrics.frechet import frechet_distance, moments
from eval.metrics.kernels import cmmd, kid

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WEIGHTS = DATA / "weights" / "mobilenet_v2_imagenet.safetensors"
SETS = [DATA / "images" / name for name in ("cifar10_jpeg.parquet", "tiny_imagenet_a.parquet")]
N = 160
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not all(f.exists() for f in (WEIGHTS, *SETS)), reason=f"no real data in {DATA.name}/"),
]


class MobileNetV2(nn.Module):
    """RGB in -1..1 to 1280 features; layers as in the metadata of the weights."""

    def __init__(self) -> None:
        from safetensors.torch import load_file

        super().__init__()
        for name, tensor in load_file(WEIGHTS).items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(tensor.float()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._conv(x, "stem", stride=2)
        for block in range(17):
            h = self._conv(x, f"block{block}_expand") if block else x
            h = self._conv(h, f"block{block}_depthwise", stride=2 if block in (1, 3, 6, 13) else 1)
            h = self._conv(h, f"block{block}_project", relu=False)
            x = x + h if h.shape == x.shape else h
        return self._conv(x, "head").mean((2, 3))

    def _conv(self, x: torch.Tensor, name: str, stride: int = 1, relu: bool = True) -> torch.Tensor:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        if weight.shape[-1] == 3:  # TensorFlow pads right and bottom only at stride 2
            x = F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        x = F.conv2d(x, weight, bias, stride, groups=groups)
        return F.relu6(x) if relu else x


@pytest.fixture(scope="module")
def photographs(one_thread) -> list[np.ndarray]:
    """1280 features of images of either set."""
    half = (0.5, 0.5, 0.5)
    extractor = extractor_from_module(MobileNetV2(), name="mobilenet_v2", size=96, mean=half, std=half)
    found = [load_reference(file, extractor, n=N).features for file in SETS]
    return [x.astype(np.float64) for x in found]


def fd(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(*moments(x), *moments(y))


def test_halves_of_a_set_are_nearer_than_two_sets(photographs) -> None:
    """FD on 32 of the channels, KID and CMMD, which have no bias, on all.

    With all channels FD needs more images: of 2,600 in each half it is 146 within CIFAR-10, 233 within Tiny-ImageNet,
    and 752 between them.
    """
    a, b = photographs
    within = [fd(x[::2, :32], x[1::2, :32]) for x in (a, b)]
    assert fd(a[::2, :32], b[::2, :32]) > 1.5 * max(within)
    for measure in (lambda x, y: kid(x, y, subsets=1, subset_size=N // 2).mean, lambda x, y: cmmd(x, y).unbiased):
        halves = [abs(measure(x[::2], x[1::2])) for x in (a, b)]
        assert measure(a[::2], b[::2]) > 5 * max(halves)
