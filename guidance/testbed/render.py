"""Draw a :class:`~guidance.testbed.scenes.Scene` as a 64x64 RGB image, anti-aliased by signed distances.

Everything is drawn back to front with coverage masks ``clip(0.5 - d, 0, 1)``, ``d`` a signed distance in pixels.
Lengths are in pixels at 64x64 and scale with ``size``.  Colours are display RGB in 0..1.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from guidance.testbed.scenes import FLYING, Scene
from guidance.testbed.shapes import Canvas, draw_object

Array = NDArray[np.floating]

#: time -> (zenith, horizon, light on things, sun or moon colour, height of the sun or moon above the horizon)
SKIES: dict[str, tuple[tuple[float, ...], ...]] = {
    "dawn": ((0.53, 0.68, 0.90), (1.00, 0.82, 0.76), (0.95, 0.88, 0.88), (1.00, 0.95, 0.80), (7.0,)),
    "noon": ((0.16, 0.46, 0.88), (0.70, 0.87, 0.98), (1.00, 1.00, 0.98), (1.00, 0.98, 0.72), (26.0,)),
    "dusk": ((0.26, 0.14, 0.42), (1.00, 0.50, 0.18), (0.86, 0.66, 0.62), (1.00, 0.72, 0.25), (5.0,)),
    "night": ((0.02, 0.03, 0.12), (0.10, 0.14, 0.34), (0.42, 0.46, 0.66), (0.96, 0.96, 0.86), (25.0,)),
}

#: terrain -> (far ridge, near ground)
GROUNDS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "hills": ((0.36, 0.62, 0.38), (0.26, 0.56, 0.20)),
    "sea": ((0.10, 0.42, 0.62), (0.86, 0.76, 0.54)),
    "desert": ((0.90, 0.68, 0.38), (0.84, 0.56, 0.26)),
    "snow": ((0.74, 0.82, 0.92), (0.95, 0.97, 1.00)),
    "mountains": ((0.45, 0.44, 0.52), (0.40, 0.46, 0.34)),
}


def render(scene: Scene, size: int = 64) -> NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: What to draw.
        size: Side of the image in pixels; 64 is the testbed's.

    Returns:
        RGB image, uint8, shape ``(size, size, 3)``.
    """
    rng = np.random.default_rng([scene.seed, 7])
    u = rng.random(64)  # a fixed number of layout draws, so that an edited scene keeps its layout
    canvas = Canvas(size, tilt=scene.tilt)
    horizon = 34.0 + 8.0 * u[0]
    light = np.array(SKIES[scene.time][2], np.float32)
    _sky(canvas, scene.time, horizon, u)
    depth = _ground(canvas, scene, horizon, light, u)
    haze_colour = 0.5 * canvas.rgb.mean((0, 1)) + 0.5 * np.array(SKIES[scene.time][1], np.float32)
    # the air stands in front of the land, more with distance; objects are near and keep most of their colour
    canvas.rgb += scene.haze * depth[..., None] * (haze_colour - canvas.rgb)
    _objects(canvas, scene, horizon, light, haze_colour, u)
    return _camera(canvas.rgb, scene, size)


def render_scenes(scenes: Iterable[Scene]) -> NDArray[np.uint8]:
    """Draw scenes at 64x64, uint8 (n, 64, 64, 3)."""
    return np.stack([render(scene) for scene in scenes])


def object_area(scene: Scene, size: int = 16, margin: float = 2.0) -> NDArray[np.float32]:
    """Return the area of the first named object: the fraction of each cell that its surroundings cover, 0..1.

    The square depends on the layout alone, not on the kind of object: a loss weighted by it favours no shape.

    Args:
        scene: Any scene.
        size: Cells a side; 16 is the testbed's latent size.
        margin: Pixels (at 64x64) around the extent of the largest object.

    Returns:
        Shape ``(size, size)``.
    """
    u = np.random.default_rng([scene.seed, 7]).random(64)
    x, y, scale = _place(scene, 34.0 + 8.0 * u[0], u)
    reach = 12.5 * scale + margin
    middle = y + (3.0 if scene.object in FLYING else -12.0) * scale
    canvas = Canvas(4 * size, tilt=scene.tilt)
    inside = (np.abs(canvas.x - x) < reach) & (np.abs(canvas.y - middle) < reach)
    return inside.reshape(size, 4, size, 4).mean((1, 3), dtype=np.float32)


def _sky(canvas: Canvas, time: str, horizon: float, u: Array) -> None:
    zenith, low, _, orb, (height,) = (np.array(c, np.float32) for c in SKIES[time])
    g = np.clip(canvas.y / horizon, 0, 1)[..., None] ** 1.3
    canvas.rgb[:] = zenith * (1 - g) + low * g
    ox, oy = 8 + 48 * u[1], horizon - height - 4 * u[2]
    r = 3.6 + 1.6 * u[3]
    distance = np.hypot(canvas.x - ox, canvas.y - oy)
    canvas.paint(orb, 0.45 * np.exp(-((distance / (2.6 * r)) ** 2)))  # glow
    disc = distance - r
    if time == "night":
        if u[4] < 0.5:  # a crescent
            disc = np.maximum(disc, r - np.hypot(canvas.x - ox - 0.55 * r, canvas.y - oy + 0.3 * r))
        for i in range(9):
            sx, sy = 64 * u[5 + i], horizon * 0.8 * u[14 + i]
            canvas.paint(orb, 0.9 * np.exp(-((canvas.x - sx) ** 2 + (canvas.y - sy) ** 2) / 0.5))
    canvas.fill(orb, disc)
    tone = 0.35 * zenith + 0.65 * np.clip(low + 0.1, 0, 1)
    for i in range(int(u[23] * 3)):  # none to two clouds, three puffs each
        cx, cy = 64 * u[24 + i], 5 + 0.4 * horizon * u[27 + i]
        for dx, dy, w in ((-5, 0.6, 4.5), (0, -0.8, 5.5), (5, 0.8, 4.0)):
            d = np.hypot((canvas.x - cx - dx) / 1.5, canvas.y - cy - dy) - 0.55 * w
            canvas.paint(tone, 0.75 * np.clip(0.5 - d / 2.0, 0, 1))


