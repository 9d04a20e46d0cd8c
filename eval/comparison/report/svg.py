"""Matplotlib figures as SVG elements of a page.

Colours are CSS variables of the page, so that plots follow its light or dark scheme.  Text stays text: searchable and
escaped.
"""

from __future__ import annotations

import html
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Placeholder colours that matplotlib writes, to be replaced by CSS variables.
INK, RULE, SOFT = "#010203", "#010204", "#010205"

SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")

_VARIABLES = {INK: "var(--ink)", RULE: "var(--rule)", SOFT: "var(--soft)"}

_VARIABLES |= {colour: f"var(--s{i})" for i, colour in enumerate(SERIES)}

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": RULE,
}


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
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # of a script that DejaVu lacks: the page's fonts will have it
    with matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": ascii(salt)}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
        svg: list[str] = []
        yield figure.subplots(), svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        svg.append(_inline(buffer.getvalue(), label))


def _inline(svg: str, label: str) -> str:
    """Turn a file of matplotlib's into an element of a page: short, without repeated ids, in the page's colours."""
    head, body = svg[svg.index("<svg") :].split(">", 1)
    box = head.split('viewBox="')[1].split('"')[0]
    width, height = (float(x) * 4 / 3 for x in box.split()[2:])  # points to CSS pixels
    body = re.sub(r"<style.*?</style>", "", body, flags=re.S)  # it would hold for the whole page
    body = re.sub(r"<[^>]*>", lambda m: _tag(m.group()), body)  # names stand between the tags, with < escaped
    body = re.sub(r">\s+<", "><", body).strip()
    name = html.escape(plain(label, 200))
    return (
        f'<svg class="plot" role="img" aria-label="{name}" viewBox="{box}" width="{width:.0f}" height="{height:.0f}">'
        f"<title>{name}</title>{body}"
    )


def _tag(tag: str) -> str:
    """Strip a tag of what the page does not need."""
    tag = re.sub(r"^<g id=\"[^\"]*\"", "<g", tag)  # text_1 and the like: in every plot
    tag = re.sub(r"#0102[01]\d", lambda m: _VARIABLES[m.group()], tag)
    tag = re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m.group()):.2f}", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?| transform=\"rotate\(-0 [^\"]*\"", "", tag)
    tag = tag.replace("xlink:href=", "href=")
    return " ".join(tag.split())


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
