"""Numbers with intervals, and Markdown tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from guidance.errors import UserError


def with_interval(value: float, interval: tuple[float, float], spec: str = "+.2f") -> str:
    """Write a number and its interval.

    >>> with_interval(0.5, (0.4, 0.62))
    '+0.50 [+0.40, +0.62]'
    """
    low, high = interval
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of rows with the same keys.

    >>> print(markdown([{"arm": "a", "score": "1"}]))
    | arm | score |
    |---|---|
    | a | 1 |
    """
    if not rows:
        raise UserError("Expected at least one row, got none.")
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([text[0], "|" + "---|" * len(rows[0]), *text[1:]])
