"""Text of the report: formatting of numbers, the headline, the cells of the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.comparison.results import ArmSummary, Better, Comparison, Delta, ImageMetric, SetMetric, SetValue
from guidance.utils.errors import UserError, nearest

MISSING = "—"

LEVEL = 0.05  # of a test, after Holm

PLAIN_CFG = "plain cfg"

_WIDTHS = {"image": 2, "set": 1, "cost": 1}  # of columns
_MAX_WIDTH = 7  # of a table, so that it can be printed

_VERDICTS = {"better": "▲ ", "worse": "▼ ", "different": "● ", "": ""}


def number(value: float | None, decimals: int, *, signed: bool = False) -> str:
    """Format a number with a true minus sign; a dash if it is missing.

    >>> number(-1.236, 2), number(1.236, 2, signed=True), number(-0.001, 2), number(float("nan"), 2)
    ('−1.24', '+1.24', '0.00', '—')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:{'+' if signed else ''}.{decimals}f}"
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "−")


def interval(ends: Sequence[float], decimals: int, *, signed: bool = True) -> str:
    """Format an interval: ``[+0.40, +0.62]``; a dash if an end is missing."""
    low, high = (number(x, decimals, signed=signed) for x in ends)
    return MISSING if MISSING in (low, high) else f"[{low}, {high}]"


def percent(share: float, ends: Sequence[float]) -> str:
    """Format a share with its interval.

    >>> percent(0.71, (0.62, 0.787))
    '71% [62, 79]'
    """
    if not math.isfinite(share):
        return MISSING
    return f"{100 * share:.0f}% {interval([100 * x for x in ends], 0, signed=False)}"


def p_value(p: float | None) -> str:
    """Format a p-value with its relation: ``p = 0.031``, ``p < 0.001``; a dash if it is missing."""
    if p is None or not math.isfinite(p):
        return f"p {MISSING}"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def decimals_for(steps: Sequence[float | None]) -> int:
    """Choose decimals that give the median of `steps` (half-widths of intervals) two significant digits, 0 to 6."""
    sizes = [abs(x) for x in steps if x is not None and math.isfinite(x) and x != 0]
    return min(max(1 - math.floor(math.log10(np.median(sizes))), 0), 6) if sizes else 2


def metric_decimals(comparison: Comparison, metric: str) -> int:
    """Choose the decimals of an image metric, the same for all arms."""
    deltas = [d.paired for d in comparison.deltas if d.metric == metric]
    widths = [(d.interval[1] - d.interval[0]) / 2 for d in deltas]
    return decimals_for([w for w in widths if w > 0] or [d.mean_a / 10 for d in deltas])


def is_plain_cfg(arm: ArmSummary) -> bool:
    """Tell whether an arm only raises the weight of classifier-free guidance."""
    return arm.series.strip().lower() == PLAIN_CFG


def verdict(delta: Delta, better: Better) -> str:
    """Classify a delta: "better", "worse", "different" (if no direction is better), or "" if not significant."""
    low, high = delta.paired.interval
    if not (low > 0 or high < 0) or not delta.p_holm <= LEVEL:  # written so that NaN shows nothing
        return ""
    if not better:
        return "different"
    return "better" if (low > 0) == (better == "higher") else "worse"


def improved(delta: Delta, better: Better) -> tuple[float, tuple[float, float]]:
    """Return the share of prompts on which the arm is better (higher, if neither is better), and its interval."""
    share, (low, high) = delta.paired.share_improved, delta.paired.share_interval
    return (1 - share, (1 - high, 1 - low)) if better == "lower" else (share, (low, high))


def primary_metric(comparison: Comparison, key: str | None = None) -> ImageMetric | None:
    """Choose the metric of the headline and of the order of the grids.

    Args:
        comparison: The comparison.
        key: Its key; None takes the first that has a better direction and is not circular for any arm.

    Raises:
        UserError: If there is no such metric.
    """
    if key is not None:
        return _named(key, {m.key: m for m in comparison.image_metrics}, "image metric")
    compared = {d.metric for d in comparison.deltas}
    metrics = [m for m in comparison.image_metrics if m.key in compared]
    return min(metrics, key=lambda m: (not m.better, bool(m.circular)), default=None)  # the first of equals


