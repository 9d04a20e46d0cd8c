"""The plan of a sweep: the values of axes become cells, each of which is an arm with its own sampling options."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from guidance.guides.base import Guide
from guidance.guides.midblock import MidBlockGuide
from guidance.guides.registry import read_guide
from guidance.runs.arms import Arm, arm_name, guide_arms, missing_head
from guidance.runs.records import UNGUIDED
from guidance.runs.run import Sampling
from guidance.sampling.loop import find_scheduler
from guidance.utils.errors import UserError

#: Options that may vary, in the order in which names mention them.
AXES = ("scale", "guide", "head", "start", "stop", "cfg_scale", "num_steps", "scheduler", "strength")

SAMPLING_AXES = AXES[5:]

Kind = Literal["guided", "unguided", "matched"]

#: Axes that the name of a cell may mention, by its kind.
_NAMED_AXES: dict[Kind, tuple[str, ...]] = {"guided": AXES[1:], "unguided": SAMPLING_AXES, "matched": SAMPLING_AXES}

#: The axes of guides in cells without one.
_NO_GUIDE: dict[str, Any] = {"guide": (), "head": None, "start": None, "stop": None}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A point of the grid.

    Attributes:
        name: The arm's name, which mentions the values that vary.
        scale: Guidance scale; 0 samples without guidance, and then guide, head, start and stop are empty.
        guide: Guides that act together, see :func:`guidance.guides.registry.read_guide`; empty: the head.
        head: Folder of the head; None where there are guides.
        start, stop: Fractions of the steps; None takes the guide's own.
        cfg_scale, num_steps, scheduler, strength: See :class:`guidance.runs.run.Sampling`.
    """

    name: str
    scale: float = 0.0
    guide: tuple[str, ...] = ()
    head: str | None = None
    start: float | None = None
    stop: float | None = None
    cfg_scale: float = 4.0
    num_steps: int = 25
    scheduler: str | None = None
    strength: float = 0.6

    @property
    def sampling(self) -> Sampling:
        """Options of the sampler."""
        return Sampling(self.num_steps, self.cfg_scale, self.scheduler, self.strength)

    @property
    def cost_key(self) -> tuple[Any, ...]:
        """Key that is equal for cells that can share a batch: they may differ in the scale and the weight of CFG."""
        others = [getattr(self, axis) for axis in AXES if axis not in ("scale", "cfg_scale")]
        return self.scale != 0, self.cfg_scale != 1, *others

    @property
    def values(self) -> tuple[Any, ...]:
        """Values of all axes."""
        return tuple(getattr(self, axis) for axis in AXES)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for YAML."""
        return dataclasses.asdict(self) | {"guide": list(self.guide)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """Read the values that :meth:`to_dict` returned."""
        return cls(**{**values, "guide": tuple(values["guide"])})


def combine_axes(axes: Mapping[str, Sequence[Any]], combine: str = "product") -> list[dict[str, Any]]:
    """Combine the values of axes: all combinations (product), or one by one (zip; single values repeat).

    >>> combine_axes({"scale": [1, 2], "num_steps": [15, 25]}, "zip")
    [{'scale': 1, 'num_steps': 15}, {'scale': 2, 'num_steps': 25}]
    """
    if combine == "product":
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    lengths = {name: len(values) for name, values in axes.items() if len(values) > 1}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise UserError(f"Expected zipped axes of one length, but {shown}; or set combine=product.")
    n = max(lengths.values(), default=1)
    return [{k: v[i % len(v)] for k, v in axes.items()} for i in range(n)]


def plan_cells(
    axes: Mapping[str, Sequence[Any]],
    *,
    combine: str = "product",
    baseline: bool = True,
    matched: Sequence[float] = (),
    known: Sequence[Cell] = (),
    unnamed: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """Make the cells of a sweep.

    Args:
        axes: The values of each of :data:`AXES`.
        combine: "product" or "zip".
        baseline: Add an unguided cell for each way of sampling.
        matched: Weights of classifier-free guidance at which to add unguided cells for each scheduler and number of
            steps.
        known: Existing cells, which keep their names.
        unnamed: Axis -> the value that names do not mention; None: that of each axis with a single value.

    Returns:
        The cells, in the order of columns: unguided, guided, plain classifier-free guidance.
    """
    unnamed = single_values(axes) if unnamed is None else unnamed
    points: dict[Kind, list[dict[str, Any]]] = {"unguided": [], "guided": [], "matched": []}
    for point in combine_axes(axes, combine):
        unguided = point | {"scale": 0.0} | _NO_GUIDE
        if baseline or not point["scale"]:
            points["unguided"].append(unguided)
        if point["scale"]:
            points["guided"].append(point)
        points["matched"] += [unguided | {"cfg_scale": float(weight)} for weight in matched]
    cells = {cell.values: cell for cell in known}
    labels = _Labels([cell.values for cell in known])
    for kind, same_kind in points.items():  # a cell that is both unguided and matched is called unguided
        for point in same_kind:
            values = tuple(point[axis] for axis in AXES)
            if values not in cells:
                cells[values] = Cell(_name(kind, point, unnamed, labels), **point)
    names = [cell.name for cell in cells.values()]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"Expected cells of different names, got two called '{duplicate}'; rename a head or guide.")
    return sorted(cells.values(), key=_order)


def single_values(axes: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the axes with a single value, and that value: names need not mention it."""
    return {axis: values[0] for axis, values in axes.items() if len(set(values)) == 1 and axis != "scale"}


