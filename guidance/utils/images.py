"""Convert images to RGB and to squares of a model's size; lay them out in labelled grids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from guidance.utils.errors import UserError

#: Suffixes of image files.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

PAPER, INK, GREY, EMPTY = "#ffffff", "#1c1e21", "#7a8087", "#eef0f2"

_GAP, _MARGIN, _LABEL = 6, 18, 210


def labelled_grid(
    images: Sequence[Sequence[Image.Image | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    notes: Sequence[str] = (),
    tile: int | None = None,
) -> Image.Image:
    """Lay images out in a grid, with labels to the left of rows and above columns.

    Args:
        images: One list per row; None leaves a tile empty.  Images are scaled to fit the tile.
        rows: Label of each row; wrapped, and cut with an ellipsis where it is longer than the tile is high.
        columns: Label of each column.
        notes: Small grey lines under the rows' labels, for example seeds.
        tile: Side of a tile in pixels; None takes 160 for small images and 256 for others.

    Returns:
        The grid, RGB.
    """
    shown = [image for row in images for image in row if image is not None]
    if not shown:
        raise UserError("Expected at least one image for the grid, got none; sample some first.")
    assert len(rows) == len(images) and all(len(row) == len(columns) for row in images)
    if tile is None:
        tile = 160 if max(max(image.size) for image in shown) <= 160 else 256
    header = 2 * _GAP + _height(_font(15, bold=True)) * max(
        len(_wrap(name, _font(15, bold=True), tile, 3)) for name in columns
    )
    left, top = _MARGIN + _LABEL + 2 * _GAP, _MARGIN + header
    width = left + len(columns) * (tile + _GAP) - _GAP + _MARGIN
    height = top + len(images) * (tile + _GAP) - _GAP + _MARGIN
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    for c, name in enumerate(columns):
        _centred(draw, name, left + c * (tile + _GAP), _MARGIN, tile, header - _GAP)
    for r, row in enumerate(images):
        y = top + r * (tile + _GAP)
        _label(draw, rows[r], notes[r] if r < len(notes) else "", y, tile)
        for c, image in enumerate(row):
            _place(page, image, left + c * (tile + _GAP), y, tile)
    return page


def _place(page: Image.Image, image: Image.Image | None, x: int, y: int, tile: int) -> None:
    if image is None:
        ImageDraw.Draw(page).rectangle((x, y, x + tile - 1, y + tile - 1), fill=EMPTY)
        return
    factor = tile / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    scaled = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    page.paste(scaled, (x + (tile - size[0]) // 2, y + (tile - size[1]) // 2))


def _label(draw: ImageDraw.ImageDraw, text: str, note: str, y: int, tile: int) -> None:
    """Write a row's label and note, right-aligned and vertically centred on the tiles."""
    font, small = _font(14), _font(11)
    below = _height(small) + 4 if note else 0
    lines = _wrap(text, font, _LABEL, max(1, (tile - below) // _height(font)))
    y += (tile - len(lines) * _height(font) - below) // 2
    for line in lines:
        draw.text((_MARGIN + _LABEL, y), line, font=font, fill=INK, anchor="ra")
        y += _height(font)
    if note:
        draw.text((_MARGIN + _LABEL, y + 4), note, font=small, fill=GREY, anchor="ra")


def _centred(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, width: int, height: int) -> None:
    font = _font(15, bold=True)
    lines = _wrap(text, font, width, 3)
    y += height - len(lines) * _height(font)  # the last line stands right above the column
    for line in lines:
        draw.text((x + width // 2, y), line, font=font, fill=INK, anchor="ma")
        y += _height(font)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Break text into lines that fit `width`, within words where a word alone is too long."""
    lines = [""]
    for word in text.split() or [""]:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "…"]
    return lines


def _height(font: ImageFont.FreeTypeFont) -> int:
    ascent, descent = font.getmetrics()
    return int(ascent + descent)


@functools.cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which matplotlib ships: the same on every machine, with Greek, Cyrillic and symbols."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def fit_image(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resize the shorter side and crop the centre.

    Args:
        image: Any PIL mode; see :func:`to_rgb`.
        size: Height and width in pixels; an image of this size is left as it is.

    Returns:
        RGB, (size, size, 3).
    """
    rgb = to_rgb(image)
    if rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb, dtype=np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB: upright by EXIF, transparency on white, 16-bit grey scaled to 8.

    >>> to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)
    >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
    (255, 255, 255)
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip these at 255
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if values.max(initial=0) > 255 else 255
        image = Image.fromarray(np.clip(values * (255 / top), 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)
    return image.convert("RGB")


def to_float(images: NDArray[np.uint8], device: torch.device | str = "cpu") -> Float[Tensor, "b 3 h w"]:
    """Convert uint8 RGB images (b, h, w, 3) to floats in -1..1, channels first."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def open_images(images: Any) -> list[Image.Image]:
    """Return one or several images, or paths of them, as RGB images; None as an empty list.

    Raises:
        UserError: If there is no file at a path.
    """
    if images is None:
        return []
    opened = []
    for image in [images] if isinstance(images, str | Path | Image.Image) else images:
        if isinstance(image, str | Path) and not Path(image).is_file():
            raise UserError(f"Expected an image file at '{image}', found none; check the path.")
        opened.append(to_rgb(Image.open(image) if isinstance(image, str | Path) else image))
    return opened