def focus_arm(comparison: Comparison, name: str | None = None) -> ArmSummary | None:
    """Choose the arm whose change orders the grids; by default independently of results.

    Args:
        comparison: The comparison.
        name: Its name; None takes the guided arm of the largest absolute scale, or else the first.

    Raises:
        UserError: If there is no such arm.
    """
    arms = [arm for arm in comparison.arms if arm.name != comparison.baseline]
    if name is not None:
        return _named(name, {arm.name: arm for arm in arms}, "arm other than the baseline")
    guided = [arm for arm in arms if arm.scale and not is_plain_cfg(arm)]
    return max(guided, key=lambda arm: (abs(arm.scale or 0), arm.scale or 0)) if guided else next(iter(arms), None)


def _named(name: str, known: dict[str, Any], kind: str) -> Any:
    if name not in known:
        raise UserError(f"Expected an {kind}, got '{name}'.{nearest(name, known)}")
    return known[name]


def headline(comparison: Comparison) -> list[str]:
    """State the main result in one sentence, and qualify it in the following ones."""
    metric = primary_metric(comparison)
    if metric is None:
        return ["Nothing is compared: no image metric has a value on both sides."]
    plain = {arm.name for arm in comparison.arms if is_plain_cfg(arm)}
    deltas = [d for d in comparison.deltas if d.metric == metric.key]
    guided = [d for d in deltas if d.arm not in plain] or deltas
    best = _best(guided, metric.better)
    sentences = [_state(comparison, metric, best)]
    if best.arm in metric.circular:
        sentences.append("This is circular: the network that measures it has guided the arm.")
    if len(guided) > 1:
        sentences.append(_selection(guided, metric))
    rivals = [d for d in deltas if d.arm in plain]
    if rivals and guided is not deltas:
        rival, digits = _best(rivals, metric.better), metric_decimals(comparison, metric.key)
        change = number(rival.paired.mean_diff, digits, signed=True)
        ends = interval(rival.paired.interval, digits)
        sentences.append(f"Raising plain CFG alone gives at best {change} {ends} (“{rival.arm}”).")
    if (ratio := time_ratio(comparison, best.arm)) is not None:
        sentences.append(f"“{best.arm}” takes {ratio:.2f} times the baseline's time per image.")
    return sentences


def _best(deltas: Sequence[Delta], better: Better) -> Delta:
    sign = {"higher": 1, "lower": -1}.get(better)
    return max(deltas, key=lambda d: sign * d.paired.mean_diff if sign else abs(d.paired.mean_diff))


def _state(comparison: Comparison, metric: ImageMetric, delta: Delta) -> str:
    """State a delta: what is shown, by how much, with which uncertainty."""
    paired, digits = delta.paired, metric_decimals(comparison, metric.key)
    shown = verdict(delta, metric.better)
    claim = {"": "is not shown to differ from", "different": "differs from"}.get(shown, f"is {shown} than")
    share, ends = improved(delta, metric.better)
    effect = number(paired.effect_size, 2, signed=True)
    unit = "" if effect == MISSING else f" ({effect} sd of the baseline)"
    return (
        f"“{delta.arm}” {claim} “{comparison.baseline}” in {metric.title}: "
        f"{number(paired.mean_diff, digits, signed=True)} {interval(paired.interval, digits)}{unit}, "
        f"{'better' if metric.better else 'higher'} on {percent(share, ends)} of {paired.n_prompts} prompts, "
        f"{p_value(delta.p_holm)} after Holm."
    )


def _selection(deltas: Sequence[Delta], metric: ImageMetric) -> str:
    """State from how many arms the best was chosen, and what the others show."""
    found = [verdict(d, metric.better) for d in deltas]
    kinds = ["better", "worse"] if metric.better else ["different"]
    counts = ", ".join(f"{found.count(kind)} shown to be {kind}" for kind in kinds)
    return (
        f"It has the {'best' if metric.better else 'largest'} change of {len(deltas)} arms "
        f"({counts}, {found.count('')} not shown to differ), and the best of several is flattered by chance."
    )


