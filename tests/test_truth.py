"""The truth score: formulas in closed form, direction on rendered scenes, votes drawn from it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.ndimage import laplace
from scipy.stats import spearmanr

from guidance.testbed import truth
from guidance.testbed.render import render
from guidance.testbed.scenes import HIDDEN, sample_scene
from guidance.testbed.truth import rating, truth_score, truth_terms


@pytest.fixture(scope="module")
def world() -> tuple[list, np.ndarray]:
    scenes = [sample_scene("test", i) for i in range(500)]
    return scenes, np.stack([render(s) for s in scenes])


def solid(*rgb: int, size: int = 16) -> np.ndarray:
    return np.broadcast_to(np.uint8(rgb), (1, size, size, 3)).copy()


def test_colourfulness_of_a_solid_colour_is_its_distance_from_grey() -> None:
    r, g, b = 200, 80, 30
    expected = 0.3 * np.hypot(r - g, (r + g) / 2 - b)
    assert truth_terms(solid(r, g, b))["colourfulness"][0] == pytest.approx(expected, rel=1e-6)
    assert truth_terms(solid(77, 77, 77))["colourfulness"][0] == 0


def test_colourfulness_of_two_halves() -> None:
    image = solid(255, 0, 0)
    image[:, :, 8:] = (0, 255, 0)  # rg = +-255, yb = 127.5 everywhere
    expected = 255 + 0.3 * 127.5
    assert truth_terms(image)["colourfulness"][0] == pytest.approx(expected, rel=1e-6)


def test_exposure_is_one_at_mid_grey_and_mertens_elsewhere() -> None:
    value = np.exp(-((51 / 255 - 0.5) ** 2) / (2 * 0.2**2))
    assert truth_terms(solid(51, 51, 51))["exposure"][0] == pytest.approx(value, rel=1e-6)
    assert truth_terms(solid(128, 127, 128))["exposure"][0] == pytest.approx(1, abs=1e-4)


def test_contrast_of_a_checkerboard_is_half() -> None:
    image = solid(0, 0, 0)
    image[:, ::2, ::2] = image[:, 1::2, 1::2] = 255
    assert truth_terms(image)["contrast"][0] == pytest.approx(0.5, rel=1e-6)


def test_sharpness_agrees_with_scipy(world) -> None:
    images = world[1][:3]
    luma = images @ np.array([0.299, 0.587, 0.114]) / 255
    expected = [np.log(laplace(y)[1:-1, 1:-1].var() + 1e-6) for y in luma]
    np.testing.assert_allclose(truth_terms(images)["sharpness"], expected, rtol=1e-4)


def test_standardised_on_scenes_of_the_training_split() -> None:
    score = truth_score(np.stack([render(sample_scene("train", i)) for i in range(400)]))
    assert abs(score.mean()) < 0.15  # three standard errors
    assert 0.9 < score.std() < 1.1


@pytest.mark.parametrize(
    ("factor", "low", "high"), [("haze", -0.5, -0.15), ("defocus", -0.6, -0.25), ("saturation", 0.15, 0.5)]
)
def test_rank_correlation_with_the_hidden_factors(world, factor: str, low: float, high: float) -> None:
    scenes, images = world
    assert low < spearmanr(truth_score(images), [getattr(s, factor) for s in scenes])[0] < high


def test_rank_correlation_with_the_exposure_error(world) -> None:
    scenes, images = world
    assert spearmanr(truth_score(images), [abs(s.exposure) for s in scenes])[0] < -0.1


@pytest.mark.parametrize(("factor", "sign"), [("haze", -1), ("defocus", -1), ("saturation", 1)])
def test_monotone_within_a_scene(factor: str, sign: int) -> None:
    levels = np.linspace(*HIDDEN[factor], 4)
    falls = []
    for index in range(12):
        scene = sample_scene("train", index)
        images = [render(dataclasses.replace(scene, **{factor: float(v)})) for v in levels]
        falls.append(sign * (truth_score(np.stack(images))[[0, -1]] @ [-1, 1]) > 0)
    assert all(falls)


def test_no_term_dominates(world) -> None:
    terms, score = truth_terms(world[1]), truth_score(world[1])
    assert sum(truth.WEIGHTS.values()) == pytest.approx(1)
    shares = {
        n: w * np.cov((terms[n] - truth.MEAN[n]) / truth.SD[n] / truth.SCALE, score)[0, 1] / score.var(ddof=1)
        for n, w in truth.WEIGHTS.items()
    }
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
    assert all(0.05 < share < 0.5 for share in shares.values()), shares


def test_each_image_is_scored_alone(world) -> None:
    images = world[1][:200]
    whole = truth_score(images)
    assert whole.dtype == np.float64
    np.testing.assert_allclose(whole[150:], truth_score(images[150:]), rtol=0, atol=1e-5)
    assert truth_score(images[:0]).shape == (0,)


def test_other_sizes_and_flat_images_give_numbers() -> None:
    assert np.isfinite(truth_score(np.zeros((2, 128, 96, 3), np.uint8))).all()
    assert np.isfinite(truth_score(np.full((1, 3, 3, 3), 255, np.uint8))).all()


def test_votes_are_as_noisy_as_documented() -> None:
    rng = np.random.default_rng(0)
    score = rng.standard_normal(40_000)
    votes = rating(score, rng)
    assert votes.dtype.kind == "i"
    assert sorted(set(votes.tolist())) == list(range(1, 11))
    assert votes.mean() == pytest.approx(5.65, abs=0.1)
    assert votes.std() == pytest.approx(2.3, abs=0.1)
    assert np.corrcoef(votes, score)[0, 1] == pytest.approx(0.55, abs=0.02)


def test_votes_follow_the_generator() -> None:
    score = np.linspace(-3, 3, 50)
    first, again, other = (rating(score, np.random.default_rng(s)) for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert rating(100.0, np.random.default_rng(0)) == 10
    assert rating(-100.0, np.random.default_rng(0)) == 1
