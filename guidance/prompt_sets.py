"""Published prompt sets by name, from the hub or from where they were published."""

from __future__ import annotations

import dataclasses
import urllib.request
from pathlib import Path
from typing import Any

from guidance.errors import UserError
from guidance.io import atomic_path
from guidance.prompt_files import (
    CATEGORY_COLUMNS,
    CHALLENGE_COLUMNS,
    PROMPT_COLUMNS,
    Row,
    read_rows,
)


@dataclasses.dataclass(frozen=True)
class PublishedSet:
    """Where a prompt set is published.

    Attributes:
        file: What to fetch by hand where the hub cannot be reached.
        hub: Dataset on the hub; "" where ``url`` is read instead.
        split: Of the dataset on the hub.
        url: File of rows in one of the formats of ``prompt_files``.
    """

    file: str
    hub: str = ""
    split: str = "train"
    url: str = ""


_PIX2PIX = "instruct-pix2pix.eecs.berkeley.edu/human-written-prompts.jsonl"

#: Named sets. ``coco`` is the first caption of each of the 5000 images of val2017, ``instruct-pix2pix`` the captions of
#: its human-written edits.
PUBLISHED_SETS: dict[str, PublishedSet] = {
    "parti": PublishedSet(
        "PartiPrompts.tsv from github.com/google-research/parti", hub="nateraw/parti-prompts"
    ),
    "drawbench": PublishedSet(
        "the CSV file of huggingface.co/datasets/sayakpaul/drawbench", hub="sayakpaul/drawbench"
    ),
    "coco": PublishedSet(
        "captions_val2017.json, in annotations_trainval2017.zip from cocodataset.org",
        hub="phiyodr/coco2017",
        split="validation",
    ),
    "geneval": PublishedSet(
        "prompts/evaluation_metadata.jsonl from github.com/djghosh13/geneval",
        url="https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl",
    ),
    "instruct-pix2pix": PublishedSet(_PIX2PIX, url=f"https://{_PIX2PIX}"),
}


def read_published(name: str) -> list[Row]:
    """Read the rows of a named set, downloaded at its first use.

    Raises:
        UserError: If it cannot be loaded; the message says what to fetch instead.
    """
    published = PUBLISHED_SETS[name]
    try:
        return _from_hub(published) if published.hub else _from_url(published.url)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub client each raise their own
        raise unreachable("prompts", name, published.hub or published.url, error, published.file) from error


def unreachable(key: str, name: str, origin: str, error: Exception, file: str) -> UserError:
    """Say that a named set cannot be loaded and which file replaces it."""
    reason = (str(error).strip().splitlines() or [""])[0][:120].rstrip(".")
    return UserError(
        f"Expected to load '{name}' from {origin}, but it cannot be reached ({type(error).__name__}: {reason}); "
        f"fetch {file} on a machine that can, put it anywhere here and give its path, {key}=FILE."
    )


def _from_hub(published: PublishedSet) -> list[Row]:
    import datasets

    data: Any = datasets.load_dataset(published.hub, split=published.split)
    wanted = {*PROMPT_COLUMNS, *CATEGORY_COLUMNS, *CHALLENGE_COLUMNS}
    kept = [name for name in data.column_names if name.lower() in wanted]  # no images are decoded
    return list(data.select_columns(kept) if kept else data)


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
