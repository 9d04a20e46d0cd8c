"""Numbers with intervals, and Markdown tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def with_interval(value: float, interval: tuple[float, float], spec: str = "+.2f") -> str:
    """Write a number and its interval.

    >>> with_interval(0.5, (0.4, 0.62))
    '+0.50 [+0.40, +0.62]'
    """
    low, high = interval
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Format rows with the same keys as a Markdown table.

    >>> print(markdown([{"arm": "a", "score": "1"}]))
    | arm | score |
    |---|---|
    | a | 1 |
    """
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([text[0], "|" + "---|" * len(rows[0]), *text[1:]])


def arm_table(summary: Mapping[str, Any]) -> str:
    """Tabulate the arms of a run on the testbed by its most telling metrics.

    Args:
        summary: Result of :func:`eval.images.evaluate_images` for images of the testbed.
    """
    deltas = {(d["metric"], d["arm"]): d["paired"] for d in summary["deltas"]}
    frechet = {v["arm"]: v["value"] for v in summary["set_values"] if v["metric"] == "fd"}
    first, second = summary["arms"][:2]
    rows = []
    for arm in summary["arms"]:
        name, side, change, share, ratio = second["name"], "mean_a", "-", "-", ""
        if arm is not first:
            name, side, d = arm["name"], "mean_b", deltas["truth", arm["name"]]
            change = with_interval(d["effect_size"], d["effect_interval"])
            low, high = d["share_interval"]
            share = f"{100 * d['share_improved']:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"
            ratio = f" ({arm['seconds'] / first['seconds']:.2f}x)"
        mean = {metric: paired[side] for (metric, other), paired in deltas.items() if other == name}
        rows.append(
            {
                "arm": arm["name"],
                "truth": f"{mean['truth']:+.2f}",
                "change in sd [95%]": change,
                "prompts improved [95%]": share,
                "object / colour / time agree": " / ".join(
                    f"{100 * mean[k]:.1f}" for k in ("object", "colour", "time")
                ),
                "judge CLIP score": f"{mean['clip_score']:.1f}",
                "FD-judge": f"{frechet[arm['name']]:.1f}",
                "s per image": f"{arm['seconds']:.3f}{ratio}",
            }
        )
    return markdown(rows)
