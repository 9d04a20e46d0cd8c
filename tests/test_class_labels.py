"""Class lists: the published formats, a pipeline's own labels, and picking by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from guidance.class_labels import ClassLabel, load_classes, pick_classes
from guidance.errors import UserError

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "weights" / "imagenet_classes.json"
IDS = [ClassLabel(0, "n01440764", "tench"), ClassLabel(1, "n01443537", "goldfish")]
BARE = [ClassLabel(0, "", "tench"), ClassLabel(1, "", "goldfish")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.json",
            json.dumps([{"index": c.index, "wnid": c.id, "name": c.name} for c in reversed(IDS)]),
            IDS,
        ),
        ("imagenet_class_index.json", '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}', IDS),
        ("id2label.json", '{"1": "goldfish", "0": "tench"}', BARE),
        ("label2id.json", '{"goldfish": 1, "tench": 0}', BARE),
        ("names.json", '["tench", "goldfish"]', BARE),
        ("imagenet_classes.txt", "tench\ngoldfish\n", BARE),
        ("synset_words.txt", "n01440764 tench\nn01443537 goldfish\n", IDS),
        ("a.csv", "index,wnid,name\n1,n01443537,goldfish\n0,n01440764,tench\n", IDS),
        ("a.tsv", "class_name\ntench\ngoldfish\n", BARE),
    ],
)
def test_published_formats(tmp_path: Path, name: str, content: str, expected: list[ClassLabel]) -> None:
    (tmp_path / name).write_text(content)
    assert load_classes(tmp_path / name) == expected


def test_labels_of_a_pipeline() -> None:
    """DiTPipeline splits ``id2label`` at commas and sorts the names."""
    pipe = SimpleNamespace(labels={"Tinca tinca": 0, "goldfish": 1, "tench": 0})
    assert load_classes(pipe) == [ClassLabel(0, "", "Tinca tinca, tench"), ClassLabel(1, "", "goldfish")]
    assert load_classes({0: "tench, Tinca tinca", 1: "goldfish"})[0] == ClassLabel(
        0, "", "tench, Tinca tinca"
    )


def test_a_real_pipeline() -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4, num_embeds_ada_norm=2
    )
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    pipe = DiTPipeline(transformer, vae, DDIMScheduler(), id2label={0: "tench, Tinca tinca", 1: "goldfish"})
    assert pick_classes(load_classes(pipe), ["tench"])[0].index == pipe.get_label_ids(["tench"])[0] == 0


def test_pick() -> None:
    classes = [*IDS, ClassLabel(2, "n02012849", "crane"), ClassLabel(3, "n03126707", "crane")]
    classes.append(ClassLabel(4, "", "great_white shark, man-eater"))
    assert [
        c.index for c in pick_classes(classes, ["Goldfish", 0, "3", "n02012849", "great white shark"])
    ] == [
        1,
        0,
        3,
        2,
        4,
    ]
    assert pick_classes(classes, ["man-eater"])[0].index == 4
    with pytest.raises(UserError, match=r"got 'goldfsh'. Did you mean 'goldfish'"):
        pick_classes(classes, ["goldfsh"])
    with pytest.raises(UserError, match=r"'crane' is 2 \(n02012849\) and 3 \(n03126707\); give the index"):
        pick_classes(classes, ["crane"])
    with pytest.raises(UserError, match="of 5 classes, got '9'"):
        pick_classes(classes, [9])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.json", "[", "Expected JSON in"),
        ("empty.txt", "\n", "found none; write at least one"),
        ("wrong.csv", "a,b\n1,2\n", "Expected a column name or .*got a, b"),
        ("index.csv", "index,name\nx,tench\n", "Expected whole numbers as indices .*'x' in row 0"),
        (
            "twice.csv",
            "index,name\n0,tench\n0,hen\n",
            "Expected one class an index .*'tench' and 'hen' for 0",
        ),
        ("odd.json", '{"a": "tench"}', r'Expected \{"0": "name"\}'),
        ("list.json", "[1]", "Expected a list of texts or of objects"),
        ("classes.doc", "a", "that ends in .json"),
    ],
)
def test_bad_files_get_a_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_classes(tmp_path / name)


def test_bad_sources_get_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text("[]")
    with pytest.raises(UserError, match=r"Did you mean 'classes.json'"):
        load_classes(tmp_path / "clases.json")
    with pytest.raises(UserError, match="Expected a file of classes or a pipeline with labels"):
        load_classes(SimpleNamespace(labels={}))


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published class list is not at hand")
def test_imagenet() -> None:
    classes = load_classes(PUBLISHED)
    assert len(classes) == 1000 and [c.index for c in classes] == list(range(1000))
    assert pick_classes(classes, ["golden retriever"])[0] == ClassLabel(207, "n02099601", "golden retriever")
    with pytest.raises(UserError, match="'crane' is 134"):
        pick_classes(classes, ["crane"])
