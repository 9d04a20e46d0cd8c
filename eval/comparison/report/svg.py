"""Matplotlib figures as SVG elements of a page, whose style sheet gives their colours a light and a dark form.

Text stays text: searchable and escaped.
"""

from __future__ import annotations

import html
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Colours of the light scheme; report.css has their variables.
INK, RULE, SOFT = "#1b1f24", "#d9dde2", "#5a636e"

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b57f00", "#3f9bd1")

_STYLE = Path(__file__).parent / "templates" / "plot.mplstyle"


@contextmanager
def svg_axes(width: float, height: float, salt: str, label: str) -> Iterator[tuple[Any, list[str]]]:
    """Yield axes to draw on and a list that holds the SVG afterwards.

    Args:
        width, height: Inches.
        salt: Makes the element ids of this plot differ from those of the page's other plots.
        label: What a screen reader says.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    # of a script that DejaVu lacks: the page's fonts will have it
    with matplotlib.style.context(["default", _STYLE, {"svg.hashsalt": ascii(salt)}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure, svg = Figure(figsize=(width, height)), list[str]()
        yield figure.subplots(), svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        svg.append(_inline(buffer.getvalue(), html.escape(plain(label, 200))))


def _inline(svg: str, name: str) -> str:
    """Turn a file of matplotlib's into an element of a page: short, without repeated ids or styles for all the page."""
    head, body = svg[svg.index("<svg ") + 5 :].split(">", 1)
    # names stand between the tags, with < escaped
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(tag.group().split())), body)
    body = re.sub(r"<style.*?</style>|(?<=<g) id=\"[^\"]*\"|\n\s*", "", body, flags=re.S)
    return f'<svg class="plot" role="img" aria-label="{name}" {head}><title>{name}</title>{body}'


def plain(text: str, length: int) -> str:
    """Make text fit a plot: one line, no control characters, shortened in the middle.

    >>> plain("a\\nb" + "c" * 20 + "d", 9)
    'a bc…cccd'
    """
    shown = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
    shown = " ".join(shown.split())
    if len(shown) <= length:
        return shown
    head = length // 2
    return f"{shown[:head]}…{shown[head + 1 - length :]}"
