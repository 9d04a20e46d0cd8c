"""Draw the objects of the testbed world from signed distances."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

PAINT: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "yellow": (0.99, 0.86, 0.10),
    "green": (0.08, 0.68, 0.16),
    "blue": (0.10, 0.28, 0.94),
    "purple": (0.62, 0.14, 0.78),
    "white": (0.98, 0.98, 0.98),
}

WOOD, DARK, METAL = (0.42, 0.27, 0.15), (0.13, 0.12, 0.15), (0.62, 0.64, 0.68)


class Canvas:
    """An RGB picture with pixel coordinates ``x, y`` in 0..64 (rotated by the camera's tilt)."""

    def __init__(self, size: int, tilt: float = 0.0) -> None:
        c = (np.arange(size, dtype=np.float32) + 0.5) * (64.0 / size)
        x, y = np.meshgrid(c, c)
        a = np.float32(np.deg2rad(tilt))
        self.x = 32 + (x - 32) * np.cos(a) + (y - 32) * np.sin(a)
        self.y = 32 - (x - 32) * np.sin(a) + (y - 32) * np.cos(a)
        self.pixel = 64.0 / size
        self.rgb: Array = np.zeros((size, size, 3), np.float32)

    def paint(self, colour: Array | Sequence[float], alpha: Array) -> None:
        """Blend a colour with opacity ``alpha`` (0..1) per pixel."""
        self.rgb += alpha[..., None] * (np.asarray(colour, np.float32) - self.rgb)

    def fill(self, colour: Array | Sequence[float], distance: Array, opacity: float = 1.0) -> None:
        """Fill where the signed distance (pixels) is negative, with an anti-aliased edge."""
        self.paint(colour, opacity * np.clip(0.5 - distance / self.pixel, 0, 1))


def box(x: Array, y: Array, x0: float, y0: float, x1: float, y1: float) -> Array:
    """Return the distance to the axis-aligned box ``[x0, x1] x [y0, y1]``."""
    return np.maximum(np.maximum(x0 - x, x - x1), np.maximum(y0 - y, y - y1))


def circle(x: Array, y: Array, cx: float, cy: float, r: float) -> Array:
    """Return the distance to a disc."""
    return np.hypot(x - cx, y - cy) - r


def polygon(x: Array, y: Array, points: Sequence[tuple[float, float]]) -> Array:
    """Return the distance to a convex polygon, given clockwise on the screen (y down): the largest edge distance."""
    d = np.full_like(x, -np.inf)
    for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
        nx, ny = by - ay, ax - bx
        d = np.maximum(d, ((x - ax) * nx + (y - ay) * ny) / np.hypot(nx, ny))
    return d


Part = tuple[str | tuple[float, float, float], float, Array]  # paint name or "own", brightness, distance


def _house(x: Array, y: Array) -> list[Part]:
    return [
        ("own", 1.0, box(x, y, -9, -11, 9, 0)),
        ("own", 0.62, polygon(x, y, [(-11.5, -10.5), (0, -20), (11.5, -10.5)])),
        (DARK, 1.0, box(x, y, -2, -6.5, 2, 0)),
        ((1.0, 0.93, 0.60), 1.0, np.minimum(box(x, y, -7, -8, -4, -5), box(x, y, 4, -8, 7, -5))),
    ]


def _tree(x: Array, y: Array) -> list[Part]:
    crown = np.minimum(circle(x, y, -4.5, -11.5, 5.5), circle(x, y, 4.5, -11.5, 5.5))
    crown = np.minimum(crown, circle(x, y, 0, -16.5, 6))
    return [
        (WOOD, 1.0, box(x, y, -1.6, -9, 1.6, 0)),
        ("own", 0.92, crown),
        ("own", 1.12, circle(x, y, -1.5, -16.5, 3.2)),
    ]


def _boat(x: Array, y: Array) -> list[Part]:
    return [
        (WOOD, 0.9, box(x, y, -0.6, -19, 0.6, -3)),
        ("own", 1.0, polygon(x, y, [(1.2, -18.5), (9.5, -5.5), (1.2, -5.5)])),
        ("own", 0.80, polygon(x, y, [(-1.2, -16), (-1.2, -5.5), (-8, -5.5)])),
        (WOOD, 1.15, polygon(x, y, [(-11, -4.5), (11, -4.5), (7, 1), (-7, 1)])),
    ]


def _balloon(x: Array, y: Array) -> list[Part]:
    envelope = np.hypot(x, (y + 3) * 0.9) - 9.5
    stripe = np.maximum(envelope, np.abs(x) - 2.8)
    cone = polygon(x, y, [(-6.8, 4), (6.8, 4), (2.0, 10), (-2.0, 10)])
    return [
        ("own", 0.85, np.minimum(envelope, cone)),
        ("own", 1.12, stripe),
        (WOOD, 1.0, box(x, y, -2.2, 11.5, 2.2, 15)),
    ]


def _tent(x: Array, y: Array) -> list[Part]:
    return [
        ("own", 1.0, polygon(x, y, [(0, -13), (12.5, 0), (-12.5, 0)])),
        ("own", 0.62, polygon(x, y, [(0, -13), (12.5, 0), (4.5, 0)])),
        (DARK, 1.0, polygon(x, y, [(0, -8.5), (3.2, 0), (-3.2, 0)])),
    ]


def _tower(x: Array, y: Array) -> list[Part]:
    teeth = np.minimum(box(x, y, -6, -24.5, -3.2, -20), box(x, y, 3.2, -24.5, 6, -20))
    teeth = np.minimum(teeth, box(x, y, -1.4, -24.5, 1.4, -20))
    return [
        ("own", 0.95, polygon(x, y, [(-4.2, -20), (4.2, -20), (5, 0), (-5, 0)])),
        ("own", 1.08, np.minimum(teeth, box(x, y, -6, -21.5, 6, -18.5))),
        (DARK, 1.0, np.minimum(box(x, y, -1.2, -15, 1.2, -11), box(x, y, -1.6, -5, 1.6, 0))),
    ]


def _kite(x: Array, y: Array) -> list[Part]:
    tail = np.maximum(np.abs(x - 1.6 * np.sin((y - 9) * 0.75)) - 0.55, np.maximum(9 - y, y - 19))
    return [
        ("own", 0.8, tail),
        ("own", 1.05, polygon(x, y, [(0, -11), (8, -2.5), (0, 10)])),
        ("own", 0.72, polygon(x, y, [(0, -11), (0, 10), (-8, -2.5)])),
    ]


def _car(x: Array, y: Array) -> list[Part]:
    cabin = polygon(x, y, [(-4.5, -10), (4, -10), (7, -5), (-7, -5)])
    wheels = np.minimum(circle(x, y, -6.5, -1.3, 2.7), circle(x, y, 6.5, -1.3, 2.7))
    hubs = np.minimum(circle(x, y, -6.5, -1.3, 1.1), circle(x, y, 6.5, -1.3, 1.1))
    return [
        ("own", 0.9, cabin),
        ((0.75, 0.88, 0.96), 1.0, polygon(x, y, [(-3.6, -9), (3.2, -9), (5.2, -5.6), (-5.4, -5.6)])),
        ("own", 1.0, box(x, y, -12, -5.8, 12, -1) - 0.6),
        (DARK, 1.0, wheels),
        (METAL, 1.0, hubs),
    ]


SHAPES: dict[str, Callable[[Array, Array], list[Part]]] = {
    "house": _house,
    "tree": _tree,
    "boat": _boat,
    "balloon": _balloon,
    "tent": _tent,
    "tower": _tower,
    "kite": _kite,
    "car": _car,
}


def draw_object(
    canvas: Canvas, name: str, colour: str, x: float, y: float, scale: float, lamp: Array, haze: Array, air: float
) -> None:
    """Draw an object with its foot (or centre, when it flies) at ``x, y``.

    Args:
        canvas: Canvas to draw on.
        name: Key of :data:`SHAPES`.
        colour: Key of :data:`PAINT`.
        x, y: Position in canvas pixels.
        scale: 1 is about 20 pixels tall.
        lamp: Light on the object, RGB factors.
        haze, air: Colour of the air before the object and its opacity 0..1.
    """
    u, v = (canvas.x - x) / scale, (canvas.y - y) / scale
    for paint, brightness, distance in SHAPES[name](u, v):
        rgb = np.array(PAINT[colour] if paint == "own" else paint, np.float32) * brightness
        rgb = np.clip(rgb, 0, 1) * lamp
        canvas.fill(rgb + air * (haze - rgb), distance * scale)
