"""Scores of single images, and of the images of one prompt."""

import numpy as np
import pytest
from PIL import Image

from eval.metrics.pixels import clipping, diversity, saturation

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 12, 10, 3), np.uint8)


def test_saturation_and_clipping_of_known_images() -> None:
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0] = [[(100, 50, 50), (255, 9, 9)], [(7, 7, 7), (0, 1, 2)]]
    assert saturation(image)[0] == pytest.approx((0.5 + 246 / 255 + 0 + 1) / 4)
    assert clipping(image)[0] == 0.5
    assert saturation(np.zeros_like(image))[0] == 0


def test_saturation_is_that_of_hsv() -> None:
    ours = saturation(IMAGES)
    pil = [np.asarray(Image.fromarray(x).convert("HSV"))[..., 1].mean() / 255 for x in IMAGES]
    assert ours == pytest.approx(pil, abs=1 / 255)


def test_diversity_ignores_length_and_needs_company() -> None:
    x = RNG.normal(size=(6, 4))
    found = diversity(x * RNG.uniform(1, 9, (6, 1)), np.array([0, 0, 0, 1, 1, 2]))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert found[0] == pytest.approx(1 - (unit[0] @ unit[1] + unit[0] @ unit[2]) / 2)
    assert found[3] == found[4] and np.isnan(found[5])
