"""Grids: tiles where they belong, labels that stay in their place."""

from __future__ import annotations

import numpy as np
from PIL import Image

from guidance.utils.images import _font, _wrap, labelled_grid

COLOURS = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)], [(0, 200, 200), (90, 90, 90)]]
LONG = "a very long prompt about " + "many things and " * 60


def solid(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_every_image_is_in_its_row_and_column() -> None:
    images = [[solid(c) for c in row] for row in COLOURS]
    grid = np.asarray(labelled_grid(images, ["one", LONG, ""], ["unguided", "scale 1"], notes=["seed 0"]))
    tops, lefts = [], []
    for r, row in enumerate(COLOURS):
        for c, colour in enumerate(row):
            ys, xs = np.nonzero((grid == colour).all(-1))
            assert (np.ptp(ys), np.ptp(xs), len(ys)) == (159, 159, 160 * 160), (r, c)
            tops.append(ys.min())
            lefts.append(xs.min())
    assert tops == sorted(tops) and len(set(tops)) == 3 and len(set(lefts)) == 2
    assert (grid[:, : lefts[0] - 6][:, :12] == 255).all()  # the label stays inside the margin
    labels = [(grid[t : t + 160, : lefts[0]] < 128).any() for t in tops[::2]]
    assert labels == [True, True, False]  # the third row has neither label nor note


def test_other_sizes_and_missing_images() -> None:
    grid = np.asarray(labelled_grid([[solid((200, 0, 0), (512, 256)), None]], ["x"], ["a", "b"]))
    ys, xs = np.nonzero((grid == (200, 0, 0)).all(-1))
    assert (np.ptp(ys) + 1, np.ptp(xs) + 1) == (128, 256)
    small = labelled_grid([[solid((200, 0, 0))]], ["x"], ["a"], tile=64)
    assert small.width < grid.shape[1]


def test_wrapping_keeps_every_letter_until_it_must_cut() -> None:
    font = _font(14)
    text = "a red balloon over the sea " + "x" * 90
    lines = _wrap(text, font, 210, 99)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(0 < font.getlength(line) <= 210 for line in lines)
    cut = _wrap(LONG, font, 210, 3)
    assert len(cut) == 3 and cut[-1].endswith("…") and all(font.getlength(line) <= 210 for line in cut)
