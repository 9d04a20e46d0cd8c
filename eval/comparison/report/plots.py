"""Plots of the report: trade-off curves and forest plots.

Besides its colour each series has its own marker and line style, for readers who cannot tell colours apart.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval.comparison.image_metrics import IMAGE_METRICS
from eval.comparison.report.svg import INK, RULE, SERIES, SOFT, plain, svg_axes
from eval.comparison.report.text import is_plain_cfg
from eval.comparison.results import ArmSummary, Comparison, ImageMetric, SetMetric
from eval.comparison.set_metrics import SET_METRICS

Point = tuple[float, float]

_MARKERS, _LINES = "o^DvPX<", ("-", (0, (6, 2)), "-.")

_LABEL = 22  # letters in a line of a forest's labels

_SIDES = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1)])  # of a point, in order of preference


class Plot(NamedTuple):
    """A figure: its SVG element and its caption."""

    svg: str
    caption: str


def series_styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Choose line and marker of each series; the baseline is a star, plain CFG a dashed grey square."""
    styles: dict[str, dict[str, Any]] = {}
    numbers = itertools.count()
    for arm in comparison.arms:
        if arm.series in styles:
            continue
        style: tuple[Any, ...]
        if arm.name == comparison.baseline:
            style = INK, "*", 10.0, "none", 1.5
        elif is_plain_cfg(arm):
            style = SOFT, "s", 4.5, (0, (2, 2)), 1.2
        else:
            line, colour = divmod(i := next(numbers), len(SERIES))
            style = SERIES[colour], _MARKERS[i % len(_MARKERS)], 5.5, _LINES[line % len(_LINES)], 1.5
        keys = ("color", "marker", "markersize", "linestyle", "linewidth")
        styles[arm.series] = dict(zip(keys, style, strict=True))
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
    images, sets = [m for m in comparison.image_metrics if m.better], comparison.set_metrics
    metrics: list[ImageMetric | SetMetric] = [*images, *sets]
    first = [m for m in sets if m.key in distances][:1]
    pairs: list[tuple[ImageMetric | SetMetric, SetMetric]] = [(x, y) for y in first for x in images]
    pairs += [(x, y) for x in metrics for y in sets if y.key == declared.get(x.key) and (x, y) not in pairs]
    return [plot for x, y in pairs if (plot := _tradeoff(comparison, x, y)) is not None]


def curves(comparison: Comparison) -> dict[str, list[ArmSummary]]:
    """Sort the arms of each series by the value it sweeps, with the baseline among them."""
    base = [arm for arm in comparison.arms if arm.name == comparison.baseline]
    found: dict[str, list[ArmSummary]] = {}
    for arm in comparison.arms:
        if arm not in base:
            found.setdefault(arm.series, base.copy()).append(arm)
    for arms in found.values():
        by_cfg = not any(arm.scale for arm in arms if arm not in base)
        arms.sort(key=lambda arm: (arm.cfg_scale if by_cfg else arm.scale) or 0)
    return found


def _tradeoff(comparison: Comparison, x: ImageMetric | SetMetric, y: SetMetric) -> Plot | None:
    points = {arm.name: (comparison.mean(x.key, arm.name), comparison.mean(y.key, arm.name)) for arm in comparison.arms}
    known = {k: (a, b) for k, (a, b) in points.items() if a is not None and b is not None and math.isfinite(a + b)}
    if len(known) < 2:
        return None
    styles, title = series_styles(comparison), f"{y.title} against {x.title}"
    arms = [arm for arm in comparison.arms if arm.name in known]
    with svg_axes(3.5, 3.0, f"tradeoff {x.key} {y.key}", title) as (axes, svg):
        paths = {s: [known[arm.name] for arm in of if arm.name in known] for s, of in curves(comparison).items()}
        for series, path in paths.items():
            axes.plot(*zip(*path, strict=True), **styles[series] | {"marker": ""})
        for arm in arms:
            point, style = known[arm.name], styles[arm.series]
            if (delta := comparison.delta(x.key, arm.name)) and np.isfinite(delta.paired.interval).all():
                spread = [[abs(end - delta.paired.mean_diff)] for end in delta.paired.interval]
                axes.errorbar(*point, xerr=spread, color=style["color"], elinewidth=0.6, alpha=0.7)
            axes.plot(*point, **style | {"linestyle": "none"})
        axes.set(xlabel=_axis_label(x), ylabel=_axis_label(y))
        axes.margins(0.12)
        axes.locator_params(nbins=5)
        axes.figure.draw_without_rendering()  # fixes the transform that the labels are placed with
        axes.figure.set_layout_engine("none")
        _label_points(axes, [(_point_label(comparison, arm), known[arm.name]) for arm in arms], paths.values())
    return Plot(svg[0], title)


def _point_label(comparison: Comparison, arm: ArmSummary) -> str:
    if arm.name == comparison.baseline:
        return "baseline"
    if arm.scale:
        return f"{arm.scale:g}"
    return f"cfg {arm.cfg_scale:g}" if is_plain_cfg(arm) and arm.cfg_scale is not None else plain(arm.name, 16)


