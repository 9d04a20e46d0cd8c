"""Load the prompts of a run: of the testbed, a published set by name, a file, or a list of texts."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from guidance.data.tables import (
    CLASS_COLUMNS,
    PROMPT_COLUMNS,
    READERS,
    Row,
    find_key,
    known_columns,
    read_rows,
    require_cell,
)
from guidance.utils.errors import UserError, first_line, nearest
from guidance.utils.io import atomic_path

TESTBED_DEFAULT = 64


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        id: Unique name within its source, of set and row, fit for a file name.
        text: The prompt.
        category, challenge: Classes given by the source, as in PartiPrompts; "" for none.
    """

    id: str
    text: str
    category: str = ""
    challenge: str = ""


def load_prompts(
    source: str | os.PathLike[str] | Sequence[str],
    n: int | None = None,
    seed: int = 0,
    *,
    category: str | Sequence[str] | None = None,
    per_category: int | None = None,
) -> list[Prompt]:
    """Load prompts, without blank and repeated ones.

    (The prompt is the unit of every statistic; a repeated one would be counted twice.)

    Args:
        source: A named set: a key of :data:`PROMPT_SETS` ("testbed" holds test captions never seen in
            training) or of ``PUBLISHED_SETS`` (parti, drawbench, coco, geneval, instruct-pix2pix; downloaded);
            a file: ``.txt`` with one prompt per line, or ``.csv``, ``.tsv``, ``.json``, ``.jsonl``,
            ``.parquet`` with a column of ``PROMPT_COLUMNS`` and optionally Category (or tag) and
            Challenge; or a list of texts, which is taken entirely.
        n: Number of prompts; None for all (64 of the endless testbed).  ``n=m`` gives the first m of a larger n.
            A source with fewer gives all.
        seed: Seed of choice and order; with ``n=None`` a file keeps its own order.
        category: One or several categories or challenges to choose from, in any letter case.
        per_category: Maximum number per category (per named category, if some are).

    Raises:
        UserError: If there is no such set, file or category, or it holds no prompt or no column of prompts.
    """
    for name, value in (("n", n), ("per_category", per_category)):
        if value is not None and value < 1:
            raise UserError(f"Expected at least one prompt, got {name}={value}.")
    wanted = [category] if isinstance(category, str) else list(category or [])
    chosen = bool(wanted) or per_category is not None
    if isinstance(source, str | os.PathLike) and str(source) in PROMPT_SETS:
        name = str(source)
        return _choose_endless(name, n, seed, wanted, per_category) if chosen else PROMPT_SETS[name](n, seed)
    prompts, where = _load_all(source)
    if chosen:
        _check_categories(prompts, wanted, where)
    if not isinstance(source, str | os.PathLike):
        n = None
    elif n is not None or per_category is not None:
        prompts = [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))]
    return _choose(prompts, wanted, per_category)[:n]


def _load_all(source: str | os.PathLike[str] | Sequence[str]) -> tuple[list[Prompt], str]:
    """Return every prompt of a finite source, and a name of the source for errors."""
    if not isinstance(source, str | os.PathLike):
        where = "the list of prompts"
        return _unique("prompt", ({"prompt": text} for text in source), where), where
    name, file = str(source), Path(source).expanduser()
    if name in PUBLISHED_SETS:
        return _unique(name, read_published(name), f"'{name}'"), f"'{name}'"
    if file.suffix.lower() not in READERS or not file.is_file():
        raise UserError(_not_found(file))
    return _unique(slug(file.stem), read_rows(file), f"'{file}'"), f"'{file}'"


def _testbed(split: str, n: int | None, seed: int) -> list[Prompt]:
    from guidance.testbed.scenes import parse_caption, prompts

    tag = f"testbed-{split}" + (f"-s{seed}" if seed else "")
    found = []
    for i, text in enumerate(prompts(split, TESTBED_DEFAULT if n is None else n, seed=seed)):
        said = parse_caption(text)
        challenge = "two objects" if said["second_object"] else "place" if said["place"] else "basic"
        found.append(Prompt(f"{tag}-{i:04d}", text, said["object"], challenge))
    return found


#: Sets of the testbed: name -> ``load(n, seed)``.
PROMPT_SETS: dict[str, Callable[[int | None, int], list[Prompt]]] = {
    "testbed": functools.partial(_testbed, "test"),
    **{f"testbed:{split}": functools.partial(_testbed, split) for split in ("test", "validation", "train")},
}


def _choose(prompts: Sequence[Prompt], wanted: Sequence[str], per_category: int | None) -> list[Prompt]:
    """Keep the prompts of the wanted categories (all, if none is named), the first few of each."""
    kept: list[Prompt] = []
    taken: Counter[str] = Counter()
    names = [name.lower() for name in wanted]
    for prompt in prompts:
        labels = [prompt.category.lower(), prompt.challenge.lower()] if names else [prompt.category]
        label = next((name for name in labels if not names or name in names), None)
        if label is not None and (per_category is None or taken[label] < per_category):
            taken[label] += 1
            kept.append(prompt)
    return kept