def _ridge(canvas: Canvas, base: float, height: float, frequency: float, phases: Array, sharp: float = 0.0) -> Array:
    """Return a skyline ``y(x)`` as a sum of three sines, folded to peaks when ``sharp`` is near 1."""
    y = np.zeros_like(canvas.x)
    for k, phase in enumerate(phases):
        wave = np.sin(2 * np.pi * (frequency * (k + 1) * canvas.x / 64 + phase))
        y += ((1 - sharp) * wave + sharp * (1 - 2 * np.abs(wave))) / (k + 1)
    return base - height * y


def _ground(canvas: Canvas, scene: Scene, horizon: float, light: Array, u: Array) -> Array:
    """Paint the land and return how far away each pixel is, 0 (near) .. 1 (sky)."""
    far, near = (np.array(c, np.float32) * light for c in GROUNDS[scene.terrain])
    depth = np.ones_like(canvas.x) * 0.9
    peaks = scene.terrain in ("mountains", "snow")
    if scene.terrain == "sea":
        line, shore = np.full_like(canvas.x, horizon), _ridge(canvas, horizon + 17, 1.2, 0.7, u[30:33])
        ripple = 0.10 * np.sin(canvas.y * 1.9 + 1.3 * np.sin(canvas.x * 0.22 + 6 * u[33]))
        low = np.array(SKIES[scene.time][1], np.float32)
        fade = np.clip((canvas.y - horizon) / 20, 0, 1)[..., None]
        water = far * (0.55 + 0.45 * fade) + 0.35 * low * (1 - fade)
        canvas.fill(water * (1 + ripple[..., None]), line - canvas.y)
    else:
        height = {"hills": 3.0, "desert": 2.0, "snow": 5.0, "mountains": 8.5}[scene.terrain]
        line = _ridge(canvas, horizon - (5 if peaks else 1), height, 0.9, u[30:33], 0.9 if peaks else 0.0)
        canvas.fill(far, line - canvas.y)
        if scene.terrain == "mountains":  # snow caps
            cap = np.maximum(line - canvas.y, canvas.y - (horizon - 8 + 1.5 * np.sin(canvas.x * 0.9 + 6 * u[33])))
            canvas.fill(np.array((0.95, 0.96, 1.0), np.float32) * light, cap)
        shore = _ridge(canvas, horizon + 6, 1.8, 0.8, u[34:37])
    depth = np.where(canvas.y > line, 0.75, depth)
    shade = 1.06 - 0.30 * np.clip((canvas.y - shore) / 30, 0, 1)[..., None]
    canvas.fill(near * shade, shore - canvas.y)
    return np.where(canvas.y > shore, 0.55 - 0.5 * np.clip((canvas.y - shore) / 22, 0, 1), depth).astype(np.float32)


def _objects(canvas: Canvas, scene: Scene, horizon: float, light: Array, haze: Array, u: Array) -> None:
    x, foot, scale = _place(scene, horizon, u)
    # the object's own light: coloured by the hour, but never so dark that its colour is lost
    lamp = 0.52 + 0.48 * light
    air = 0.35 * scene.haze
    if scene.second_object:
        other = x + (22 + 4 * u[42]) * (-1 if x > 32 else 1)
        y = _stand(scene.second_object, scene.terrain, horizon, u[43])
        draw_object(canvas, scene.second_object, scene.second_colour, other, y, 0.55 * scale, lamp, haze, air)
    draw_object(canvas, scene.object, scene.colour, x, foot, scale, lamp, haze, air)


def _place(scene: Scene, horizon: float, u: Array) -> tuple[float, float, float]:
    """Return the first object's x, the y of its foot (or centre, when it flies), and its scale."""
    side = {"left": -1.0, "right": 1.0}.get(scene.place, 0.0)
    x = 32 + (side * (12 + 5 * u[40]) if side else (u[40] - 0.5) * 26)
    return x, _stand(scene.object, scene.terrain, horizon, u[44]), 0.9 + 0.25 * u[41]


def _stand(obj: str, terrain: str, horizon: float, u: float) -> float:
    """Return the y of an object's foot (or centre, when it flies)."""
    if obj in FLYING:
        return horizon - 17 + 6 * u
    if terrain == "sea":
        return horizon + (9 + 4 * u if obj == "boat" else 20 + 1.5 * u)
    return horizon + 13 + 5 * u


def _camera(rgb: Array, scene: Scene, size: int) -> NDArray[np.uint8]:
    """Apply saturation, exposure and defocus, in this order; convert to 8 bits."""
    grey = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    rgb = grey[..., None] + scene.saturation * (rgb - grey[..., None])
    rgb = np.clip(rgb, 0, 1) * 2.0**scene.exposure
    if scene.defocus > 0:
        sigma = scene.defocus * size / 64
        rgb = gaussian_filter(rgb, (sigma, sigma, 0), mode="nearest", truncate=3.0)
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)
