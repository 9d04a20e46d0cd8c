"""Image grids of the report: choice of pairs, and their thumbnails as data URIs."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.comparison.report.text import metric_decimals, number
from eval.comparison.results import ArmSummary, Comparison, ImageMetric

_BUDGET = 3_000_000  # characters for all images of a report, which must stay below 5 MB

_SMALL = 96  # pixels: images up to this side are embedded losslessly and shown enlarged

_STEPS = ((192, 82), (192, 65), (160, 55), (128, 45), (96, 35), (64, 25))  # side and quality, tried in turn

_SHOWN_METRICS = 4

Key = tuple[Any, Any]  # prompt id and seed


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of a grid, or a placeholder.

    Attributes:
        arm: Its arm.
        uri: Data URI; "" if the file cannot be read.
        file: Name of the file, for the placeholder.
        pixelated: Enlarge it without smoothing.
        values: Lines such as "CLIP score 24.3 (+0.2)".
    """

    arm: str
    uri: str
    file: str
    pixelated: bool
    values: list[str]


@dataclasses.dataclass(frozen=True)
class GridRow:
    """One prompt and seed: a picture for each arm."""

    prompt: str
    seed: str
    change: str
    pictures: list[Picture]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rows chosen by one rule, and a sentence that states it."""

    title: str
    chosen: str
    rows: list[GridRow]


def image_grids(
    comparison: Comparison, metric: ImageMetric | None, arm: ArmSummary | None, *, rows: int = 6, seed: int = 0
) -> list[Grid]:
    """Choose the best, the worst and random pairs, and read their images.

    Args:
        comparison: The comparison.
        metric: Metric whose change orders the pairs; None shows random pairs only.
        arm: Arm whose change it is; None shows random pairs only.
        rows: Maximum of each grid.
        seed: Of the random pairs.
    """
    images = {(row.get("arm"), row.get("prompt_id"), row.get("seed")): row for row in comparison.rows}
    keys: list[Key] = list(dict.fromkeys((row.get("prompt_id"), row.get("seed")) for row in comparison.rows))
    changes = _changes(images, keys, comparison.baseline, metric, arm)
    choices = _choose(keys, changes, metric, arm, rows, seed)
    shown = sum(len(chosen) for _, _, chosen in choices) * len(comparison.arms)
    return [
        Grid(title, text, [_row(comparison, images, key, metric, changes.get(key), shown) for key in chosen])
        for title, text, chosen in choices
    ]


def _changes(
    images: Mapping[Any, Mapping[str, Any]],
    keys: Sequence[Key],
    baseline: str,
    metric: ImageMetric | None,
    arm: ArmSummary | None,
) -> dict[Key, float]:
    """Return the change of the metric for each pair with a value on both sides."""
    if metric is None or arm is None:
        return {}
    found = {}
    for key in keys:
        before = finite(images.get((baseline, *key), {}).get(metric.key))
        after = finite(images.get((arm.name, *key), {}).get(metric.key))
        if before is not None and after is not None:
            found[key] = after - before
    return found


def _choose(
    keys: Sequence[Key],
    changes: Mapping[Key, float],
    metric: ImageMetric | None,
    arm: ArmSummary | None,
    rows: int,
    seed: int,
) -> list[tuple[str, str, list[Key]]]:
    """Return title, sentence and pairs of each grid; no pair is among both the best and the worst."""
    choices: list[tuple[str, str, list[Key]]] = []
    if metric is not None and arm is not None and len(changes) > 1:
        sign = -1 if metric.better == "lower" else 1
        order = sorted(changes, key=lambda key: -sign * changes[key])  # stable: equal changes keep their order
        n = min(rows, len(order) // 2)
        by = f"by the change of {metric.title} from the baseline to “{arm.name}”"
        first, last = ("Best", "Worst") if metric.better else ("Largest increase", "Largest decrease")
        for title, chosen in ((first, order[:n]), (last, order[: -n - 1 : -1])):
            text = f"{n} of {len(changes)} pairs, chosen {by}: extremes, not typical pairs."
            choices.append((title, text, chosen))
    if keys:
        n = min(rows, len(keys))
        drawn = sorted(np.random.default_rng(seed).choice(len(keys), n, replace=False).tolist())
        text = f"{n} of {len(keys)} pairs, drawn at random (seed {seed}) without a look at any value."
        choices.append(("Random", text, [keys[i] for i in drawn]))
    return choices


def _row(
    comparison: Comparison,
    images: Mapping[Any, Mapping[str, Any]],
    key: Key,
    metric: ImageMetric | None,
    change: float | None,
    shown: int,
) -> GridRow:
    base = images.get((comparison.baseline, *key), {})
    pictures = []
    for arm in comparison.arms:
        row = images.get((arm.name, *key), {})
        path = row.get("image")
        uri, small = thumbnail(path, _BUDGET // max(shown, 1)) if path else ("", False)
        file = Path(path).name if path else "no image"
        values = _values(comparison, metric, row, None if arm.name == comparison.baseline else base)
        pictures.append(Picture(arm.name, uri, file, small, values))
    text = ""
    if metric is not None and change is not None:
        text = f"{_short(metric)} {number(change, _image_decimals(comparison, metric), signed=True)}"
    prompt = next((row["prompt"] for a in comparison.arms if (row := images.get((a.name, *key), {})).get("prompt")), "")
    return GridRow(str(prompt), str(key[1]), text, pictures)


def _values(
    comparison: Comparison, first: ImageMetric | None, row: Mapping[str, Any], base: Mapping[str, Any] | None
) -> list[str]:
    """Return a line for each metric of an image, with its change unless it is the baseline's."""
    metrics = sorted(comparison.image_metrics, key=lambda m: m != first)
    lines = []
    for metric in [m for m in metrics if m.key in row][:_SHOWN_METRICS]:
        digits = _image_decimals(comparison, metric)
        value, before = finite(row[metric.key]), finite(base.get(metric.key)) if base else None
        lines.append(f"{_short(metric)} {number(value, digits)}")
        if value is not None and before is not None:
            lines[-1] += f" ({number(value - before, digits, signed=True)})"
    return lines


def _image_decimals(comparison: Comparison, metric: ImageMetric) -> int:
    """Choose one decimal less than for means: single images spread more widely."""
    digits = metric_decimals(comparison, metric.key)
    return max(digits - 1, min(digits, 1))


def _short(metric: ImageMetric) -> str:
    return metric.title.split(" (")[0]


def finite(value: Any) -> float | None:
    """Return a value of a row as a float; None if it is missing or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def thumbnail(path: str | Path, limit: int) -> tuple[str, bool]:
    """Read an image as a data URI of at most 192 pixels a side.

    Args:
        path: The image file.
        limit: Maximum of characters; size and quality are lowered until the URI fits.

    Returns:
        The URI, "" if the file is missing, truncated or no image; and whether it is small, to be shown enlarged.
    """
    try:
        if not Path(path).is_file():
            return "", False
        with Image.open(path) as file:
            image = file.convert("RGB")
    # Pillow's errors for broken files; its PNG reader raises SyntaxError
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "", False
    small = max(image.size) <= _SMALL
    if small:
        uri = _encode(image, lossless=True)
        if len(uri) <= limit:
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
