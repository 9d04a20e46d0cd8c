"""Prompts: every kind of file, the published sets where they are at hand, and seeded subsets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guidance.data.prompts import PROMPT_SETS, PUBLISHED_SETS, Prompt, PublishedSet, load_prompts
from guidance.testbed.scenes import parse_caption
from guidance.utils.errors import UserError
from sample.guided import GuidedConfig, default_output

TEXTS = ["a cat, sleeping", "ein Bär", 'a sign that says "x"']
ROWS = [{"Prompt": text, "Category": "animals", "Challenge": ""} for text in TEXTS]


def write_file(folder: Path, suffix: str) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    file = folder / f"my prompts{suffix}"
    if suffix == ".txt":
        file.write_text("\n".join(["", *TEXTS, TEXTS[0], "  "]), encoding="utf-8-sig")
    elif suffix in (".csv", ".tsv"):
        import pandas

        pandas.DataFrame(ROWS).to_csv(file, sep="," if suffix == ".csv" else "\t", index=False)
    elif suffix == ".json":
        file.write_text(json.dumps(ROWS))
    elif suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", "utf-8")
    else:
        parquet.write_table(pa.Table.from_pylist([{**row, "image": b"x"} for row in ROWS]), file)
    return file


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    prompts = load_prompts(write_file(tmp_path, suffix))
    assert [p.text for p in prompts] == TEXTS  # blank and repeated ones left out
    assert [p.id for p in prompts] == [f"my-prompts-{i + (suffix == '.txt'):04d}" for i in range(3)]
    assert {p.category for p in prompts} == ({""} if suffix == ".txt" else {"animals"})


def test_subsets_are_seeded_and_nested(tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(50)))
    everything, ten = load_prompts(file), load_prompts(file, 10)
    assert len(everything) == 50 and load_prompts(file, 5) == ten[:5] == load_prompts(file, 10)[:5]
    assert set(ten) <= set(everything) and ten != everything[:10]
    assert load_prompts(file, 10, seed=1) != ten and len(load_prompts(file, 80)) == 50


def test_texts() -> None:
    assert load_prompts(["a boat", " ", "a\nhouse "]) == [
        Prompt("prompt-0000", "a boat"),
        Prompt("prompt-0002", "a house"),
    ]


def test_the_testbed_sets_share_no_prompt() -> None:
    sets = {name: load_prompts(name, 20) for name in PROMPT_SETS}
    assert sets["testbed"] == sets["testbed:test"] == load_prompts("testbed", 40)[:20]
    texts = [{p.text for p in sets[f"testbed:{split}"]} for split in ("train", "validation", "test")]
    assert len(set.union(*texts)) == 60
    assert all(parse_caption(p.text)["object"] == p.category for p in sets["testbed"])
    other = load_prompts("testbed", 20, seed=3)
    assert not {p.id for p in other} & {p.id for p in sets["testbed"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", " \n\n", "found none"),
        ("header.csv", "prompt,category\n", "found none"),
        ("wrong.csv", "title,name\na,b\n", "got title, name; rename"),
        ("wrong.json", '{"a": 1}', "Expected a list of texts or of objects"),
        ("cut.json", '[{"prompt": "a"', "cannot be read as .json"),
        ("cut.parquet", "PAR1", "cannot be read as .parquet"),
        ("prompts.doc", "a", "that ends in .txt, .csv"),
    ],
)
def test_a_bad_file_gets_a_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_prompts(tmp_path / name)


def test_an_unknown_source_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a")
    with pytest.raises(UserError, match=r"Did you mean 'prompts.txt'"):
        load_prompts(tmp_path / "promts.txt")
    with pytest.raises(UserError, match="Did you mean 'testbed'"):
        load_prompts("tesbed")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="UTF-8"):
        load_prompts(tmp_path / "latin.txt")


#: The first lines of each set as it is published, and what becomes of them: file, content, texts, classes of the first.
FORMATS = {
    "parti": (
        "PartiPrompts.tsv",
        'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tBiology\na sign "x"\tArts\tWriting & Symbols\t\n',
        ["bond", 'a sign "x"'],
        ("Abstract", "Basic"),
    ),
    "drawbench": (
        "drawbench.csv",
        'Prompts,Category\nA red colored car.,Colors\n"A cat, a dog.",Counting\n',
        ["A red colored car.", "A cat, a dog."],
        ("Colors", ""),
    ),
    "coco": (
        "captions_val2017.json",
        '{"images": [{"id": 7}, {"id": 9}], "annotations": [{"image_id": 7, "id": 1, "caption": "A dog."}, '
        '{"image_id": 9, "caption": "A ski slope.\\n"}, {"image_id": 7, "caption": "A brown dog."}]}',
        ["A dog.", "A ski slope."],
        ("", ""),
    ),
    "geneval": (
        "evaluation_metadata.jsonl",
        '{"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}\n'
        '{"tag": "position", "include": [{"class": "cow", "count": 1}, {"class": "cat", "count": 1, "position": '
        '["left of", 0]}], "prompt": "a photo of a cat left of a cow"}\n',
        ["a photo of a cow", "a photo of a cat left of a cow"],
        ("single_object", ""),
    ),
    "compbench": (
        "t2i.csv",
        "category,split,prompt\ncolor,train,a green bench\nshape,val,a round bag\n",
        ["a green bench", "a round bag"],
        ("color", ""),
    ),
    "agiqa": (
        "data.csv",
        "name,prompt,adj1,mos_quality\na_0.jpg,a man,,0.9\na_1.jpg,a man,,0.8\na_2.jpg,sushi,,1\n",
        ["a man", "sushi"],
        ("", ""),
    ),
    "instruct-pix2pix": (
        "human-written-prompts.jsonl",
        '{"input": "a cat", "edit": "make it a dog", "output": "a dog"}\n'
        '{"input": "a lake", "edit": "freeze it", "output": "ice"}\n',
        ["a cat", "a lake"],
        ("", ""),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_published_formats(tmp_path: Path, name: str) -> None:
    file, content, texts, classes = FORMATS[name]
    (tmp_path / file).write_text(content)
    prompts = load_prompts(tmp_path / file)
    assert [p.text for p in prompts] == texts
    assert (prompts[0].category, prompts[0].challenge) == classes


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the hub be a folder of datasets, as it would be with the network."""
    import datasets

    rows: dict[str, list[dict[str, object]]] = {
        "nateraw/parti-prompts": [
            {"Prompt": "bond", "Category": "Abstract", "Challenge": "Basic", "Note": ""},
            {"Prompt": "a fox", "Category": "Animals", "Challenge": "Quantity", "Note": ""},
        ],
        "sayakpaul/drawbench": [{"Prompts": "A red car.", "Category": "Colors"}],
        "phiyodr/coco2017": [{"file_name": "1.jpg", "image_id": 1, "captions": ["A dog.", "Dog"]}],
    }

    def load_dataset(path: str, *, split: str) -> datasets.Dataset:
        assert split == ("validation" if "coco" in path else "train")
        return datasets.Dataset.from_list(rows[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("geneval", "instruct-pix2pix"):
        file, content, *_ = FORMATS[name]
        (folder / file).write_text(content)
        published = PublishedSet(PUBLISHED_SETS[name].file, url=(folder / file).as_uri())
        monkeypatch.setitem(PUBLISHED_SETS, name, published)


def test_named_sets_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path)
    assert load_prompts("parti") == [
        Prompt("parti-0000", "bond", "Abstract", "Basic"),
        Prompt("parti-0001", "a fox", "Animals", "Quantity"),
    ]
    assert load_prompts("drawbench", 5) == [Prompt("drawbench-0000", "A red car.", "Colors")]
    assert load_prompts("coco") == [Prompt("coco-0000", "A dog.")]
    for _ in range(2):  # the second time from the cache
        prompts = load_prompts("geneval", category="position")
        assert prompts == [Prompt("geneval-0001", "a photo of a cat left of a cow", "position")]
        (tmp_path / "evaluation_metadata.jsonl").unlink(missing_ok=True)
    assert [p.text for p in load_prompts("instruct-pix2pix")] == ["a cat", "a lake"]


@pytest.mark.parametrize("name", PUBLISHED_SETS)
def test_a_named_set_offline_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        load_prompts(name, 3)
    assert f"fetch {PUBLISHED_SETS[name].file}" in str(caught.value)


@pytest.fixture
def classed(tmp_path: Path) -> Path:
    kinds = [("Animals", "Basic"), ("Arts", "Quantity"), ("People", "Basic")]
    lines = [f"prompt {i}\t{kinds[i % 3][0]}\t{kinds[i % 3][1]}" for i in range(60)]
    file = tmp_path / "parti.tsv"
    file.write_text("\n".join(["Prompt\tCategory\tChallenge", *lines]))
    return file


def test_categories(classed: Path) -> None:
    everything, some = load_prompts(classed, 60), load_prompts(classed, 60, category=["animals", "People"])
    assert some == [p for p in everything if p.category != "Arts"] and len(some) == 40
    assert load_prompts(classed, 7, category=["animals", "People"]) == some[:7]
    assert load_prompts(classed, category="Quantity") == load_prompts(classed, category="arts")
    assert [p.id for p in load_prompts(classed, category="Arts")][:2] == ["parti-0001", "parti-0004"]
    assert load_prompts(classed, 5, category=None) == load_prompts(classed, 5, category=[]) == everything[:5]


def test_an_equal_share_of_each_category(classed: Path) -> None:
    found = load_prompts(classed, per_category=4, seed=2)
    assert [sum(p.category == c for p in found) for c in ("Animals", "Arts", "People")] == [4, 4, 4]
    assert load_prompts(classed, 6, 2, per_category=4) == found[:6]
    assert set(load_prompts(classed, per_category=3, seed=2)) < set(found)
    mixed = load_prompts(classed, per_category=2, category=["basic", "Arts"])
    assert sorted(p.challenge for p in mixed) == ["Basic", "Basic", "Quantity", "Quantity"]
    assert len(load_prompts(classed, per_category=99)) == 60


def test_categories_of_the_testbed() -> None:
    boats = load_prompts("testbed", 12, category="boat")
    assert len(boats) == 12 and {p.category for p in boats} == {"boat"}
    assert set(boats) < set(load_prompts("testbed", 300)) and boats[:5] == load_prompts("testbed", 5, category="boat")
    equal = load_prompts("testbed", per_category=2)
    assert len(equal) == 16 and len({p.category for p in equal}) == 8


def test_an_unknown_category_gets_a_sentence(classed: Path) -> None:
    with pytest.raises(UserError, match=r"Did you mean 'Animals'\? There are Animals \(20\), Arts"):
        load_prompts(classed, category=["Arts", "anmals"])
    with pytest.raises(UserError, match="the list of prompts has none; leave the category out"):
        load_prompts(["a", "b"], category="Arts")


def test_a_category_is_an_option_of_sampling_and_leaves_no_trace_when_unset() -> None:
    """Folders are named by a hash of the options: those of runs made before there was a category must stay."""
    assert default_output(GuidedConfig()).name == "testbed-cf1b73"
    assert default_output(GuidedConfig(category="boat")) != default_output(GuidedConfig())
