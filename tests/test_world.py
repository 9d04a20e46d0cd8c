"""The testbed world as data: captions that can be read back, splits that share nothing, rows that repeat."""

from __future__ import annotations

import dataclasses
import hashlib

import datasets
import numpy as np
import pytest

from guidance.testbed.data import draw_edit_pairs, load_testbed, vote
from guidance.testbed.render import object_area, render
from guidance.testbed.scenes import (
    FLYING,
    HIDDEN,
    SPLITS,
    combinations,
    parse_caption,
    prompts,
    sample_scene,
    scenes,
)  # fmt: skip
from guidance.testbed.truth import rating, truth_score
from guidance.utils.errors import UserError

CAPTIONED = ("object", "colour", "time", "terrain", "place", "second_object", "second_colour")


def key(scene) -> tuple:
    return scene.time, scene.terrain, scene.object, scene.colour


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_read_back(split: str) -> None:
    for scene in scenes(split, 400):
        assert parse_caption(scene.caption) == {name: getattr(scene, name) for name in CAPTIONED}


def test_caption_case_and_spaces_do_not_matter() -> None:
    assert parse_caption(" A red  balloon over the Sea at dusk\n")["terrain"] == "sea"


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red balloon",
        "a pink balloon over the sea at dusk",
        "a red balloon in the sea at dusk",  # the grammar says over
        "a red balloon over the sea at dusk, oil painting",
        "a red balloon and a tree over the sea at dusk",
        "a red balloon on the top over the sea at dusk",
    ],
)
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(UserError, match="Expected a caption"):
        parse_caption(caption)


def test_the_scenes_are_those_the_shipped_weights_were_trained_on() -> None:
    text = "".join(repr(s) for split in SPLITS for s in scenes(split, 300))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "04378f1f22065e07"


def test_splits_share_no_seed_and_no_combination() -> None:
    drawn = {split: [s for seed in (0, 1) for s in scenes(split, 700, seed=seed)] for split in SPLITS}
    for what in (lambda s: s.seed, key, lambda s: s.caption):
        sets = [{what(s) for s in drawn[split]} for split in SPLITS]
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert all(len({s.seed for s in found}) == len(found) for found in drawn.values())
    everything = [c for split in SPLITS for c in combinations(split)]
    assert len(everything) == len(set(everything)) == 4 * 5 * 8 * 6


def test_there_are_over_a_thousand_captions() -> None:
    assert len({s.caption for s in scenes("train", 2000)}) > 1000
    assert len(set(prompts("test", 500))) == 500


def test_rows_have_all_columns_and_true_values() -> None:
    data = load_testbed("test", 5)
    assert isinstance(data, datasets.Dataset)
    known = ["time", "terrain", "object", "colour", "place", "second_object", "second_colour", *HIDDEN]
    assert data.column_names == ["image", "caption", "rating", "truth", *known, "scene_seed"]
    for index, row in enumerate(data):
        scene = sample_scene("test", index)
        image = np.asarray(row["image"])
        np.testing.assert_array_equal(image, render(scene))
        assert row["truth"] == pytest.approx(truth_score(image[None])[0], abs=1e-5)
        assert all(row[name] == getattr(scene, name) for name in (*CAPTIONED, "haze", "tilt"))
        assert (row["caption"], row["scene_seed"]) == (scene.caption, scene.seed)
        assert row["rating"] in range(1, 11)


def test_the_area_of_an_object_holds_its_pixels_whatever_it_is() -> None:
    """Scenes that differ in the object alone differ inside the area alone, and all objects have the same area."""
    for scene in [s for s in scenes("train", 40) if not s.second_object and s.object not in FLYING][:12]:
        scene = dataclasses.replace(scene, haze=0.0, defocus=0.0, terrain="hills")
        area = object_area(scene, size=16)
        assert 0.05 < area.mean() < 0.35
        for other in ("house", "tower", "car", "tent"):
            changed = dataclasses.replace(scene, object=other)
            assert np.array_equal(object_area(changed, size=16), area)
            differs = np.abs(render(scene).astype(int) - render(changed)).max(-1) > 8
            inside = np.repeat(np.repeat(area > 0, 4, 0), 4, 1)
            assert not (differs & ~inside).any()


def test_rows_depend_on_their_index_alone() -> None:
    whole = load_testbed("validation", 120).remove_columns("image").to_dict()
    part = load_testbed("validation", 20, start=95, workers=2).remove_columns("image").to_dict()
    assert part["rating"] == whole["rating"][95:115]
    assert part["caption"] == whole["caption"][95:115]
    np.testing.assert_allclose(part["truth"], whole["truth"][95:115], atol=1e-5)
    other = load_testbed("validation", 20, start=95, seed=1)
    assert other["caption"] != part["caption"]


def test_workers_draw_the_same() -> None:
    one, two = (load_testbed("train", 150, workers=w).remove_columns("image").to_dict() for w in (1, 2))
    assert one == two


def test_the_noise_of_a_vote_belongs_to_the_scene() -> None:
    scene, other = sample_scene("train", 0), sample_scene("train", 1)
    assert vote(scene, 0.3) == vote(scene, 0.3)
    grid = np.linspace(-2, 2, 40)
    assert [vote(scene, t) for t in grid] != [vote(other, t) for t in grid]
    assert (np.diff([vote(scene, t) for t in grid]) >= 0).all()  # one draw of noise, whatever the truth
    seeds = np.arange(3000)
    draws = np.array([rating(0.0, np.random.default_rng([s, 11])) for s in seeds])
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.06  # neighbouring scenes vote independently


def test_edit_pairs_change_one_attribute_and_stay_in_their_split() -> None:
    allowed = set(combinations("test"))
    pairs = draw_edit_pairs("test", 30)
    assert pairs.column_names[:5] == ["image", "caption", "instruction", "edited_caption", "edited_image"]
    for row in pairs:
        before, after = parse_caption(row["caption"]), parse_caption(row["edited_caption"])
        changed = [name for name in CAPTIONED if before[name] != after[name]]
        assert len(changed) == 1
        assert after[changed[0]] in row["instruction"]
        assert tuple(after[name] for name in ("time", "terrain", "object", "colour")) in allowed
        assert (np.asarray(row["image"]) != np.asarray(row["edited_image"])).any()
    again = draw_edit_pairs("test", 10)
    assert again["instruction"] == pairs["instruction"][:10]


def test_an_unknown_split_names_the_nearest() -> None:
    for draw in (draw_edit_pairs, load_testbed):
        with pytest.raises(UserError, match="Did you mean 'test'"):
            draw("tset", 3)


def test_more_prompts_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guidance.testbed.scenes.sample_scene", lambda *_: sample_scene("test", 0))
    with pytest.raises(UserError, match="ask for fewer"):
        prompts("test", 2)
