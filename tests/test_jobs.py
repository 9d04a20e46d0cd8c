"""Jobs of scripts: prompts, or images that are changed towards edited captions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import make_head

from guidance.data.edits import load_edit_pairs
from guidance.data.prompts import load_prompts
from guidance.guides import MidBlockGuide
from guidance.runs.arms import guide_arms
from guidance.runs.records import RecordStore
from guidance.runs.run import Sampling, list_jobs, read_jobs, sample_arms
from guidance.sampling import sample_images
from guidance.sampling.start import FromImage, encode_images
from guidance.utils.errors import UserError
from sample import guided, sweep


def edits(n: int = 3, **options):
    return read_jobs([], n, 1, 0, edits="testbed:test", **options)


def test_prompts_are_listed_as_ever() -> None:
    assert read_jobs("testbed", 5, 2, 3) == list_jobs(load_prompts("testbed", 5, 3), 2, 3)
    assert [job.prompt.text for job in read_jobs(["a hen", "a fox"], 1, 1, 0)] == ["a hen", "a fox"]


def test_edits_start_with_their_images_and_end_as_the_loop_says(tiny_pipe, tmp_path) -> None:
    pairs, jobs = load_edit_pairs("testbed:test", 3), edits()
    assert [job.prompt.text for job in jobs] == [pair.edited_caption for pair in pairs]
    store = RecordStore(tmp_path)
    arms = guide_arms([MidBlockGuide(make_head(tiny_pipe))], [2.0])
    half, more = Sampling(num_steps=4, strength=0.5), Sampling(num_steps=4, strength=0.7)
    sample_arms(tiny_pipe, jobs, arms, store, half, model="tiny", progress=False)
    latents = encode_images(tiny_pipe, [np.asarray(pair.image) for pair in pairs])
    wanted = sample_images(
        tiny_pipe,
        [p.edited_caption for p in pairs],
        [job.seed for job in jobs],
        start=FromImage(latents, 0.5),
        num_steps=4,
    )
    from eval.comparison.arms import load_images

    records = [store.get("unguided", job.prompt.id, job.seed) for job in jobs]
    assert np.abs(load_images(store.folder, records).astype(int) - wanted).max() <= 1
    assert records[0].start == {"image": jobs[0].start.digest, "strength": 0.5}
    assert sample_arms(tiny_pipe, jobs, arms, store, half, model="tiny", progress=False) == 0
    with pytest.raises(UserError, match="to be made with start="):
        sample_arms(tiny_pipe, jobs, arms, store, more, model="tiny", progress=False)


def test_both_scripts_take_edits(tiny_pipe, tiny_folder, tmp_path) -> None:
    words = [f"model={tiny_folder}", "edits=testbed:test", "num_prompts=2", "num_steps=3", "head=null"]
    words += ["seeds_per_prompt=1"]
    guided.main([*words, "scales=[0]", f"output={tmp_path / 'one'}"])
    sweep.main([*words, "scale=0", "cfg_scale=[2, 4]", "cfg_matched=false", f"output={tmp_path / 'grid'}"])
    lines = [json.loads(line) for line in (tmp_path / "grid" / "records.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["start"]["strength"] == 0.6 for line in lines)
    one = {r.key[1:]: r.sha256 for r in RecordStore(tmp_path / "one").load()}
    four = [r for r in RecordStore(tmp_path / "grid").load() if r.cfg_scale == 4]
    assert {r.key[1:]: r.sha256 for r in four} == one


def test_edits_without_images_are_refused(tmp_path) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text(json.dumps({"input": "a hen", "edit": "make it a fox", "output": "a fox"}) + "\n")
    with pytest.raises(UserError, match="name others"):
        read_jobs([], None, 1, 0, edits=str(file))