def time_ratio(comparison: Comparison, arm: str) -> float | None:
    """Return an arm's seconds per image over the baseline's; None where either is not recorded."""
    seconds = {a.name: a.seconds for a in comparison.arms}
    value, base = seconds.get(arm), seconds.get(comparison.baseline)
    return value / base if value is not None and base and math.isfinite(value / base) else None


def headline_tables(comparison: Comparison) -> list[dict[str, Any]]:
    """Lay out the results as tables that fit a page: columns, and a row for each arm, the baseline first.

    A cell is a list of lines: the value first, then its comparison with the baseline.
    """
    arms = sorted(comparison.arms, key=lambda arm: arm.name != comparison.baseline)
    columns: list[dict[str, Any]] = []
    for metric in comparison.image_metrics:
        columns.append(_column("image", metric, [_image_cell(comparison, metric, arm.name) for arm in arms]))
    for set_metric in comparison.set_metrics:
        cells = [_set_cell(comparison, set_metric, arm.name) for arm in arms]
        columns.append(_column("set", set_metric, cells))
    seconds = [[number(arm.seconds, 3), *_times(comparison, arm)] for arm in arms]
    columns.append({"kind": "cost", "title": "Seconds per image", "better": "lower", "cells": seconds})
    blocks: list[list[dict[str, Any]]] = [[]]
    for column in columns:
        if sum(_WIDTHS[c["kind"]] for c in [*blocks[-1], column]) > _MAX_WIDTH:
            blocks.append([])
        blocks[-1].append(column)
    return [
        {
            "columns": block,
            "rows": [{"arm": arm.name, "cells": [c["cells"][i] for c in block]} for i, arm in enumerate(arms)],
        }
        for block in blocks
    ]


def _column(kind: str, metric: ImageMetric | SetMetric, cells: list[list[str]]) -> dict[str, Any]:
    return {"kind": kind, "title": metric.title, "better": metric.better, "cells": cells}


def _image_cell(comparison: Comparison, metric: ImageMetric, arm: str) -> list[str]:
    digits = metric_decimals(comparison, metric.key)
    lines = [number(comparison.mean(metric.key, arm), digits)]
    if (delta := comparison.delta(metric.key, arm)) is None:
        return lines
    mark = _VERDICTS[verdict(delta, metric.better)]
    change = number(delta.paired.mean_diff, digits, signed=True)
    effect = number(delta.paired.effect_size, 2, signed=True)
    share = percent(*improved(delta, metric.better))
    lines.append(f"{mark}{change} {interval(delta.paired.interval, digits)}")
    lines.append(f"{effect} sd · {share} · {p_value(delta.p_holm)}")
    notes = ["circular"] if arm in metric.circular else []
    notes += [f"{delta.excluded} images excluded"] if delta.excluded else []
    return [*lines, ", ".join(notes)] if notes else lines


def _set_cell(comparison: Comparison, metric: SetMetric, arm: str) -> list[str]:
    found = comparison.set_value(metric.key, arm)
    if found is None:
        return [MISSING]
    values = [s.value for s in comparison.set_values if s.metric == metric.key]
    digits = decimals_for([v / 10 for v in values])
    lines = [number(found.value, digits)]
    if found.difference is not None:
        lines.append(f"{_set_mark(found, metric.better)}{number(found.difference, digits, signed=True)}")
    if found.p is not None or found.p_holm is not None:
        lines.append(p_value(found.p_holm if found.p_holm is not None else found.p))
    if len(found.blocks) > 1:
        mean, sd = float(np.mean(found.blocks)), float(np.std(found.blocks, ddof=1))
        lines.append(f"{number(mean, digits)} ± {number(sd, digits)} ({len(found.blocks)} blocks)")
    return lines


def _set_mark(found: SetValue, better: Better) -> str:
    if found.difference is None or found.p_holm is None or not found.p_holm <= LEVEL:
        return ""
    if not better:
        return _VERDICTS["different"]
    return _VERDICTS["better" if (found.difference > 0) == (better == "higher") else "worse"]


def _times(comparison: Comparison, arm: ArmSummary) -> list[str]:
    ratio = time_ratio(comparison, arm.name)
    return [] if ratio is None or arm.name == comparison.baseline else [f"{ratio:.2f} ×"]
