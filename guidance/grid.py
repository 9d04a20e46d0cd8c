"""Labelled grids of images: one row a prompt, one column a method."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from guidance.errors import UserError

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
    """Lay images out in a grid, each row with its prompt at the left, each column with its name above.

    Args:
        images: One list per row; None leaves a tile empty.  Images are scaled to fit the tile.
        rows: Label of each row; wrapped, and cut with an ellipsis where it is longer than the tile is high.
        columns: Label of each column.
        notes: A small grey line under each row's label, for example the seed.
        tile: Side of a tile in pixels; None takes 160 for small images and 256 for others.

    Returns:
        The grid, RGB.

    Raises:
        UserError: If there is no image, or the labels do not fit the images.
    """
    shown = [image for row in images for image in row if image is not None]
    if not shown:
        raise UserError("Expected at least one image for the grid, got none; sample some first.")
    if len(rows) != len(images) or any(len(row) != len(columns) for row in images):
        raise UserError(
            f"Expected one label per row and column of the grid, got {len(rows)} and {len(columns)} for "
            f"{len(images)} rows of {sorted({len(row) for row in images})} images."
        )
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
    """A row's prompt and note, right-aligned to the tiles and centred on their height."""
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
    y += height - len(lines) * _height(font)  # names of one line stand right above their column
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
    """DejaVu Sans, which matplotlib ships: the same on every machine, with Greek, Cyrillic and signs."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
