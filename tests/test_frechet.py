"""Frechet distance: closed forms, other implementations, streaming, merging, reference files; CLIP score."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.multimodal import CLIPScore

from eval.metrics.clip import ClipScore, clip_score
from eval.metrics.frechet import FrechetDistance, frechet_distance, load_statistics, save_statistics
from guidance.utils.errors import UserError


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + torch.randn(d, generator=g)


def filled(real: torch.Tensor, fake: torch.Tensor, **kwargs) -> FrechetDistance:
    metric = FrechetDistance(real.shape[1], **kwargs)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric


def by_scipy(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.numpy(), y.numpy()
    s1, s2 = np.cov(x.T), np.cov(y.T)
    root = np.real(sqrtm(s1 @ s2))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root))


def test_diagonal_gaussians_in_closed_form() -> None:
    g = torch.Generator().manual_seed(0)
    mu1, mu2, v1, v2 = torch.rand(4, 30, generator=g, dtype=torch.float64)
    expected = ((mu1 - mu2) ** 2 + (v1.sqrt() - v2.sqrt()) ** 2).sum()
    assert frechet_distance(mu1, v1.diag(), mu2, v2.diag()) == pytest.approx(float(expected), rel=1e-12)


def test_zero_for_equal_and_symmetric_and_rotation_invariant() -> None:
    x, y = gaussian(200, 12, 1), gaussian(200, 12, 2)
    q = torch.linalg.qr(gaussian(12, 12, 3))[0]
    value = float(filled(x, y).compute())
    assert abs(float(filled(x, x).compute())) < 1e-9
    assert float(filled(y, x).compute()) == pytest.approx(value, rel=1e-10)
    assert float(filled(x @ q, y @ q).compute()) == pytest.approx(value, rel=1e-10)


def test_a_point_mass_against_a_gaussian() -> None:
    zero, eye = torch.zeros(3), torch.eye(3)
    assert frechet_distance(zero, 0 * eye, zero, eye) == pytest.approx(3)
    assert frechet_distance(zero, eye, zero, 0 * eye) == pytest.approx(3)


def test_agrees_with_scipy() -> None:
    x, y = gaussian(500, 40, 4), gaussian(300, 40, 5)
    assert float(filled(x, y).compute()) == pytest.approx(by_scipy(x, y), rel=1e-9)


def test_fewer_samples_than_features_agrees_with_the_nuclear_norm() -> None:
    x, y = gaussian(30, 80, 6), gaussian(40, 80, 7)
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    expected -= 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    with pytest.warns(UserWarning, match="biased"):
        value = filled(x, y).compute()
    assert float(value) == pytest.approx(float(expected), rel=1e-6)


class Flat(nn.Module):
    """A feature network for torchmetrics: 2x2 RGB images are their own 12 features."""

    num_features = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).double()


def test_agrees_with_torchmetrics() -> None:
    g = torch.Generator().manual_seed(8)
    x, y = torch.rand(2, 100, 3, 2, 2, generator=g)
    y = 0.5 * y + 0.2
    other = FrechetInceptionDistance(feature=Flat(), normalize=True, input_img_size=(3, 2, 2))
    other = other.set_dtype(torch.float64)
    other.update(x.double(), real=True)
    other.update(y.double(), real=False)
    ours = filled(Flat()(x), Flat()(y)).compute()
    assert float(ours) == pytest.approx(float(other.compute()), rel=1e-6)


def test_streaming_and_merging_equal_one_batch() -> None:
    x, y = gaussian(300, 10, 9), gaussian(280, 10, 10)
    whole = filled(x, y).compute()
    parts = filled(x[:100], y[:7])
    parts.update(x[100:].numpy(), real=True)
    rest = FrechetDistance(10)
    rest.update(y[7:], real=False)
    parts.merge_state(rest)
    assert float(parts.compute()) == pytest.approx(float(whole), rel=1e-10)


def test_float32_features_are_summed_in_float64() -> None:
    x = gaussian(4000, 6, 11).float() + 100
    metric = FrechetDistance(6)
    for part in x.split(500):
        metric.update(part, real=True)
    mean, cov = metric.statistics(real=True)
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy().T), rtol=0, atol=1e-8)


def test_reset_keeps_the_reference_on_demand() -> None:
    x, y = gaussian(100, 5, 12), gaussian(100, 5, 13)
    metric = filled(x, y, reset_real=False)
    value = metric.compute()
    metric.reset()
    with pytest.raises(UserError, match="real=False"):
        metric.compute()
    metric.update(y, real=False)
    assert metric.compute() == value
    forgets = filled(x, y)
    forgets.reset()
    forgets.update(y, real=False)
    with pytest.raises(UserError, match="real=True"):
        forgets.compute()


def test_statistics_survive_a_file(tmp_path) -> None:
    x, y = gaussian(100, 5, 14), gaussian(90, 5, 15)
    metric = filled(x, y)
    mu, sigma = (s.numpy() for s in metric.statistics(real=True))
    save_statistics(tmp_path / "ref.npz", mu, sigma, 100)
    loaded = load_statistics(tmp_path / "ref.npz")
    assert loaded[2] == 100
    value = frechet_distance(*loaded[:2], *metric.statistics(real=False))
    assert value == pytest.approx(float(metric.compute()), rel=1e-9)


def test_warns_below_twice_as_many_samples_as_features() -> None:
    x, y = gaussian(20, 10, 18), gaussian(19, 10, 19)
    with pytest.warns(UserWarning, match="biased upwards"):
        filled(x, y).compute()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled(x, gaussian(20, 10, 20)).compute()


def test_features_of_another_width_or_not_finite_are_refused() -> None:
    metric = FrechetDistance(3)
    for bad in (torch.zeros(4, 2), torch.tensor([[0.0, 1.0, float("nan")]])):
        with pytest.raises(UserError, match="Expected"):
            metric.update(bad, real=True)
    with pytest.raises(UserError, match="same features"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))


def test_clip_score_in_closed_form() -> None:
    image = torch.tensor([[1.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
    text = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(clip_score(image, text), [100, 100 / 2**0.5, -100])


@pytest.mark.parametrize("sign", [1, -1])
def test_clip_score_agrees_with_torchmetrics(sign: int) -> None:
    images, texts = gaussian(8, 16, 21).float(), gaussian(8, 16, 22).float()
    if np.sign(clip_score(images, texts).mean()) != sign:
        images = -images

    class Stub(nn.Module):
        config = SimpleNamespace()
        get_image_features = staticmethod(lambda _: images)
        get_text_features = staticmethod(lambda *_: texts)

    blank = {"pixel_values": images, "input_ids": texts, "attention_mask": texts}
    metric = CLIPScore(lambda: (Stub(), lambda **_: blank))
    metric.update(torch.zeros(8, 3, 4, 4), ["x"] * 8)
    expected = float(metric.compute())
    assert max(clip_score(images, texts).mean(), 0) == pytest.approx(expected, abs=1e-4)
    streamed = ClipScore()
    for rows in (slice(5), slice(5, None)):
        streamed.update(images[rows], texts[rows])
    assert max(float(streamed.compute()["mean"]), 0) == pytest.approx(expected, abs=1e-4)
