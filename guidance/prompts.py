"""Prompts of a run: the testbed's own, a published set in a file, or texts."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guidance.errors import UserError, nearest

#: Names of a prompt column, best first, in any letter case (PartiPrompts: Prompt, DrawBench: Prompts).
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")
TESTBED_DEFAULT = 64


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        id: Name that no other prompt of its source has, fit for a file name; says set and row.
        text: The prompt.
        category, challenge: How the source classes it, as PartiPrompts does; "" where it does not.
    """

    id: str
    text: str
    category: str = ""
    challenge: str = ""


def load_prompts(
    source: str | os.PathLike[str] | Sequence[str], n: int | None = None, seed: int = 0
) -> list[Prompt]:
    """Load prompts; blank ones are left out, and of equal ones all but the first.

    (The prompt is the unit of every statistic, so that a repeated one would be counted twice.)

    Args:
        source: A named set (a key of :data:`PROMPT_SETS`: "testbed" holds test captions never seen in
            training); a file: ``.txt`` with one prompt a line, or ``.csv``, ``.tsv``, ``.json``, ``.jsonl``,
            ``.parquet`` with a column of :data:`PROMPT_COLUMNS` and perhaps Category (or tag) and
            Challenge; or a list of texts.
        n: How many; None for all (64 of the endless testbed).  The first m of n are those that ``n=m``
            gives.  A source with fewer gives all it has.
        seed: Which ones, and in which order; with ``n=None`` a file keeps its own order.

    Raises:
        UserError: If there is no such set or file, it holds no prompt, or no column of prompts.
    """
    if n is not None and n < 1:
        raise UserError(f"Expected at least one prompt, got n={n}.")
    if not isinstance(source, str | os.PathLike):
        return _unique("prompt", ({"prompt": text} for text in source), "the list of prompts")
    if str(source) in PROMPT_SETS:
        return PROMPT_SETS[str(source)](n, seed)
    file = Path(source).expanduser()
    if file.suffix.lower() not in _READERS or not file.is_file():
        raise UserError(_not_found(file))
    prompts = _unique(_slug(file.stem), _read(file), f"'{file}'")
    if n is None:
        return prompts
    return [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:n]]


def _testbed(split: str) -> Callable[[int | None, int], list[Prompt]]:
    def load(n: int | None, seed: int) -> list[Prompt]:
        from guidance.testbed.scenes import parse_caption, prompts

        tag = f"testbed-{split}" + (f"-s{seed}" if seed else "")
        found = []
        for i, text in enumerate(prompts(split, TESTBED_DEFAULT if n is None else n, seed=seed)):
            told = parse_caption(text)
            challenge = "two objects" if told["second_object"] else "place" if told["place"] else "basic"
            found.append(Prompt(f"{tag}-{i:04d}", text, told["object"], challenge))
        return found

    return load


#: Named sets: name -> ``load(n, seed)``.
PROMPT_SETS: dict[str, Callable[[int | None, int], list[Prompt]]] = {
    "testbed": _testbed("test"),
    "testbed:test": _testbed("test"),
    "testbed:validation": _testbed("validation"),
    "testbed:train": _testbed("train"),
}


def _unique(tag: str, rows: Iterable[Mapping[str, Any]], where: str) -> list[Prompt]:
    found: dict[str, Prompt] = {}
    for index, row in enumerate(rows):
        text = " ".join(str(_cell(row, PROMPT_COLUMNS, where)).split())
        if text and text not in found:
            keys = _key(row, ("category", "tag")), _key(row, ("challenge",))
            classes = [str(row[key] or "") if key else "" for key in keys]
            found[text] = Prompt(f"{tag}-{index:04d}", text, *classes)
    if not found:
        raise UserError(f"Expected prompts in {where}, found none; write at least one.")
    return list(found.values())


def _cell(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    key = _key(row, names)
    if key is None:
        raise UserError(
            f"Expected a column {' or '.join(names)} in {where}, got {', '.join(map(str, row)) or 'none'}; "
            "rename the column that holds the prompts to 'prompt'."
        )
    return "" if row[key] is None else row[key]


def _key(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The key of a row that is the first of these names, whatever its letter case."""
    keys = {str(key).strip().lower(): key for key in row}
    return next((keys[name] for name in names if name in keys), None)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:40] or "prompts"


def _read(file: Path) -> list[Mapping[str, Any]]:
    try:
        return list(_READERS[file.suffix.lower()](file))
    except UserError:
        raise
    except (ValueError, csv.Error) as error:  # malformed JSON and parquet, text that is not UTF-8
        raise UserError(
            f"Expected prompts in '{file}', but it cannot be read as {file.suffix} "
            f"({str(error).splitlines()[0]}); save it again, text as UTF-8."
        ) from error


def _read_lines(file: Path) -> list[Mapping[str, Any]]:
    return [{"prompt": line} for line in file.read_text(encoding="utf-8-sig").splitlines()]


def _read_table(file: Path) -> list[Mapping[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ","))


def _read_json(file: Path) -> list[Mapping[str, Any]]:
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    return _objects(
        content["prompts"] if isinstance(content, dict) and "prompts" in content else content, file
    )


def _read_json_lines(file: Path) -> list[Mapping[str, Any]]:
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return _objects([json.loads(line) for line in lines if line.strip()], file)


def _read_parquet(file: Path) -> list[Mapping[str, Any]]:
    import pyarrow.parquet as parquet

    wanted = {*PROMPT_COLUMNS, "category", "tag", "challenge"}
    names = parquet.read_schema(file).names
    kept = [name for name in names if name.lower() in wanted]  # images beside the prompts stay on the disk
    rows: list[Mapping[str, Any]] = parquet.read_table(file, columns=kept or names).to_pylist()
    return rows


def _objects(content: Any, file: Path) -> list[Mapping[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(item, str | dict) for item in content):
        raise UserError(
            f"Expected a list of texts or of objects with a key 'prompt' in '{file}'; change it to one."
        )
    return [{"prompt": item} if isinstance(item, str) else item for item in content]


_READERS: dict[str, Callable[[Path], list[Mapping[str, Any]]]] = {
    ".txt": _read_lines,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


def _not_found(file: Path) -> str:
    if file.is_file():
        return (
            f"Expected a prompt file that ends in {', '.join(_READERS)}, got '{file}'; rename or convert it."
        )
    if file.suffix.lower() in _READERS:
        hint = nearest(
            file.name, sorted(p.name for p in file.parent.glob("*") if p.suffix.lower() in _READERS)
        )
    else:
        hint = nearest(str(file), PROMPT_SETS)
    return f"Expected a set of prompts or a file of them, found none called '{file}'.{hint}"