def matched_scales(cfg_scale: float) -> list[float]:
    """Return larger weights of classifier-free guidance to compare guidance with.

    >>> matched_scales(4.0)
    [5.0, 6.0, 8.0, 12.0]
    """
    return [float(f"{cfg_scale + part * max(cfg_scale, 2.0):.4g}") for part in (0.25, 0.5, 1, 2)]


def varied_fields(cells: Sequence[Cell]) -> list[str]:
    """Return the record fields in which cells differ from their baseline on purpose, for ``eval.images``."""
    guided = [cell for cell in cells if cell.scale]  # unguided cells may always differ in cfg_scale
    compared = {axis: guided if axis == "cfg_scale" else cells for axis in SAMPLING_AXES}
    varied = [axis for axis, some in compared.items() if len({getattr(cell, axis) for cell in some}) > 1]
    return ["start" if axis == "strength" else axis for axis in varied]  # where records keep the strength


class _Labels:
    """Short labels for the values of axes, unique within an axis."""

    def __init__(self, known: Sequence[tuple[Any, ...]]) -> None:
        self._of: dict[tuple[str, Any], str] = {}
        for values in known:
            for axis, value in zip(AXES, values, strict=True):
                self.of(axis, value)

    def of(self, axis: str, value: Any) -> str:
        if (axis, value) not in self._of:
            taken = {label for (other, _), label in self._of.items() if other == axis}
            label, number = _label(axis, value), 2
            while label in taken:
                label, number = f"{_label(axis, value)}~{number}", number + 1
            self._of[axis, value] = label
        return self._of[axis, value]


def _label(axis: str, value: Any) -> str:
    if isinstance(value, float | int):
        return f"{value:.10g}"
    if axis == "guide":
        value = "+".join(text.partition(":")[0] for text in value) if value else None
    if axis == "head" and value is not None:
        value = Path(value).name
    return "own" if value is None else re.sub(r"[^\w.+-]+", "-", str(value)).strip("-.")[:40]


def _name(kind: Kind, point: Mapping[str, Any], unnamed: Mapping[str, Any], labels: _Labels) -> str:
    words = {"guided": [arm_name(point["scale"])], "unguided": [UNGUIDED], "matched": []}[kind]
    for axis in _NAMED_AXES[kind]:
        varies = axis not in unnamed or unnamed[axis] != point[axis] or (kind, axis) == ("matched", "cfg_scale")
        absent = axis in ("guide", "head") and not point[axis]  # the name mentions the other one
        if varies and not absent:
            words.append(f"{axis}={labels.of(axis, point[axis])}")
    return ", ".join(words)


