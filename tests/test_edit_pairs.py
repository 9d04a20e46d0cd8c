"""Edit pairs: the testbed's own, every kind of file, a stand-in of the hub, and bad input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from guidance.data.edits import EditPair, load_edit_pairs
from guidance.testbed.data import draw_edit_pairs
from guidance.utils.errors import UserError

WORDS = ["cat", "dog", "fox", "hen"]


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def hub_rows() -> list[dict[str, object]]:
    """Rows as timbrooks/instructpix2pix-clip-filtered has them; the last repeats the texts of the first."""
    rows = [
        {
            "original_prompt": f"a {word}",
            "original_image": {"bytes": png(i), "path": None},
            "edit_prompt": "paint it blue",
            "edited_prompt": f"a blue {word}",
            "edited_image": {"bytes": png(100 + i), "path": None},
        }
        for i, word in enumerate(WORDS)
    ]
    return [*rows, {**rows[0], "original_image": {"bytes": png(50), "path": None}}]


def hub_dataset() -> datasets.Dataset:
    image = {name: datasets.Image() for name in ("original_image", "edited_image")}
    text = {name: datasets.Value("string") for name in ("original_prompt", "edit_prompt", "edited_prompt")}
    return datasets.Dataset.from_list(hub_rows(), features=datasets.Features({**text, **image}))


def red(image: Image.Image | None) -> int:
    assert image is not None and image.mode == "RGB"
    return int(np.asarray(image)[0, 0, 0])


def check(pairs: list[EditPair]) -> None:
    assert [(p.caption, p.instruction, p.edited_caption) for p in pairs] == [
        (f"a {word}", "paint it blue", f"a blue {word}") for word in WORDS
    ]
    assert [red(p.image) for p in pairs] == [0, 1, 2, 3]
    assert [red(p.edited_image) for p in pairs] == [100, 101, 102, 103]


def test_parquet_and_a_folder_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "my pairs"
    folder.mkdir()
    hub_dataset().to_parquet(folder / "train-00000-of-00001.parquet")
    pairs = load_edit_pairs(folder / "train-00000-of-00001.parquet")
    check(pairs)
    assert [p.id for p in pairs] == [f"train-00000-of-00001-000{i}" for i in range(4)]
    check(load_edit_pairs(folder))
    assert load_edit_pairs(folder)[0].id == "my-pairs-0000"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_files_with_paths_of_images(tmp_path: Path, suffix: str) -> None:
    rows = []
    for i, word in enumerate(WORDS):
        (tmp_path / f"{i}_0.png").write_bytes(png(i))
        (tmp_path / f"{i}_1.png").write_bytes(png(100 + i))
        rows.append({"Input": f"a {word}", "edit": "paint it blue", "output": f"a  blue {word}\n"})
        rows[-1] |= {"image": f"{i}_0.png", "edited_image": f"{i}_1.png"}
    rows.append({**rows[0], "edit": ""})  # incomplete: left out
    file = tmp_path / f"pairs{suffix}"
    if suffix == ".csv":
        import pandas

        pandas.DataFrame(rows).to_csv(file, index=False)
    else:
        lines = [json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    check(load_edit_pairs(file))


def test_human_written_prompts_have_no_images(tmp_path: Path) -> None:
    file = tmp_path / "human-written-prompts.jsonl"
    file.write_text('{"input": "a cat", "edit": "make it a dog", "output": "a dog"}\n')
    (pair,) = load_edit_pairs(file)
    assert pair == EditPair("human-written-prompts-0000", "a cat", "make it a dog", "a dog")
    assert pair.image is None and pair.edited_image is None


def test_the_testbed_draws_its_own() -> None:
    pairs, drawn = load_edit_pairs("testbed:test", 6), draw_edit_pairs("test", 6)
    assert [p.caption for p in pairs] == list(drawn["caption"]) and len({p.id for p in pairs}) == 6
    assert [p.edited_caption for p in pairs] == list(drawn["edited_caption"])
    for pair, row in zip(pairs, drawn, strict=True):
        assert np.array_equal(np.asarray(pair.image), np.asarray(row["image"]))
        assert np.array_equal(np.asarray(pair.edited_image), np.asarray(row["edited_image"]))
    assert load_edit_pairs("testbed", 3) == pairs[:3]
    assert not {p.id for p in load_edit_pairs("testbed", 3, seed=1)} & {p.id for p in pairs}


def test_subsets_are_seeded_and_nested(tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    rows = [{"input": f"a {i}", "edit": "add one", "output": f"a {i + 1}"} for i in range(40)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    ten = load_edit_pairs(file, 10)
    assert load_edit_pairs(file, 4) == ten[:4] and ten != load_edit_pairs(file)[:10]
    assert load_edit_pairs(file, 10, seed=1) != ten and len(load_edit_pairs(file, 99)) == 40


def test_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, *, split: str, streaming: bool) -> datasets.IterableDataset:
        assert (path, split, streaming) == ("timbrooks/instructpix2pix-clip-filtered", "train", True)
        return hub_dataset().to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pairs = load_edit_pairs("instruct-pix2pix", 4)
    assert sorted(p.caption for p in pairs) == sorted(f"a {word}" for word in WORDS)
    assert load_edit_pairs("instruct-pix2pix", 2) == pairs[:2]
    assert {p.id for p in load_edit_pairs("timbrooks/instructpix2pix-clip-filtered", 9, seed=1)} == {
        p.id.replace("instruct-pix2pix", "instructpix2pix-clip-filtered") for p in pairs
    }
    for pair in pairs:
        assert red(pair.edited_image) == 100 + WORDS.index(pair.caption[2:])
    with pytest.raises(UserError, match="give n"):
        load_edit_pairs("instruct-pix2pix")


def test_bad_input_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "wrong.jsonl").write_text('{"input": "a cat", "edit": "make it a dog"}\n')
    with pytest.raises(UserError, match=r"Expected a column edited_prompt or .*got input, edit; rename"):
        load_edit_pairs(tmp_path / "wrong.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"input": "", "edit": "", "output": ""}\n')
    with pytest.raises(UserError, match="found none with all three texts"):
        load_edit_pairs(tmp_path / "empty.jsonl")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"Expected a dataset of edit pairs in .*cut.parquet"):
        load_edit_pairs(tmp_path / "cut.parquet")
    with pytest.raises(UserError, match="Did you mean 'testbed:test'"):
        load_edit_pairs("testbed:tset")
    (tmp_path / "lost.jsonl").write_text('{"input": "a", "edit": "b", "output": "c", "image": "none.png"}\n')
    with pytest.raises(UserError, match="Expected an image"):
        _ = load_edit_pairs(tmp_path / "lost.jsonl")[0].image


def test_the_hub_offline_says_what_to_fetch() -> None:
    with pytest.raises(UserError, match=r"human-written-prompts.jsonl .*edits=FILE"):
        load_edit_pairs("instruct-pix2pix", 2)
