"""The plan of a sweep: how axes become cells, what cells are called, and what is counted before it runs."""

from __future__ import annotations

import itertools

import pytest

from guidance.runs.sweep import (
    AXES,
    Cell,
    combine_axes,
    matched_scales,
    plan_cells,
    read_axes,
    single_values,
    varied_fields,
)
from guidance.utils.errors import UserError

ONE = dict(zip(AXES, ([1.0], [()], ["h"], [None], [None], [4.0], [25], ["ddim"], [0.6]), strict=True))


def names(**options) -> list[str]:
    axes = {axis: options.pop(axis, ONE[axis]) for axis in AXES}
    return [cell.name for cell in plan_cells(axes, **options)]


def test_product_and_zip() -> None:
    axes = {"a": [1, 2, 3], "b": [4, 5], "c": [6]}
    product = combine_axes(axes)
    assert [tuple(p.values()) for p in product] == list(itertools.product(*axes.values()))
    assert [p["a"] * 10 + p["b"] for p in combine_axes({**axes, "b": [4, 5, 6]}, "zip")] == [14, 25, 36]
    assert combine_axes({"a": [1], "b": [2]}, "zip") == [{"a": 1, "b": 2}]
    with pytest.raises(UserError, match="a has 3, b has 2"):
        combine_axes(axes, "zip")


def test_names_say_what_varies() -> None:
    assert names() == ["unguided", "scale=1"]
    assert names(scale=[-1.0, 0.5]) == ["unguided", "scale=-1", "scale=0.5"]
    assert names(scale=[2.0], num_steps=[15, 25]) == [
        "unguided, num_steps=15",
        "unguided, num_steps=25",
        "scale=2, num_steps=15",
        "scale=2, num_steps=25",
    ]
    wide = names(scale=[2.0], cfg_scale=[4.0, 6.0], num_steps=[15, 25])
    assert "scale=2, cfg_scale=6, num_steps=15" in wide and "unguided, cfg_scale=6, num_steps=15" in wide
    assert names(head=["runs/heads/a", "other/b"], start=[0.0, None])[1:] == [
        "scale=1, head=b, start=own",
        "scale=1, head=b, start=0",
        "scale=1, head=a, start=own",
        "scale=1, head=a, start=0",
    ]


def test_values_that_look_alike_get_different_names() -> None:
    found = names(head=["x/a", "y/a"], baseline=False)
    assert sorted(found) == ["scale=1, head=a", "scale=1, head=a~2"]
    guides = [("clip",), ("clip:cutouts=4",), ("clip", "aesthetic"), ()]
    found = names(guide=guides, baseline=False)
    assert len(set(found)) == 4 and "scale=1, guide=clip+aesthetic" in found
    for name in names(head=["../../etc/x y", "a/b:c"]):
        assert "/" not in name and len(name.encode()) < 200
    many = names(scale=[float(i) for i in range(-9, 9)], num_steps=[1, 2, 3], cfg_scale=[1.0, 2.0])
    assert len(many) == len(set(many)) == 18 * 6


def test_baseline_and_matched_cells() -> None:
    assert names(baseline=False) == ["scale=1"]
    assert names(scale=[0.0, 1.0], baseline=False) == ["unguided", "scale=1"]
    assert names(scale=[0.0]) == ["unguided"]
    assert names(matched=[6.0, 8.0]) == ["unguided", "scale=1", "cfg_scale=6", "cfg_scale=8"]
    assert names(matched=[4.0, 6.0]) == ["unguided", "scale=1", "cfg_scale=6"]  # 4 is the baseline
    both = names(matched=[6.0], cfg_scale=[4.0, 6.0])
    assert both[:2] == ["unguided, cfg_scale=4", "unguided, cfg_scale=6"] and len(both) == 4
    assert "cfg_scale=6, num_steps=15" in names(matched=[6.0], num_steps=[15, 25])
    assert matched_scales(1.0) == [1.5, 2.0, 3.0, 5.0] and min(matched_scales(7.5)) > 7.5


def test_every_cell_is_of_its_kind() -> None:
    axes = {**ONE, "scale": [0.0, 2.0], "start": [0.1, 0.2], "cfg_scale": [1.0, 3.0]}
    cells = plan_cells(axes, matched=[5.0])
    assert len(cells) == 2 + 4 + 1
    for cell in cells:
        assert (cell.head is None) == (cell.start is None) == (cell.scale == 0)
        assert Cell.from_dict(cell.to_dict()) == cell
        assert (cell.sampling.cfg_scale, cell.sampling.num_steps) == (cell.cfg_scale, 25)
    assert varied_fields(cells) == ["cfg_scale"] and varied_fields(plan_cells(ONE, matched=[5.0])) == []


def test_added_values_leave_what_is_there() -> None:
    first = plan_cells(ONE, matched=[6.0])
    unnamed = single_values(ONE)
    axes = {**ONE, "scale": [1.0, 2.0], "num_steps": [25, 50], "head": ["h", "g/h"]}
    more = plan_cells(axes, known=first, unnamed=unnamed)
    assert set(first) < set(more)
    added = {cell.name for cell in more} - {cell.name for cell in first}
    assert {"scale=2", "scale=1, num_steps=50", "unguided, num_steps=50", "scale=2, head=h~2"} <= added
    again = plan_cells(ONE, known=more, unnamed=unnamed)
    assert again == more


def test_axes_are_read_from_what_a_user_writes() -> None:
    found = read_axes(
        {"scale": 2, "num_steps": [15, 15, 25], "guide": ["a", ["b", "c"]], "head": None, "stop": [None, 1]}
    )
    assert found == {
        "scale": [2.0],
        "guide": [("a",), ("b", "c")],
        "head": [None],
        "stop": [None, 1.0],
        "num_steps": [15, 25],
    }
