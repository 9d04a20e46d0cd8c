"""Plots of the report: trade-off curves and forest plots.

Besides its colour each series has its own marker and line style, for readers who cannot tell colours apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.comparison.image_metrics import IMAGE_METRICS
from eval.comparison.report.svg import INK, RULE, SERIES, SOFT, plain, svg_axes
from eval.comparison.report.text import is_plain_cfg
from eval.comparison.results import ArmSummary, Breakdown, Comparison, ImageMetric, SetMetric
from eval.comparison.set_metrics import SET_METRICS

Point = tuple[float, float]

_MARKERS, _LINES = "o^DvPX<", ("-", (0, (6, 2)), "-.")

_LABEL = 22  # letters in a line of a forest's labels

_CHARACTER = 5.0  # width of a letter of a point's label, in points

#: Places of a label around its point, in points, in order of preference.
_OFFSETS = tuple(zip((5, 5, -5, -5, 0, 0, 14, 14, -14, -14), (4, -10, 4, -10, 8, -14, 12, -18, 12, -18), strict=True))


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure: its SVG element and its caption."""

    svg: str
    caption: str


def series_styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Choose line and marker of each series; the baseline is a star, plain CFG a dashed grey square."""
    styles: dict[str, dict[str, Any]] = {}
    numbers = itertools.count()
    line: Any
    for arm in comparison.arms:
        if arm.series in styles:
            continue
        if arm.name == comparison.baseline:
            color, marker, size, line, width = INK, "*", 10.0, "none", 1.5
        elif is_plain_cfg(arm):
            color, marker, size, line, width = SOFT, "s", 4.5, (0, (2, 2)), 1.2
        else:
            i = next(numbers)
            color, marker, size, width = SERIES[i % len(SERIES)], _MARKERS[i % len(_MARKERS)], 5.5, 1.5
            line = _LINES[i // len(SERIES) % len(_LINES)]
        styles[arm.series] = {
            "color": color,
            "marker": marker,
            "markersize": size,
            "linestyle": line,
            "linewidth": width,
        }
    return styles


def legend(comparison: Comparison) -> list[Plot]:
    """Draw the line of each series, for the page to lay out."""
    entries = []
    for i, (series, style) in enumerate(series_styles(comparison).items()):
        with svg_axes(0.42, 0.17, f"legend {i}", f"Line and marker of {series}") as (axes, svg):
            axes.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], clip_on=False, **style)
            axes.set_axis_off()
        entries.append(Plot(svg[0], series))
    return entries


def tradeoffs(comparison: Comparison) -> list[Plot]:
    """Plot the first set distance against each image metric with a direction, and every declared trade-off."""
    declared = {m.key: m.tradeoff for m in IMAGE_METRICS} | {m.key: m.tradeoff for m in SET_METRICS}
    distances = {m.key for m in SET_METRICS if m.distance}
    images = [m for m in comparison.image_metrics if m.better]
    sets = {m.key: m for m in comparison.set_metrics}
    first = [m for m in comparison.set_metrics if m.key in distances][:1]
    pairs: list[tuple[ImageMetric | SetMetric, SetMetric]] = [(x, y) for y in first for x in images]
    metrics: list[ImageMetric | SetMetric] = [*images, *sets.values()]
    for metric in metrics:
        partner = sets.get(declared.get(metric.key, ""))
        if partner is not None and (metric, partner) not in pairs:
            pairs.append((metric, partner))
    return [plot for x, y in pairs if (plot := _tradeoff(comparison, x, y)) is not None]


def curves(comparison: Comparison) -> dict[str, list[ArmSummary]]:
    """Sort the arms of each series by the value it sweeps, with the baseline among them."""
    base = next((arm for arm in comparison.arms if arm.name == comparison.baseline), None)
    found: dict[str, list[ArmSummary]] = {}
    for arm in comparison.arms:
        if arm is not base:
            found.setdefault(arm.series, [base] if base else []).append(arm)
    for arms in found.values():
        by_cfg = not any(arm.scale for arm in arms if arm is not base)
        arms.sort(key=lambda arm: (arm.cfg_scale if by_cfg else arm.scale) or 0)
    return found


def _tradeoff(comparison: Comparison, x: ImageMetric | SetMetric, y: SetMetric) -> Plot | None:
    points = {arm.name: (comparison.mean(x.key, arm.name), comparison.mean(y.key, arm.name)) for arm in comparison.arms}
    known = {k: (a, b) for k, (a, b) in points.items() if a is not None and b is not None and math.isfinite(a + b)}
    if len(known) < 2:
        return None
    styles = series_styles(comparison)
    labels: list[tuple[str, Point]] = []
    paths: list[list[Point]] = []
    with svg_axes(3.5, 3.0, f"tradeoff {x.key} {y.key}", f"{y.title} against {x.title}") as (axes, svg):
        for series, arms in curves(comparison).items():
            paths.append([known[arm.name] for arm in arms if arm.name in known])
            axes.plot(*zip(*paths[-1], strict=True), **styles[series] | {"marker": ""})
        for arm in (arm for arm in comparison.arms if arm.name in known):
            spread = _spread(comparison, x, arm.name)
            if spread is not None:
                axes.errorbar(
                    *known[arm.name], xerr=spread, color=styles[arm.series]["color"], elinewidth=0.6, alpha=0.7
                )
            axes.plot(*known[arm.name], **styles[arm.series] | {"linestyle": "none"})
            labels.append((_point_label(comparison, arm), known[arm.name]))
        axes.set(xlabel=_axis_label(x), ylabel=_axis_label(y))
        axes.margins(0.12)
        axes.locator_params(nbins=5)
        axes.figure.draw_without_rendering()  # fixes the transform that the labels are placed with
        axes.figure.set_layout_engine("none")
        _place_labels(axes, labels, paths)
    return Plot(svg[0], f"{y.title} against {x.title}")


def _spread(comparison: Comparison, metric: ImageMetric | SetMetric, arm: str) -> list[list[float]] | None:
    """Return the lengths of an error bar to both sides: of the paired difference, around the mean."""
    delta = comparison.delta(metric.key, arm)
    if delta is None:
        return None
    low, high = (abs(end - delta.paired.mean_diff) for end in delta.paired.interval)
    return [[low], [high]] if math.isfinite(low + high) else None


def _point_label(comparison: Comparison, arm: ArmSummary) -> str:
    if arm.name == comparison.baseline:
        return "baseline"
    if arm.scale:
        return f"{arm.scale:g}"
    return f"cfg {arm.cfg_scale:g}" if is_plain_cfg(arm) and arm.cfg_scale is not None else plain(arm.name, 16)


def _axis_label(metric: ImageMetric | SetMetric) -> str:
    return plain(metric.title, 38) + (f" ({metric.better} is better)" if metric.better else "")


def _place_labels(axes: Any, labels: Sequence[tuple[str, Point]], paths: Sequence[Sequence[Point]]) -> None:
    """Place each label beside its point, where it covers least of other labels, points and lines."""
    scale = 72 / axes.figure.dpi
    frame = axes.get_window_extent()
    places = [tuple(axes.transData.transform(point) * scale) for _, point in labels]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places]
    for ends in (axes.transData.transform(pair) * scale for path in paths for pair in itertools.pairwise(path)):
        steps = np.linspace(ends[0], ends[1], int(np.ptp(ends, axis=0).max() / 3) + 2)
        taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in steps.tolist()]
    inside = (frame.x0 * scale, frame.y0 * scale, frame.x1 * scale + 8, frame.y1 * scale + 8)
    for (text, point), (x, y) in zip(labels, places, strict=True):
        boxes = [_label_box(text, x + dx, y + dy, dx) for dx, dy in _OFFSETS]
        costs = [sum(_overlap(box, other) for other in taken) + _outside(box, inside) for box in boxes]
        best = min(range(len(boxes)), key=costs.__getitem__)
        dx, dy = _OFFSETS[best]
        side = "left" if dx > 0 else "right" if dx < 0 else "center"
        arrow = {"arrowstyle": "-", "color": RULE, "linewidth": 0.7, "shrinkB": 3} if abs(dx) > 9 else None
        axes.annotate(text, point, (dx, dy), textcoords="offset points", ha=side, fontsize=7.5, arrowprops=arrow)
        taken.append(boxes[best])


def _label_box(text: str, x: float, y: float, dx: float) -> tuple[float, float, float, float]:
    width = _CHARACTER * len(text)
    left = x if dx > 0 else x - width if dx < 0 else x - width / 2
    return left, y, left + width, y + 7


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: tuple[float, ...], frame: tuple[float, ...]) -> float:
    return 20 * sum(max(0.0, d) for d in (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3]))


def forests(comparison: Comparison) -> list[Plot]:
    """Plot paired differences in sd of the baseline, with intervals, a panel for each image metric."""
    plots = []
    styles = series_styles(comparison)
    for metric in comparison.image_metrics:
        rows = []
        for arm in comparison.arms:
            delta = comparison.delta(metric.key, arm.name)
            if delta is not None and math.isfinite(delta.paired.effect_size):
                style = styles[arm.series] | ({"markerfacecolor": "none"} if arm.name in metric.circular else {})
                rows.append((_wrapped(arm.name), delta.paired.effect_size, delta.paired.effect_interval, style))
        if rows:
            label = f"Paired differences in {metric.title} by arm"
            svg = _forest(rows, f"forest {metric.key}", label, f"sd of the baseline{_arrow(metric)}")
            plots.append(Plot(svg, metric.title))
    return plots


def breakdown_forests(comparison: Comparison, by: str, arm: ArmSummary) -> list[Plot]:
    """Plot paired differences of one arm on each part of the prompts, a panel for each metric with a direction."""
    plots = []
    style = series_styles(comparison)[arm.series]
    for metric in (m for m in comparison.image_metrics if m.better):
        parts = [b for b in comparison.breakdowns if (b.by, b.metric, b.arm) == (by, metric.key, arm.name)]
        rows = [(_part(b), b.difference, b.interval, style) for b in parts if math.isfinite(b.difference)]
        if rows:
            label = f"Paired differences in {metric.title} by {by}, arm {arm.name}"
            svg = _forest(rows, f"{by} {metric.key}", label, f"difference{_arrow(metric)}")
            plots.append(Plot(svg, metric.title))
    return plots


def _part(part: Breakdown) -> str:
    return _wrapped(f"{plain(part.value, 32) or 'none'} (n={part.n_prompts})")


def _wrapped(text: str) -> str:
    """Wrap a label into two lines; cut it in the middle if it is long, as arms of a sweep differ at their end."""
    shown = plain(text, 60)
    if len(shown) <= _LABEL:
        return shown
    cut = max((m.end() for m in re.finditer(r"[-_ /,=]", shown[:_LABEL]) if m.end() > _LABEL // 2), default=_LABEL)
    return f"{shown[:cut].rstrip()}\n{plain(shown[cut:], _LABEL)}"


def _arrow(metric: ImageMetric) -> str:
    return {"higher": "  (better →)", "lower": "  (← better)"}.get(metric.better, "")


def _forest(
    rows: Sequence[tuple[str, float, tuple[float, float], dict[str, Any]]], salt: str, label: str, x: str
) -> str:
    height = 0.36 if any("\n" in row[0] for row in rows) else 0.25
    with svg_axes(3.5, 0.62 + height * len(rows), salt, label) as (axes, svg):
        axes.axvline(0, color=INK, linewidth=0.8)
        for i, (_, value, ends, style) in enumerate(rows):
            low, high = (abs(end - value) if math.isfinite(end) else 0.0 for end in ends)
            point = {"linestyle": "none", "elinewidth": 1.4, "markersize": min(style["markersize"], 5.5)}
            axes.errorbar(value, i, xerr=[[low], [high]], **style | point)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x)
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=6)
    return svg[0]
