"""Arms from folders: pairing, the audit, and bad input: each refused with a sentence, or left out and counted."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from test_eval_images import record as make_record

from eval.comparison.arms import load_arms
from guidance.runs.records import Record, RecordStore
from guidance.utils.errors import UserError

PROMPTS = ["a red boat", "a green tree", "a blue kite"]


def picture(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def record(arm: str, i: int, **changes) -> Record:
    guides = [{"method": "midblock", "name": "aesthetic", "guidance_scale": 1.0}] if arm != "unguided" else []
    same = {"prompt_id": f"p{i}", "guides": guides, "image": f"images/{arm}/p{i}.png"}
    return make_record(arm, i, PROMPTS[i], **same | changes)


@pytest.fixture
def run(tmp_path):
    """A run folder of two arms of three prompts."""

    def make(name: str = "run", arms=("unguided", "scale=1"), rows=range(3), **changes):
        store = RecordStore(tmp_path / name)
        for a, arm in enumerate(arms):
            for i in rows:
                store.append(record(arm, i, **changes.get(arm, {})), picture(10 * a + i))
        return store.folder

    return make


@pytest.fixture
def plain(tmp_path):
    """A plain folder of three images."""

    def make(name: str, names=("a", "b", "c"), suffix=".png", size=8):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for i, stem in enumerate(names):
            Image.fromarray(picture(i, size)).save(folder / f"{stem}{suffix}")
        return folder

    return make


def test_arms_of_a_run_are_paired_row_by_row(run) -> None:
    arms = load_arms([run()])
    assert arms.names == ["unguided", "scale=1"] and arms.audited and not arms.excluded
    assert [i.pair for i in arms.images["unguided"]] == [i.pair for i in arms.images["scale=1"]]
    assert [row.prompt for row in arms.rows] == PROMPTS
    assert np.array_equal(np.asarray(arms.images["scale=1"][2].open()), picture(12))


def test_one_arm_alone_is_measured_without_a_comparison(run) -> None:
    assert load_arms([run(arms=("unguided",))]).names == ["unguided"]


def test_two_checkpoints_are_compared_only_when_they_are_meant_to_differ(run) -> None:
    one = run("v1-4", arms=("unguided",))
    other = run("v1-5", arms=("unguided",), unguided={"model_fingerprint": "def"})
    with pytest.raises(UserError, match=r"v1-4.*v1-5.*model_fingerprint differs"):
        load_arms([one, other])
    arms = load_arms([one, other], vary=["model_fingerprint"])
    assert arms.names == ["v1-4", "v1-5"] and arms.audited


def test_arms_of_several_runs_are_called_after_their_folders(run) -> None:
    names = set(load_arms([run("a"), run("b")], baseline="b/unguided").names)
    assert names == {"a/unguided", "a/scale=1", "b/unguided", "b/scale=1"}


def test_plain_cfg_may_differ_in_its_weight_and_guided_arms_may_not(run) -> None:
    other = {"unguided, CFG 8": {"cfg_scale": 8.0, "guides": []}}
    arms = load_arms([run("cfg", arms=("unguided", "unguided, CFG 8"), **other)])
    assert arms.names == ["unguided", "unguided, CFG 8"]
    with pytest.raises(UserError, match="cfg_scale differs"):
        load_arms([run("guided", **{"scale=1": {"cfg_scale": 8.0}})])


def test_other_noise_is_refused(run) -> None:
    with pytest.raises(UserError, match="noise_hash differs"):
        load_arms([run(**{"scale=1": {"noise_hash": "other"}})])


def test_an_arm_without_the_baselines_seeds_is_refused_or_left_out(run) -> None:
    folder = run()
    store = RecordStore(folder)
    store.append(dataclasses.replace(record("unguided", 0), seed=9, image="images/more.png"), picture(5))
    with pytest.raises(UserError, match=r"'scale=1' lacks 'p0', seed 9 of 4"):
        load_arms([folder])
    arms = load_arms([folder], exclude=True)
    assert len(arms.rows) == 3 and arms.excluded == {"no image in 'scale=1'": ["'p0', seed 9"]}


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_missing_or_cut_image_is_refused_or_left_out(run, harm) -> None:
    folder = run()
    file = folder / "images/scale=1/p1.png"
    file.unlink() if harm == "missing" else file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"p1.png.*(missing|not the one that was recorded)"):
        load_arms([folder])
    arms = load_arms([folder], exclude=True)
    assert [row.prompt_id for row in arms.rows] == ["p0", "p2"]
    assert sum(map(len, arms.excluded.values())) == 1


def test_plain_folders_are_paired_by_name_and_said_to_be_unaudited(plain) -> None:
    arms = load_arms([plain("one"), plain("two", suffix=".webp")], baseline="two")
    assert arms.names == ["two", "one"] and not arms.audited
    assert [row.prompt_id for row in arms.rows] == ["a", "b", "c"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_plain_folders_take_prompts_from_a_table(plain, tmp_path, form) -> None:
    rows = [{"file_name": f"{n}.png", "text": f"a {n}", "category": "letters"} for n in "abc"]
    table = tmp_path / f"prompts.{form}"
    with table.open("w", newline="") as stream:
        if form == "csv":
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    arms = load_arms([plain("one"), plain("two")], prompts=table)
    assert [row.prompt for row in arms.rows] == ["a a", "a b", "a c"]
    assert arms.rows[0].category == "letters"
    with pytest.raises(UserError, match="Expected a row for 'd'"):
        load_arms([plain("more", names="abcd"), plain("two")], prompts=table)


def test_images_of_one_prompt_are_its_seeds(plain, tmp_path) -> None:
    table = tmp_path / "prompts.csv"
    table.write_text("file_name,prompt\na.png,a hen\nb.png,a hen\nc.png,a fox\n")
    arms = load_arms([plain("one"), plain("two")], prompts=table)
    assert [row.pair for row in arms.rows] == [("a hen", 0), ("a hen", 1), ("a fox", 0)]


def test_other_modes_and_sizes_are_converted_and_counted(plain) -> None:
    folder = plain("odd")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "a.png")
    Image.new("L", (16, 8), 7).save(folder / "b.png")
    arms = load_arms([plain("one"), folder])
    assert arms.converted == {"mode RGBA": 1, "mode L": 1, "16x8 instead of 8x8": 1}
    assert arms.images["odd"][0].open().getpixel((0, 0)) == (255, 255, 255)


def test_folders_that_cannot_be_compared_are_refused(plain, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    broken, one = plain("broken"), plain("one")
    (broken / "a.png").write_bytes(b"not an image")
    for message, folders in {
        "Expected images .* or records in": [tmp_path / "empty"],
        "Expected a folder of images": [tmp_path / "nowhere"],
        "lacks 'd', seed 0 of 4": [one, plain("more", names="abcd")],
        "it cannot be read": [one, broken],
        "Expected one or more folders": [],
        "Expected two or more pairs": [plain("single", names="a")],
    }.items():
        with pytest.raises(UserError, match=message):
            load_arms(folders)


def test_two_files_of_one_name_are_two_seeds_of_nobody(plain) -> None:
    folder = plain("twice")
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    with pytest.raises(UserError, match="lacks 'a', seed 1"):
        load_arms([plain("one"), folder])


def test_a_name_with_a_typo_names_the_nearest(run) -> None:
    folder = run()
    with pytest.raises(UserError, match="Did you mean 'scale=1'"):
        load_arms([folder], only=["scale=11"])
    with pytest.raises(UserError, match="Did you mean 'unguided'"):
        load_arms([folder], baseline="ungided")
