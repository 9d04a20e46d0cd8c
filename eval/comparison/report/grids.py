"""Image grids of the report: choice of pairs, and their thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from eval.comparison.results import ArmSummary, Comparison, ImageMetric

BUDGET = 3_000_000  # characters for all images of a report, which must stay below 5 MB

_SMALL = 96  # pixels: images up to this side are embedded losslessly and shown enlarged

_STEPS = ((192, 82), (192, 65), (160, 55), (128, 45), (96, 35), (64, 25))  # side and quality, tried in turn

Rows = Mapping[str, Mapping[str, Any]]  # arm -> row of the comparison


class Grid(NamedTuple):
    """Pairs of one prompt and seed chosen by one rule, a sentence that states it, and the change of each."""

    title: str
    chosen: str
    pairs: list[tuple[Rows, float | None]]


def image_grids(
    comparison: Comparison, metric: ImageMetric | None, arm: ArmSummary | None, *, rows: int = 6, seed: int = 0
) -> list[Grid]:
    """Choose the best, the worst and random pairs; none is among both the best and the worst.

    Args:
        comparison: The comparison.
        metric: Metric whose change orders the pairs; None shows random pairs only.
        arm: Arm whose change it is; None shows random pairs only.
        rows: Maximum of each grid.
        seed: Of the random pairs.
    """
    found: dict[Any, dict[str, Mapping[str, Any]]] = {}
    for row in comparison.rows:
        found.setdefault((row.get("prompt_id"), row.get("seed")), {})[str(row.get("arm"))] = row
    pairs: list[Rows] = list(found.values())
    changes = [_change(pair, comparison.baseline, metric, arm) for pair in pairs]
    known = [(i, change) for i, change in enumerate(changes) if change is not None]
    choices: list[tuple[str, str, list[int]]] = []
    if metric is not None and arm is not None and len(known) > 1:
        sign = -1 if metric.better == "lower" else 1
        order = [i for i, change in sorted(known, key=lambda pair: -sign * pair[1])]  # stable
        n = min(rows, len(order) // 2)
        by = f"by the change of {metric.title} from the baseline to “{arm.name}”"
        text = f"{n} of {len(order)} pairs, chosen {by}: extremes, not typical pairs."
        first, last = ("Best", "Worst") if metric.better else ("Largest increase", "Largest decrease")
        choices += [(first, text, order[:n]), (last, text, order[: -n - 1 : -1])]
    if pairs:
        n = min(rows, len(pairs))
        drawn = sorted(np.random.default_rng(seed).choice(len(pairs), n, replace=False).tolist())
        text = f"{n} of {len(pairs)} pairs, drawn at random (seed {seed}) without a look at any value."
        choices.append(("Random", text, drawn))
    return [Grid(title, text, [(pairs[i], changes[i]) for i in chosen]) for title, text, chosen in choices]


def _change(pair: Rows, baseline: str, metric: ImageMetric | None, arm: ArmSummary | None) -> float | None:
    """Return the change of the metric from the baseline to the arm; None without a value on both sides."""
    if metric is None or arm is None:
        return None
    before, after = (finite(pair.get(name, {}).get(metric.key)) for name in (baseline, arm.name))
    return None if before is None or after is None else after - before


def finite(value: Any) -> float | None:
    """Return a value of a row as a float; None if it is missing or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def thumbnail(path: str | Path | None, limit: int) -> tuple[str, bool]:
    """Read an image as a data URI of at most 192 pixels a side.

    Args:
        path: The image file.
        limit: Maximum of characters; size and quality are lowered until the URI fits.

    Returns:
        The URI, "" if the file is missing, truncated or no image; and whether it is small, to be shown enlarged.
    """
    try:
        if not path or not Path(path).is_file():
            return "", False
        with Image.open(path) as file:
            image = file.convert("RGB")
    # Pillow's errors for broken files; its PNG reader raises SyntaxError
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "", False
    small = max(image.size) <= _SMALL
    if small and len(uri := _encode(image, lossless=True)) <= limit:
        return uri, True
    for side, quality in _STEPS:
        reduced = image.copy()
        reduced.thumbnail((side, side), Image.Resampling.LANCZOS)
        uri = _encode(reduced, quality=quality)
        if len(uri) <= limit:
            break
    return uri, small


def _encode(image: Image.Image, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=4, **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
