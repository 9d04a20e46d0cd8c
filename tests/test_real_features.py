"""Set metrics on real photographs in a real network's features: MobileNetV2 of ImageNet on CIFAR-10 and Tiny-ImageNet.

Our values against the formulas of the published packages, and against torchmetrics with the same network.  Skipped
where the data is absent.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from eval.features.extractors import extractor_from_module
from eval.features.reference import load_reference
from eval.metrics.frechet import frechet_distance, moments
from eval.metrics.inception_score import inception_score
from eval.metrics.kernels import cmmd, kid
from eval.metrics.precision_recall import precision_recall

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WEIGHTS = DATA / "weights" / "mobilenet_v2_imagenet.safetensors"
SETS = [DATA / "images" / name for name in ("cifar10_jpeg.parquet", "tiny_imagenet_a.parquet")]
N = 160
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not all(f.exists() for f in (WEIGHTS, *SETS)), reason=f"no real data in {DATA.name}/"),
]


class MobileNetV2(nn.Module):
    """RGB in -1..1 to 1280 features, or to 1000 logits; layers as the metadata of the weights says."""

    def __init__(self, *, logits: bool = False) -> None:
        from safetensors.torch import load_file

        super().__init__()
        self.logits = logits
        for name, tensor in load_file(WEIGHTS).items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(tensor.float()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._conv(x, "stem", stride=2)
        for block in range(17):
            h = self._conv(x, f"block{block}_expand") if block else x
            h = self._conv(h, f"block{block}_depthwise", stride=2 if block in (1, 3, 6, 13) else 1)
            h = self._conv(h, f"block{block}_project", relu=False)
            x = x + h if h.shape == x.shape else h
        features = self._conv(x, "head").mean((2, 3))
        return features @ self.classifier_weight.T + self.classifier_bias if self.logits else features

    def _conv(self, x: torch.Tensor, name: str, stride: int = 1, relu: bool = True) -> torch.Tensor:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        if weight.shape[-1] == 3:  # TensorFlow pads right and bottom only at stride 2
            x = F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        x = F.conv2d(x, weight, bias, stride, groups=groups)
        return F.relu6(x) if relu else x


def mobilenet(*, logits: bool = False):
    half = (0.5, 0.5, 0.5)
    return extractor_from_module(
        MobileNetV2(logits=logits), name="mobilenet_v2", size=96, mean=half, std=half
    )


@pytest.fixture(scope="module")
def photographs(one_thread) -> list[np.ndarray]:
    """1280 features of images of either set."""
    extractor = mobilenet()
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
    for measure in (
        lambda x, y: kid(x, y, subsets=1, subset_size=N // 2).mean,
        lambda x, y: cmmd(x, y).unbiased,
    ):
        halves = [abs(measure(x[::2], x[1::2])) for x in (a, b)]
        assert measure(a[::2], b[::2]) > 5 * max(halves)


@pytest.mark.parametrize(("d", "rel"), [(128, 1e-9), (512, 1e-6)])
def test_frechet_distance_is_that_of_pytorch_fid(photographs, d: int, rel: float) -> None:
    """calculate_frechet_distance of pytorch-fid 0.3, with more images than features and with fewer."""
    x, y = (z[:, :d] for z in photographs)
    mu1, mu2, s1, s2 = x.mean(0), y.mean(0), np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    covmean, diff = np.real(sqrtm(s1.dot(s2))), mu1 - mu2
    expected = diff.dot(diff) + np.trace(s1) + np.trace(s2) - 2 * np.trace(covmean)
    assert fd(x, y) == pytest.approx(expected, rel=rel)


def test_kid_is_that_of_clean_fid(photographs) -> None:
    """kernel_distance of clean-fid 0.1.35 with one full subset, in the float32 of its features."""
    x, y = (z.astype(np.float32) for z in photographs)
    m, d = x.shape
    a = (x @ x.T / d + 1) ** 3 + (y @ y.T / d + 1) ** 3
    b = (x @ y.T / d + 1) ** 3
    expected = (a.sum() - np.diag(a).sum()) / (m - 1) - b.sum() * 2 / m
    assert kid(x, y, subsets=1, subset_size=m).mean == pytest.approx(expected / m, rel=2e-6)


def test_precision_and_recall_are_those_of_prdc(photographs) -> None:
    """compute_prdc of prdc 0.2 with k = 3; no photograph lies on a ball's surface, so its ``<`` is our ``<=``."""
    x, y = photographs

    def distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        squares = (u**2).sum(1)[:, None] + (v**2).sum(1) - 2 * u @ v.T
        return np.sqrt(squares.clip(min=0))

    def radii(u: np.ndarray) -> np.ndarray:
        return np.partition(distances(u, u), 3, axis=1)[:, 3]

    cross = distances(x, y)
    ours = precision_recall(x, y)
    assert ours.precision == (cross < radii(x)[:, None]).any(0).mean()
    assert ours.recall == (cross < radii(y)[None]).any(1).mean()
    assert 0 < ours.precision < 1 and 0 < ours.recall < 1


def test_cmmd_is_the_published_one(photographs) -> None:
    """distance.mmd of google-research/cmmd, with its scale and sigma, on unit vectors."""
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in photographs)

    def k(u: np.ndarray, v: np.ndarray) -> float:
        squares = np.expand_dims((u**2).sum(1), 1) + np.expand_dims((v**2).sum(1), 0) - 2 * u @ v.T
        return np.exp(-squares / (2 * 10**2)).mean()

    assert cmmd(*photographs).biased == pytest.approx(1000 * (k(x, x) + k(y, y) - 2 * k(x, y)), rel=1e-9)


class Slice(nn.Module):
    """What torchmetrics takes as its feature network: uint8 (b, 3, h, w) to the first features of an extractor."""

    def __init__(self, extractor, width: int) -> None:
        super().__init__()
        self.extractor, self.num_features = extractor, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        arrays = list(x.permute(0, 2, 3, 1).numpy())
        return torch.from_numpy(self.extractor.embed(arrays)[:, : self.num_features])


def pixels(file: Path, n: int) -> torch.Tensor:
    import pyarrow.parquet as pq

    from guidance.data.sources import decode_image
    from guidance.utils.images import fit_image

    cells = pq.read_table(file, columns=["image"])["image"].slice(0, n).to_pylist()
    arrays = np.stack([fit_image(decode_image(cell), 64) for cell in cells])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def test_torchmetrics_with_the_same_network_agrees() -> None:
    sides, net, scorer = [pixels(file, 40) for file in SETS], Slice(mobilenet(), 32), mobilenet(logits=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of buffers, and of the standard deviation of one split
        theirs = [
            FrechetInceptionDistance(feature=net, input_img_size=(3, 64, 64)),
            KernelInceptionDistance(feature=net, subsets=1, subset_size=40),
        ]
        for metric in theirs:
            for side, real in zip(sides, (True, False), strict=True):
                metric.update(side, real=real)
        score = InceptionScore(feature=Slice(scorer, 1000), splits=1)
        score.update(sides[1])
        expected = [float(theirs[0].compute()), float(theirs[1].compute()[0]), float(score.compute()[0])]
    x, y = (net(side).numpy() for side in sides)
    assert fd(x, y) == pytest.approx(expected[0], rel=1e-6)
    assert kid(x, y, subsets=1, subset_size=40).mean == pytest.approx(expected[1], rel=2e-6)
    p = torch.from_numpy(scorer.embed(list(sides[1].permute(0, 2, 3, 1).numpy()))).softmax(1)
    assert inception_score(p, splits=1).mean == pytest.approx(expected[2], rel=1e-5)