def _choose_endless(
    name: str, n: int | None, seed: int, wanted: Sequence[str], per_category: int | None
) -> list[Prompt]:
    """Draw prompts until there are enough of the wanted categories."""
    pool = PROMPT_SETS[name](4 * TESTBED_DEFAULT, seed)
    _check_categories(pool, wanted, f"the first {len(pool)} prompts of '{name}'")
    enough = TESTBED_DEFAULT if n is None else n
    if per_category is not None:
        most = per_category * len(set(wanted) or {prompt.category for prompt in pool})
        enough = most if n is None else min(n, most)
    while len(found := _choose(pool, wanted, per_category)) < enough:
        pool = PROMPT_SETS[name](2 * len(pool), seed)
    return found[:enough]


def _check_categories(prompts: Sequence[Prompt], wanted: Sequence[str], where: str) -> None:
    counts = Counter(p.category for p in prompts if p.category)
    counts.update(p.challenge for p in prompts if p.challenge)
    if not counts:
        raise UserError(f"Expected prompts with a category, but {where} has none; leave the category out.")
    known = {name.lower(): name for name in counts}
    for name in wanted:
        if name.lower() not in known:
            close = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f" Did you mean '{known[close[0]]}'?" if close else ""
            listed = ", ".join(f"{label} ({count})" for label, count in sorted(counts.items()))
            raise UserError(f"Expected a category of {where}, got '{name}'.{hint} There are {listed}.")


def _unique(tag: str, rows: Iterable[Mapping[str, Any]], where: str) -> list[Prompt]:
    found: dict[str, Prompt] = {}
    for index, row in enumerate(rows):
        cell = require_cell(row, PROMPT_COLUMNS, where)
        if isinstance(cell, list | tuple):  # the captions of one image
            cell = cell[0] if cell else ""
        text = " ".join(str(cell).split())
        if text and text not in found:
            keys = [find_key(row, names) for names in CLASS_COLUMNS]
            classes = [str(row[key] or "") if key else "" for key in keys]
            found[text] = Prompt(f"{tag}-{index:04d}", text, *classes)
    if not found:
        raise UserError(f"Expected prompts in {where}, found none; write at least one.")
    return list(found.values())


def slug(text: str) -> str:
    """Convert text to a name fit for files and identifiers.

    >>> slug("my prompts (2)")
    'my-prompts-2'
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:40] or "prompts"


def _not_found(file: Path) -> str:
    if file.is_file():
        return f"Expected a prompt file that ends in {', '.join(READERS)}, got '{file}'; rename or convert it."
    if file.suffix.lower() in READERS:
        hint = nearest(file.name, sorted(p.name for p in file.parent.glob("*") if p.suffix.lower() in READERS))
    else:
        hint = nearest(str(file), [*PROMPT_SETS, *PUBLISHED_SETS])
    return f"Expected a set of prompts or a file of them, found none called '{file}'.{hint}"


class PublishedSet(NamedTuple):
    """The origin of a published prompt set: a data set on the hub, or a file of rows (:mod:`guidance.data.tables`)."""

    file: str  # to fetch by hand where the hub cannot be reached
    hub: str = ""
    split: str = "train"
    url: str = ""


_PIX2PIX = "instruct-pix2pix.eecs.berkeley.edu/human-written-prompts.jsonl"

#: Named sets. ``coco`` is the first caption of each of the 5000 images of val2017, ``instruct-pix2pix`` the captions of
#: its human-written edits.
PUBLISHED_SETS: dict[str, PublishedSet] = {
    "parti": PublishedSet("PartiPrompts.tsv from github.com/google-research/parti", hub="nateraw/parti-prompts"),
    "drawbench": PublishedSet("the CSV file of huggingface.co/datasets/sayakpaul/drawbench", hub="sayakpaul/drawbench"),
    "coco": PublishedSet(
        "captions_val2017.json, in annotations_trainval2017.zip from cocodataset.org", "phiyodr/coco2017", "validation"
    ),
    "geneval": PublishedSet(
        "prompts/evaluation_metadata.jsonl from github.com/djghosh13/geneval",
        url="https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl",
    ),
    "instruct-pix2pix": PublishedSet(_PIX2PIX, url=f"https://{_PIX2PIX}"),
}


def read_published(name: str) -> list[Row]:
    """Read the rows of a named set, which is downloaded on first use."""
    published = PUBLISHED_SETS[name]
    import datasets

    try:
        if not published.hub:
            return _from_url(published.url)
        data = datasets.load_dataset(published.hub, split=published.split)
        return list(data.select_columns(known_columns(data.column_names)))  # no images are decoded
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub client each raise their own
        raise unreachable("prompts", name, published.hub or published.url, error, published.file) from error


def unreachable(key: str, name: str, origin: str, error: Exception, file: str) -> UserError:
    """Return the error about a named set that cannot be loaded, with the file that replaces it."""
    reason = first_line(error)[:120].rstrip(".")
    return UserError(
        f"Expected to load '{name}' from {origin}, but it cannot be reached ({type(error).__name__}: {reason}); "
        f"fetch {file} on a machine that can, put it anywhere here and give its path, {key}=FILE."
    )


def _from_url(url: str) -> list[Row]:
    """Download a file once; GenEval's mixes types within a list, which no Arrow table and so no dataset holds."""
    import datasets

    file = Path(datasets.config.HF_DATASETS_CACHE) / "prompt_sets" / url.rpartition("/")[2]
    if not file.is_file():
        if datasets.config.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(url, timeout=30) as stream:
            content = stream.read()
        with atomic_path(file) as temporary:
            temporary.write_bytes(content)
    return read_rows(file)
