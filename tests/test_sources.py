"""Datasets: every kind of source, splits that share no row, and refusals that name the row or the column."""

from __future__ import annotations

import io
import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from guidance.data.sources import SPLITS, check_ratings, decode_image, load_examples
from guidance.utils.errors import UserError
from guidance.utils.images import fit_image, to_rgb


@pytest.fixture(autouse=True)
def own_dataset_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf cache")


def png(i: int = 0, size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (i % 256, 30, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, **columns}), path)
    return path


def rated(path: Path, n: int = 200, **columns) -> Path:
    columns = {"caption": [f"picture {i // 4}" for i in range(n)], "rating": [i % 10 + 1 for i in range(n)], **columns}
    return write_parquet(path, [{"bytes": png(i), "path": None} for i in range(n)], **columns)


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: {"bytes": b, "path": None}])
def test_parquet_with_encoded_bytes(tmp_path: Path, wrap) -> None:
    file = write_parquet(tmp_path / "a b.parquet", [wrap(png(i)) for i in range(5)], caption=["x"] * 5, rating=[3] * 5)
    data = load_examples(file, "train", caption_column="caption")
    red = [decode_image(cell).getpixel((0, 0))[0] for cell in data["image"]]
    assert red == sorted(red) and set(red) <= set(range(5))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_files_that_name_images_beside_them(tmp_path: Path, kind: str) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(30):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
    frame = datasets.Dataset.from_dict({"file": [f"pictures/{i}.png" for i in range(30)], "rating": [4.5] * 30})
    file = tmp_path / f"data.{kind}"
    frame.to_csv(file, index=False) if kind == "csv" else frame.to_json(file)
    data = load_examples(file, "train", image_column="file", caption_column=None)
    assert decode_image(data[0]["file"]).size == (16, 16) and "rating" in data.column_names


def test_image_folder_with_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    lines = ["file_name,text,score"]
    for i in range(40):
        (folder / f"{i}.png").write_bytes(png(i))
        lines.append(f"{i}.png,a picture,{i % 10 + 1}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    data = load_examples(folder, "train", caption_column="text", target_columns=["score"], rating_column="score")
    assert 20 < len(data) <= 40 and decode_image(data[0]["image"]).mode == "RGB"


def test_missing_splits_are_carved_out_of_train(tmp_path: Path) -> None:
    file = rated(tmp_path / "a.parquet", row=list(range(200)))
    rows = {split: set(load_examples(file, split)["row"]) for split in SPLITS}
    assert set.union(*rows.values()) == set(range(200)) and sum(map(len, rows.values())) == 200
    assert 5 < len(rows["validation"]) < 40 and 5 < len(rows["test"]) < 40


def test_groups_stay_in_one_split(tmp_path: Path) -> None:
    file = rated(tmp_path / "a.parquet")
    groups = [set(load_examples(file, split, group_column="caption")["caption"]) for split in SPLITS]
    assert all(groups) and not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])


def test_a_split_column_is_followed(tmp_path: Path) -> None:
    names = (["train"] * 8 + ["val"] * 2) * 20
    file = rated(tmp_path / "a.parquet", split=names, row=list(range(200)))
    assert all(names[i] == "val" for i in load_examples(file, "validation")["row"])
    train, test = (set(load_examples(file, split)["row"]) for split in ("train", "test"))
    assert not train & test and all(names[i] == "train" for i in train | test)


def test_n_examples_are_drawn_by_the_seed_not_from_the_top(tmp_path: Path) -> None:
    file = rated(tmp_path / "a.parquet", row=list(range(200)))
    first, again, other = (load_examples(file, "train", 20, seed=s)["row"] for s in (0, 0, 1))
    assert first == again and first != other and len(first) == 20 and max(first) > 100


def test_testbed() -> None:
    data = load_examples("testbed", "validation", 5, rating_column="rating")
    assert len(data) == 5 and decode_image(data[0]["image"]).size == (64, 64)
    assert {"caption", "truth", "colour"} <= set(data.column_names)


@pytest.mark.parametrize("bad", [11, 0, float("nan"), None, "five"])
def test_bad_ratings_name_the_first_row_and_the_count(bad) -> None:
    with pytest.raises(UserError, match="row 1 and 2 bad rows"):
        check_ratings([5, bad, 7, bad])


def test_bad_ratings_in_a_file_are_named_by_their_row(tmp_path: Path) -> None:
    ratings = [5.0] * 200
    ratings[150] = math.nan
    file = rated(tmp_path / "a.parquet", rating=ratings)
    for split in SPLITS:
        with pytest.raises(UserError, match=r"got (nan|None) in row 150 and 1 bad row in all"):
            load_examples(file, split, rating_column="rating")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_columns": ["ratng"]}, "found: image, caption, rating.*Did you mean 'rating'"),
        ({"image_column": "picture"}, "column 'picture'"),
        ({"group_column": "prompt"}, "column 'prompt'"),
        ({"split": "tests"}, "Did you mean 'test'"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path: Path, options: dict, message: str) -> None:
    file = rated(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        load_examples(file, **{"split": "train", **options})


def test_unknown_sources_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'testbedd' cannot be loaded.*Did you mean 'testbed'"):
        load_examples("testbedd", "train")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(UserError, match="known kind"):
        load_examples(tmp_path / "a.xlsx", "train")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_examples(tmp_path / "a.parquet", "train")


@pytest.mark.parametrize("cell", [b"not an image", {"bytes": png()[:60], "path": None}, None, 5, {"bytes": None}])
def test_an_image_that_cannot_be_read_is_named_by_its_row(cell) -> None:
    with pytest.raises(UserError, match="row 7"):
        decode_image(cell, 7)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = to_rgb(Image.new(mode, (6, 4)))
    assert image.mode == "RGB" and image.size == (6, 4)


def test_transparency_turns_white_and_exif_is_followed() -> None:
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=exif)
    assert to_rgb(Image.open(buffer)).size == (4, 8)


def test_16_bit_grey_keeps_its_tones() -> None:
    values = np.array([[0, 32768, 65535]], np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 128, 255]


def test_fit_image_crops_the_centre_and_leaves_the_right_size_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(fit_image(Image.fromarray(pixels), 64), pixels)
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = pixels
    assert np.array_equal(fit_image(Image.fromarray(wide), 64), pixels)