def _axis_label(metric: ImageMetric | SetMetric) -> str:
    return plain(metric.title, 38) + (f" ({metric.better} is better)" if metric.better else "")


def _label_points(axes: Any, labels: Sequence[tuple[str, Point]], paths: Iterable[Sequence[Point]]) -> None:
    """Write each label on the side of its point where it is farthest from points, lines, labels and the frame."""
    points = 72 / axes.figure.dpi
    lines = [axes.transData.transform(path) for path in (*paths, *([point, point] for _, point in labels))]
    lines.append(axes.transAxes.transform([(0, 0), (0, 1), (1.04, 1), (1.04, 0), (0, 0)]))
    ends = [pair for line in lines for pair in itertools.pairwise(line * points)]
    taken = np.concatenate([np.linspace(a, b, 50) for a, b in ends])
    for (text, point), place in zip(labels, axes.transData.transform([p for _, p in labels]) * points, strict=True):
        half = np.array([2.3 * len(text), 4.0])  # of the label's width and height
        moves = [side * (half + gap) for gap in (4, 13) for side in _SIDES]
        room = [(np.abs(taken - place - move) - half).max(1).min() for move in moves]
        move = moves[int(np.argmax(np.minimum(room, 1.5)))]
        arrow = {"arrowstyle": "-", "color": RULE, "linewidth": 0.7, "shrinkB": 3} if abs(move[1]) > 8 else None
        options = {"ha": "center", "va": "center", "fontsize": 7.5, "arrowprops": arrow}
        axes.annotate(text, point, move, textcoords="offset points", **options)
        box = np.stack(np.meshgrid(np.linspace(-1, 1, 9), (-1, 0, 1)), -1).reshape(-1, 2)
        taken = np.concatenate([taken, place + move + half * box])


def forests(comparison: Comparison) -> list[Plot]:
    """Plot paired differences in sd of the baseline, with intervals, a panel for each image metric."""
    plots, styles = [], series_styles(comparison)
    for metric in comparison.image_metrics:
        rows = []
        for arm in comparison.arms:
            if delta := comparison.delta(metric.key, arm.name):
                style = styles[arm.series] | ({"markerfacecolor": "none"} if arm.name in metric.circular else {})
                rows.append((arm.name, delta.paired.effect_size, delta.paired.effect_interval, style))
        plots += _forest(metric, rows, f"forest {metric.key}", "by arm", "sd of the baseline")
    return plots


def breakdown_forests(comparison: Comparison, by: str, arm: ArmSummary) -> list[Plot]:
    """Plot paired differences of one arm on each part of the prompts, a panel for each metric with a direction."""
    plots, style = [], series_styles(comparison)[arm.series]
    for metric in (m for m in comparison.image_metrics if m.better):
        parts = [b for b in comparison.breakdowns if (b.by, b.metric, b.arm) == (by, metric.key, arm.name)]
        names = [f"{plain(part.value, 32) or 'none'} (n={part.n_prompts})" for part in parts]
        rows = [(name, b.difference, b.interval, style) for name, b in zip(names, parts, strict=True)]
        plots += _forest(metric, rows, f"{by} {metric.key}", f"by {by}, arm {arm.name}", "difference")
    return plots


def _wrapped(text: str) -> str:
    """Wrap a label into two lines; cut it in the middle if it is long, as arms of a sweep differ at their end."""
    shown = plain(text, 60)
    if len(shown) <= _LABEL:
        return shown
    cut = max((m.end() for m in re.finditer(r"[-_ /,=]", shown[:_LABEL]) if m.end() > _LABEL // 2), default=_LABEL)
    return f"{shown[:cut].rstrip()}\n{plain(shown[cut:], _LABEL)}"


def _forest(
    metric: ImageMetric, rows: Sequence[tuple[str, float, Point, dict[str, Any]]], salt: str, rest: str, unit: str
) -> list[Plot]:
    """Plot rows of label, value, ends of its interval and style; nothing where no value is finite."""
    rows = [row for row in rows if math.isfinite(row[1])]
    if not rows:
        return []
    labels = [_wrapped(row[0]) for row in rows]
    height = 0.36 if "\n" in "".join(labels) else 0.25
    label = f"Paired differences in {metric.title} {rest}"
    with svg_axes(3.5, 0.62 + height * len(rows), salt, label) as (axes, svg):
        axes.axvline(0, color=INK, linewidth=0.8)
        for i, (_, value, ends, style) in enumerate(rows):
            sides = [[abs(end - value) if math.isfinite(end) else 0.0] for end in ends]
            point = {"linestyle": "none", "elinewidth": 1.4, "markersize": min(style["markersize"], 5.5)}
            axes.errorbar(value, i, xerr=sides, **style | point)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit + {"higher": "  (better →)", "lower": "  (← better)"}.get(metric.better, ""))
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=6)
    return [Plot(svg[0], metric.title)]
