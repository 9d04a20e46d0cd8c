"""Read rows of prompt files: text, tables, JSON and parquet, as prompt sets are published."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from guidance.utils.errors import UserError, first_line

#: Names of a prompt column in order of preference, in any letter case: Prompt in PartiPrompts, Prompts in DrawBench,
#: captions in COCO on the hub (a list, of which the first is taken), original_prompt or input in instruct-pix2pix.
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text", "captions", "original_prompt", "input")

#: The same for the category (GenEval's tag) and the challenge of a prompt.
CLASS_COLUMNS = (("category", "tag"), ("challenge",))

Row = Mapping[str, Any]


def read_rows(file: Path) -> list[Row]:
    """Read the rows of a file whose suffix is a key of :data:`READERS`."""
    suffix = file.suffix.lower()
    try:
        return READERS[suffix](file)
    except UserError:
        raise
    except (ValueError, csv.Error) as error:  # malformed JSON and parquet, text that is not UTF-8
        raise UserError(
            f"Expected prompts in '{file}', but it cannot be read as {suffix} "
            f"({first_line(error)}); save it again, text as UTF-8."
        ) from error


def find_key(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of these names that is a key of a row, ignoring letter case.

    >>> find_key({"Tag": 1, "Category": 2}, ("category", "tag"))
    'Category'
    """
    keys = {str(key).strip().lower(): key for key in row}
    return next((keys[name] for name in names if name in keys), None)


def require_cell(row: Row, names: Sequence[str], where: str, what: str = "prompts") -> Any:
    """Return the cell of the first of these columns that a row has, "" if it is empty."""
    key = find_key(row, names)
    if key is None:
        raise UserError(
            f"Expected a column {' or '.join(names)} in {where}, got {', '.join(map(str, row)) or 'none'}; "
            f"rename the column that holds the {what} to '{names[0]}'."
        )
    return "" if row[key] is None else row[key]


def known_columns(names: Sequence[str]) -> list[str]:
    """Return those of these columns that are of use in a file of prompts; all if there are none."""
    wanted = {*PROMPT_COLUMNS, *CLASS_COLUMNS[0], *CLASS_COLUMNS[1]}
    return [name for name in names if name.lower() in wanted] or list(names)


def _read_lines(file: Path) -> list[Row]:
    return [{"prompt": line} for line in file.read_text(encoding="utf-8-sig").splitlines()]


def _read_table(file: Path, delimiter: str = ",") -> list[Row]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream, delimiter=delimiter))


def _read_json(file: Path) -> list[Row]:
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict) and "prompts" in content:
        content = content["prompts"]
    elif isinstance(content, dict) and "annotations" in content:  # COCO: about five captions per image
        first: dict[Any, Any] = {}
        for row in _objects(content["annotations"], file):
            first.setdefault(row.get("image_id", len(first)), row)
        content = list(first.values())
    return _objects(content, file)


def _read_json_lines(file: Path) -> list[Row]:
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return _objects([json.loads(line) for line in lines if line.strip()], file)


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow.parquet as parquet

    columns = known_columns(parquet.read_schema(file).names)  # images beside the prompts are not read
    rows: list[Row] = parquet.read_table(file, columns=columns).to_pylist()
    return rows


def _objects(content: Any, file: Path) -> list[Row]:
    if not isinstance(content, list) or not all(isinstance(item, str | dict) for item in content):
        raise UserError(f"Expected a list of texts or of objects with a key 'prompt' in '{file}'; change it to one.")
    return [{"prompt": item} if isinstance(item, str) else item for item in content]


#: Suffix of a file -> the function that reads its rows.
READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".txt": _read_lines,
    ".csv": _read_table,
    ".tsv": functools.partial(_read_table, delimiter="\t"),
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
