"""Cells of equal cost share a batch, a strength is an axis, and the images are those of each cell by itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_head
from PIL import Image

from guidance import MidBlockGuide
from guidance.data.prompts import Prompt
from guidance.heads import save_head
from guidance.models.denoiser import fingerprint
from guidance.runs.arms import Arm
from guidance.runs.records import RecordStore
from guidance.runs.run import Job, list_batches
from guidance.runs.sweep import Cell
from guidance.runs.sweep_run import list_units
from guidance.sampling import sample_latents
from guidance.sampling.cfg import ClassifierFree
from sample.sweep import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def words(tiny_pipe, tiny_folder, tmp_path_factory) -> list[str]:
    """A command line of two images a cell, without scales and output."""
    folder = tmp_path_factory.mktemp("heads") / "random"
    save_head(make_head(tiny_pipe, hidden=16, base_fingerprint=fingerprint(tiny_pipe.unet)), folder)
    options = ["num_steps=4", "device=cpu", "start=null", "seeds_per_prompt=2", f"model={tiny_folder}"]
    options += [f"head={folder}", 'prompts=["a red house"]', "cfg_matched=false"]
    return [*options, "cfg_scales_matched=[]"]


def read_images(folder: Path) -> dict[tuple[str, str, int], np.ndarray]:
    return {r.key: np.asarray(Image.open(folder / r.image)).astype(int) for r in RecordStore(folder).load()}


def test_cells_of_equal_cost_share_a_batch(words, tmp_path: Path) -> None:
    grid = [*words, "scale=[-2, 1, 3]", "cfg_scale=[1, 2, 4]"]
    for size in (2, 8):
        main([*grid, f"batch_size={size}", f"output={tmp_path / str(size)}"])
    one, many = (read_images(tmp_path / str(size)) for size in (2, 8))
    assert set(one) == set(many) and len(one) == 24
    assert max(np.abs(one[key] - many[key]).max() for key in one) <= 1
    assert max(np.abs(one[key] - one["unguided, cfg_scale=2", *key[1:]]).max() for key in one) > 1
    records = {r.arm: r for r in RecordStore(tmp_path / "8").load()}
    sizes = {name: r.batch_size for name, r in records.items()}
    assert all(sizes[f"scale={s}, cfg_scale=1"] == 6 for s in (-2, 1, 3))  # three guided cells without CFG
    guided = sorted(sizes[f"scale={s}, cfg_scale={w}"] for s in (-2, 1, 3) for w in (2, 4))
    assert guided == [4] * 2 + [8] * 4
    assert sizes["unguided, cfg_scale=1"] == 2 and sizes["unguided, cfg_scale=4"] == 4
    assert records["scale=3, cfg_scale=4"].cfg_scale == 4.0
    assert records["scale=3, cfg_scale=4"].guides[0]["guidance_scale"] == 3.0


def test_units_hold_every_image_once_and_are_no_larger_than_a_batch() -> None:
    cells = [Cell(f"{s} {w} {n}", s, cfg_scale=w, num_steps=n) for s in (0, 1, 2) for w in (2, 3) for n in (4, 9)]
    arms = {cell.name: Arm(cell.name) for cell in cells}
    for number in (1, 2, 5, 7):
        jobs = [Job(Prompt("p", ""), seed) for seed in range(number)]
        for size in (1, 4, 8, 64):
            units = list_units(cells, jobs, arms, size)
            keys = [task.key for unit in units for task in unit]
            assert len(keys) == len(set(keys)) == number * len(cells)
            assert max(map(len, units)) <= size
            if number > size // 2:
                assert [tuple(t.job for t in u) for u in units[:: len(cells)]] == list_batches(jobs, size)
            costs = [{(t.arm.name[0] == "0", t.sampling.num_steps) for t in unit} for unit in units]
            assert all(len(cost) == 1 for cost in costs)


@torch.no_grad()
def test_a_scale_for_each_sample_is_each_scale_by_itself(tiny_pipe) -> None:
    head = make_head(tiny_pipe)
    prompts, seeds, weights, factors = ["a", "b", "c"], [1, 2, 3], [2.0, 3.0, 5.0], [0.5, 1.0, -2.0]
    for options in ({}, {"normalize": None}, {"every": 2}):
        mixed = sample_latents(
            tiny_pipe,
            prompts,
            seeds,
            num_steps=4,
            cfg_scale=weights,
            guides=[MidBlockGuide(head, 2.0, **options)],
            guide_factors=factors,
        )
        for i, (w, factor) in enumerate(zip(weights, factors, strict=True)):
            guides = [MidBlockGuide(head, 2.0 * factor, **options)]
            alone = sample_latents(
                tiny_pipe, prompts[i : i + 1], seeds[i : i + 1], num_steps=4, cfg_scale=w, guides=guides
            )
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_rescale_and_interval_take_several_weights() -> None:
    uncond, cond = torch.randn(2, 2, 4, 3, 3).unbind(0)
    both = ClassifierFree((2.0, 5.0), rescale=0.7, start=0.5)
    for fraction in (0.2, 0.5):
        found = both.combine(uncond, cond, fraction)
        for i, w in enumerate((2.0, 5.0)):
            one = ClassifierFree(w, rescale=0.7, start=0.5).combine(uncond[i : i + 1], cond[i : i + 1], fraction)
            torch.testing.assert_close(found[i : i + 1], one)


def test_strength_is_an_axis(words, tmp_path: Path, capsys) -> None:
    edits = [*(w for w in words if not w.startswith("prompts")), "edits=testbed:test", "num_prompts=1"]
    folder = tmp_path / "out"
    main([*edits, "scale=2", "strength=[0.5, 1]", f"output={folder}"])
    records = RecordStore(folder).load()
    names = ["unguided, strength=0.5", "unguided, strength=1", "scale=2, strength=0.5", "scale=2, strength=1"]
    assert sorted({r.arm for r in records}) == sorted(names) and len(records) == 8
    assert {(r.arm[-3:], r.start["strength"]) for r in records} == {("0.5", 0.5), ("h=1", 1.0)}
    images = read_images(folder)
    half, whole = (images[key] for key in sorted(images) if key[0].startswith("unguided") and key[2] == 0)
    assert np.abs(half - whole).max() > 1
    main([*edits, "scale=2", "strength=[0.5, 1]", f"output={folder}", "--dry-run"])
    plan = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert plan[names[0]][-3] == "4" and plan[names[1]][-3] == "8"  # calls of half and of all of four steps
    assert json.dumps(records[0].start)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["strength=[0.5, 0.7]"], "Expected edits with several strengths"),
        (["edits=testbed:test", "strength=[0.5, 1.5]"], "strength above 0 and up to 1, got 1.5"),
    ],
)
def test_bad_strengths_get_a_sentence(words, tmp_path: Path, capsys, more, message) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*words, "scale=1", f"output={tmp_path / 'bad'}", *more])
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
