"""Prompts: every kind of file, the published sets where they are at hand, and seeded subsets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guidance.errors import UserError
from guidance.prompts import PROMPT_SETS, Prompt, load_prompts
from guidance.testbed.scenes import parse_caption

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "prompts"
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
        ("empty.txt", " \n\n", "Expected prompts in .*found none; write at least one"),
        ("empty.csv", "", "found none"),
        ("header.csv", "prompt,category\n", "found none"),
        ("wrong.csv", "title,name\na,b\n", "Expected a column prompt or .*got title, name; rename"),
        ("wrong.json", '{"a": 1}', "Expected a list of texts or of objects"),
        ("cut.json", '[{"prompt": "a"', "cannot be read as .json"),
        ("cut.parquet", "PAR1", "cannot be read as .parquet"),
        ("list.jsonl", "[1]\n", "Expected a list of texts or of objects"),
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
    with pytest.raises(UserError, match="found none"):
        load_prompts([])
    with pytest.raises(UserError, match="n=0"):
        load_prompts("testbed", 0)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="UTF-8"):
        load_prompts(tmp_path / "latin.txt")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published prompt sets are not at hand")
@pytest.mark.parametrize(
    ("name", "count", "classed"),
    [
        ("parti_prompts.tsv", 1632, ("Abstract", "Basic")),
        ("drawbench.csv", 200, ("Colors", "")),
        ("agiqa3k_prompts_mos.csv", 300, ("", "")),
        ("t2i_compbench.csv", 7957, ("color", "")),
        ("geneval_metadata.jsonl", 553, ("single_object", "")),
        ("imagereward_benchmark_prompts.json", 100, ("", "")),
        ("coco_captions_8k.txt", 8125, ("", "")),
    ],
)
def test_published_sets(name: str, count: int, classed: tuple[str, str]) -> None:
    prompts = load_prompts(PUBLISHED / name)
    assert len(prompts) == count and len({p.id for p in prompts}) == count
    assert (prompts[0].category, prompts[0].challenge) == classed
    assert all(p.text == p.text.strip() and "\t" not in p.text for p in prompts)
