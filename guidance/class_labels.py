"""Class lists of class-conditional models: read from a file or a pipeline, and picked from by name."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guidance.errors import UserError, nearest
from guidance.prompt_files import find_key, read_rows

_INDEX = ("index", "idx", "class_index", "label", "class_id")
_IDS = ("wnid", "synset", "id", "wordnet_id")
_NAMES = ("name", "names", "label_name", "class_name", "class", "words", "text", "prompt")
_WNID = re.compile(r"n\d{8}")
_SUFFIXES = (".json", ".csv", ".tsv", ".txt")


@dataclasses.dataclass(frozen=True)
class ClassLabel:
    """A class.

    Attributes:
        index: What the model is conditioned on: the number of the logit or embedding.
        id: Its WordNet id; "" where the source tells none.
        name: Its name, or several with commas between.
    """

    index: int
    id: str
    name: str


def load_classes(source: Any) -> list[ClassLabel]:
    """Load the classes of a model, in the order of their indices.

    Args:
        source: A file: ``.json`` (a list of objects with index, wnid and name, of names, or the objects
            ``{"0": "tench"}`` and ``{"0": ["n01440764", "tench"]}``), ``.csv``/``.tsv`` with such columns, ``.txt``
            with one name a line, perhaps after its WordNet id; a mapping as ``id2label`` or its inverse; or a
            pipeline with ``labels``, as ``DiTPipeline`` has.

    Raises:
        UserError: If there is no such file or it is no list of classes, or two classes have one index.
    """
    if isinstance(source, str | os.PathLike):
        where, found = f"'{source}'", _from_file(Path(source).expanduser())
    else:
        where = f"the {type(source).__name__}"
        labels = source if isinstance(source, Mapping) else getattr(source, "labels", None)
        if not isinstance(labels, Mapping) or not labels:
            raise UserError(
                f"Expected a file of classes or a pipeline with labels, got {where} without; name a file."
            )
        found = _from_mapping(labels, where)
    if not found:
        raise UserError(f"Expected classes in {where}, found none; write at least one.")
    classes = sorted(found, key=lambda label: label.index)
    for one, other in itertools.pairwise(classes):
        if one.index == other.index:
            raise UserError(
                f"Expected one class an index in {where}, got '{one.name}' and '{other.name}' for {one.index}."
            )
    return classes


def pick_classes(classes: Sequence[ClassLabel], wanted: Sequence[str | int]) -> list[ClassLabel]:
    """Pick classes by index, WordNet id or name (any of its names, in any letter case).

    Raises:
        UserError: If there is no such class, or several of one name (ImageNet has two cranes).
    """
    by_key: dict[str, list[ClassLabel]] = {}
    for label in classes:
        for key in {str(label.index), label.id.lower(), *_names(label.name)} - {""}:
            by_key.setdefault(key, []).append(label)
    picked = []
    for word in wanted:
        found = by_key.get(_plain(str(word)), [])
        if not found:
            names = [key for key in by_key if not key.isdecimal() and not _WNID.fullmatch(key)]
            raise UserError(
                f"Expected an index, WordNet id or name of {len(classes)} classes, got '{word}'."
                f"{nearest(_plain(str(word)), names)}"
            )
        if len(found) > 1:
            numbers = " and ".join(f"{label.index} ({label.id or label.name})" for label in found)
            raise UserError(f"Expected a name of one class, but '{word}' is {numbers}; give the index.")
        picked.append(found[0])
    return picked


def _from_file(file: Path) -> list[ClassLabel]:
    if not file.is_file() or file.suffix.lower() not in _SUFFIXES:
        beside = sorted(p.name for p in file.parent.glob("*") if p.suffix.lower() in _SUFFIXES)
        raise UserError(
            f"Expected a file of classes that ends in {', '.join(_SUFFIXES)}, found none at '{file}'."
            f"{nearest(file.name, beside)}"
        )
    if file.suffix.lower() == ".json":
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise UserError(f"Expected JSON in '{file}', but it cannot be read ({error}).") from error
        if isinstance(content, dict):
            return _from_mapping(content, f"'{file}'")
    return [_from_row(row, i, file) for i, row in enumerate(read_rows(file)) if any(row.values())]


def _from_row(row: Mapping[str, Any], number: int, file: Path) -> ClassLabel:
    keys = [find_key(row, names) for names in (_INDEX, _IDS, _NAMES)]
    index, wnid, name = (row[key] if key else None for key in keys)
    if name is None:
        raise UserError(
            f"Expected a column {' or '.join(_NAMES[:3])} in '{file}', got {', '.join(map(str, row))}; "
            "rename the column that holds the names to 'name'."
        )
    first, _, rest = str(name).strip().partition(" ")
    if wnid is None and _WNID.fullmatch(first):  # a line of synset_words.txt
        wnid, name = first, rest or first
    try:
        return ClassLabel(number if index is None else int(index), str(wnid or ""), str(name).strip())
    except ValueError:
        raise UserError(
            f"Expected whole numbers as indices in '{file}', got {index!r} in row {number}."
        ) from None


def _from_mapping(labels: Mapping[Any, Any], where: str) -> list[ClassLabel]:
    """Read ``{index: name}``, ``{index: [id, name]}`` or ``{name: index}``, where a class may have several names."""
    try:
        if all(isinstance(value, int) for value in labels.values()):
            names: dict[int, list[str]] = {}
            for name, index in labels.items():
                names.setdefault(index, []).append(str(name))
            return [ClassLabel(index, "", ", ".join(own)) for index, own in names.items()]
        found = []
        for index, value in labels.items():
            wnid, name = ("", value) if isinstance(value, str) else value
            found.append(ClassLabel(int(index), str(wnid), str(name)))
        return found
    except (TypeError, ValueError) as error:
        raise UserError(
            f'Expected {{"0": "name"}}, {{"0": ["id", "name"]}} or {{"name": 0}} in {where}, got '
            f"{next(iter(labels.items()))!r}; write one of them."
        ) from error


def _names(text: str) -> set[str]:
    """The names of a class as they are compared: the whole text and its parts between commas."""
    return {_plain(part) for part in [text, *text.split(",")]}


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("_", " ").split())
