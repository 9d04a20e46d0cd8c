"""Values of axes as a user writes them: one value or a list, each checked, in the form that cells have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from guidance.errors import UserError, nearest
from guidance.sampling import SCHEDULERS
from guidance.sweep import AXES
from guidance.units import Sampling


def read_axes(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Read the values of all axes.

    Args:
        given: Axis -> one value or a list of them.

    Raises:
        UserError: If a list is empty, or a value is of another kind.

    >>> read_axes({"scale": [1, -2], "guide": None})
    {'scale': [1.0, -2.0], 'guide': [()]}
    """
    return {name: _read(name, given[name]) for name in AXES if name in given}


def _read(name: str, value: Any) -> list[Any]:
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise UserError(
            f"Expected one value or more for '{name}', got an empty list; leave it out for its default."
        )
    return list(dict.fromkeys(_READERS[name](name, item) for item in values))  # each once


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"Expected a number or a list of numbers for '{name}', got {value!r}; write {name}=[1, 2]."
        )
    if not math.isfinite(value):
        raise UserError(f"Expected a finite number for '{name}', got {value}; give another value.")
    return float(value)


def _fraction(name: str, value: Any) -> float | None:
    return None if value is None else _number(name, value)


def _strength(name: str, value: Any) -> float:
    return Sampling(strength=_number(name, value)).strength


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"Expected whole numbers for '{name}', got {value!r}; write {name}=[15, 25].")
    return value


def _text(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"Expected text or a list of texts for '{name}', got {value!r}.")


def _scheduler(name: str, value: Any) -> str | None:
    text = _text(name, value)
    if text is not None and text not in SCHEDULERS:
        raise UserError(f"Expected a scheduler's name, got '{text}'.{nearest(text, SCHEDULERS)}")
    return text


def _guides(name: str, value: Any) -> tuple[str, ...]:
    """One guide, or several that push together; none for the head."""
    texts = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"Expected guides as NAME:key=value,... for '{name}', got {value!r}.")
    return tuple(texts)


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "scale": _number,
    "guide": _guides,
    "head": _text,
    "start": _fraction,
    "stop": _fraction,
    "cfg_scale": _number,
    "num_steps": _count,
    "scheduler": _scheduler,
    "strength": _strength,
}
