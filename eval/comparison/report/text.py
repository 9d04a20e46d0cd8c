"""Text of the report: formatting of numbers, the headline, the cells of the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.comparison.results import ArmSummary, Better, Comparison, Delta, ImageMetric, SetMetric, SetValue
from guidance.utils.errors import UserError, nearest

Column = tuple[str, ImageMetric | SetMetric | None]

MISSING = "—"

LEVEL = 0.05  # of a test, after Holm

PLAIN_CFG = "plain cfg"

_WIDTHS = {"image": 2, "set": 1, "cost": 1}  # of columns
_MAX_WIDTH = 7  # of a table, so that it can be printed

MARKS = {"better": "▲ ", "worse": "▼ ", "different": "● ", "": ""}


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


def metric_decimals(comparison: Comparison, metric: str) -> int:
    """Choose decimals, 0 to 6 and the same for all arms, that give intervals two significant digits."""
    deltas = [d.paired for d in comparison.deltas if d.metric == metric]
    widths = [(d.interval[1] - d.interval[0]) / 2 for d in deltas]
    steps = [v.value / 10 for v in comparison.set_values if v.metric == metric]
    steps = steps or [w for w in widths if w > 0] or [d.mean_a / 10 for d in deltas]
    sizes = [abs(x) for x in steps if math.isfinite(x) and x != 0]
    return min(max(1 - math.floor(math.log10(np.median(sizes))), 0), 6) if sizes else 2


def image_decimals(comparison: Comparison, metric: str) -> int:
    """Choose one decimal less than for means: single images spread more widely."""
    digits = metric_decimals(comparison, metric)
    return max(digits - 1, min(digits, 1))


def is_plain_cfg(arm: ArmSummary) -> bool:
    """Tell whether an arm only raises the weight of classifier-free guidance."""
    return arm.series.strip().lower() == PLAIN_CFG


def verdict(found: Delta | SetValue, better: Better) -> str:
    """Classify a change: "better", "worse", "different" (if no direction is better), or "" if not significant."""
    low, high = found.paired.interval if isinstance(found, Delta) else 2 * (found.difference or 0.0,)
    if not (low > 0 or high < 0) or found.p_holm is None or not found.p_holm <= LEVEL:  # so that NaN shows nothing
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
    rivals = [d for d in deltas if d.arm in plain]
    guided = [d for d in deltas if d.arm not in plain]
    best, digits = _best(guided or deltas, metric.better), metric_decimals(comparison, metric.key)
    sentences = [_state(comparison, metric, best, digits)]
    if best.arm in metric.circular:
        sentences.append("This is circular: the network that measures it has guided the arm.")
    if len(guided or deltas) > 1:
        sentences.append(_selection(guided or deltas, metric))
    if rivals and guided:
        rival = _best(rivals, metric.better)
        sentences.append(f"Raising plain CFG alone gives at best {_change(rival, digits)} (“{rival.arm}”).")
    if (ratio := time_ratio(comparison, best.arm)) is not None:
        sentences.append(f"“{best.arm}” takes {ratio:.2f} times the baseline's time per image.")
    return sentences


def _best(deltas: Sequence[Delta], better: Better) -> Delta:
    sign = {"higher": 1, "lower": -1}.get(better)
    return max(deltas, key=lambda d: sign * d.paired.mean_diff if sign else abs(d.paired.mean_diff))


def _change(delta: Delta, digits: int) -> str:
    return f"{number(delta.paired.mean_diff, digits, signed=True)} {interval(delta.paired.interval, digits)}"


def _state(comparison: Comparison, metric: ImageMetric, delta: Delta, digits: int) -> str:
    """State a delta: what is shown, by how much, with which uncertainty."""
    shown = verdict(delta, metric.better)
    claim = {"": "is not shown to differ from", "different": "differs from"}.get(shown, f"is {shown} than")
    effect = number(delta.paired.effect_size, 2, signed=True)
    unit = "" if effect == MISSING else f" ({effect} sd of the baseline)"
    return (
        f"“{delta.arm}” {claim} “{comparison.baseline}” in {metric.title}: {_change(delta, digits)}{unit}, "
        f"{'better' if metric.better else 'higher'} on {percent(*improved(delta, metric.better))} of "
        f"{delta.paired.n_prompts} prompts, {p_value(delta.p_holm)} after Holm."
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


def divide_columns(comparison: Comparison) -> list[list[Column]]:
    """Divide the columns of results, as kind and metric, among tables that fit a page."""
    columns: list[Column] = [("image", m) for m in comparison.image_metrics]
    tables: list[list[Column]] = [[]]
    for column in (*columns, *(("set", m) for m in comparison.set_metrics), ("cost", None)):
        if sum(_WIDTHS[kind] for kind, _ in (*tables[-1], column)) > _MAX_WIDTH:
            tables.append([])
        tables[-1].append(column)
    return tables


def mean_and_sd(values: Sequence[float], decimals: int) -> str:
    """Format the mean of values with their standard deviation (ddof 1): ``0.805 ± 0.035``."""
    return f"{number(float(np.mean(values)), decimals)} ± {number(float(np.std(values, ddof=1)), decimals)}"