def _order(cell: Cell) -> tuple[Any, ...]:
    kind = 1 if cell.scale else 0 if cell.name.startswith(UNGUIDED) else 2
    texts = [str(value or "") for value in (cell.scheduler, cell.guide, cell.head)]
    ends = [-math.inf if value is None else value for value in (cell.start, cell.stop)]
    return kind, *texts, *ends, cell.num_steps, cell.cfg_scale, cell.scale


class ArmBuilder:
    """Build the arms of cells; cells with the same head or guides share them, loaded once.

    Args:
        head_options: Options of guidance by a head, for cells that name one.
    """

    def __init__(self, head_options: MidBlockGuide | None = None) -> None:
        self._head_options = head_options or MidBlockGuide()
        self._guides: dict[tuple[tuple[str, ...], str | None], list[Guide]] = {}

    def build(self, cell: Cell) -> Arm:
        """Build the arm of a cell."""
        arm = guide_arms(self.guides(cell), [cell.scale])[-1]
        return dataclasses.replace(arm, name=cell.name)

    def guides(self, cell: Cell) -> list[Guide]:
        """Return the guides of a cell, with its start and stop; none for scale 0."""
        if cell.scale == 0:
            return []
        key = cell.guide, cell.head
        if key not in self._guides:
            self._guides[key] = self._load(cell)
        return [guide.within(cell.start, cell.stop) for guide in self._guides[key]]

    def _load(self, cell: Cell) -> list[Guide]:
        guides: list[Guide]
        if cell.guide:
            guides = [read_guide(text) for text in cell.guide]
        elif cell.head:
            guides = [dataclasses.replace(self._head_options, head=cell.head)]
        else:
            raise missing_head(cell.scale)
        for guide in guides:
            guide.load()  # copies share it
        return guides


def read_axes(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Read the values of the axes.

    Args:
        given: Axis -> a value or a list of them.

    >>> read_axes({"scale": [1, -2], "guide": None})
    {'scale': [1.0, -2.0], 'guide': [()]}
    """
    axes = {}
    for name in (axis for axis in AXES if axis in given):
        values = given[name] if isinstance(given[name], list | tuple) else [given[name]]
        if not values:
            raise UserError(
                f"Expected one value or more for '{name}', got an empty list; leave it out for its default."
            )
        read = _read_guides if name == "guide" else functools.partial(_read_value, name)
        axes[name] = list(dict.fromkeys(read(value) for value in values))  # distinct
    return axes


_NUMBER = (int, float), "a number or a list of numbers"
_NUMBER_OR_NONE = (int, float, types.NoneType), "a number or a list of numbers"
_TEXT_OR_NONE = (str, types.NoneType), "text or a list of texts"

#: Axis -> the types of its values, and their description.
_TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("scale", "cfg_scale", "strength"), _NUMBER),
    **dict.fromkeys(("start", "stop"), _NUMBER_OR_NONE),
    **dict.fromkeys(("head", "scheduler"), _TEXT_OR_NONE),
    "num_steps": ((int,), "whole numbers"),
}


def _read_value(name: str, value: Any) -> Any:
    kinds, expected = _TYPES[name]
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UserError(f"Expected {expected} for '{name}', got {value!r}.")
    if name == "scheduler" and value is not None:
        find_scheduler(value)
    if float not in kinds or value is None:
        return value
    if not math.isfinite(value):
        raise UserError(f"Expected a finite number for '{name}', got {value}; give another value.")
    return Sampling(strength=float(value)).strength if name == "strength" else float(value)


def _read_guides(value: Any) -> tuple[str, ...]:
    """Read one guide, or several that act together; none for the head."""
    texts = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"Expected guides as NAME:key=value,..., got {value!r}.")
    return tuple(texts)
