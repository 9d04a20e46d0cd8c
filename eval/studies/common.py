"""What the studies share: models loaded once, images sampled into records and read back, tables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8

from eval.arms import load_images
from eval.paired import paired_difference, wilson
from guidance.arms import Arm
from guidance.errors import UserError
from guidance.options import option
from guidance.prompts import Prompt, load_prompts
from guidance.records import Record, RecordStore
from guidance.run import Job, list_jobs, sample_arms
from guidance.testbed.judges import Judges, load_judges
from guidance.testbed.truth import truth_score


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Images of one arm, in the order of the jobs, with what the world knows of them."""

    images: UInt8[np.ndarray, "n h w 3"]
    records: list[Record]

    @functools.cached_property
    def truth(self) -> Float[np.ndarray, " n"]:
        """Truth score of each image; sd 1 over training scenes."""
        return truth_score(self.images)

    @property
    def seconds(self) -> float:
        """Median seconds per image."""
        return float(np.median([r.seconds for r in self.records]))


@dataclasses.dataclass
class StudyConfig:
    """What all studies share."""

    split: Literal["test", "validation"] = option("test", "captions: validation to choose, test to report")
    num_images: int = option(500, "images per arm")
    model: str = option("testbed", "the testbed or a folder of another one")
    output: str = option("runs/guides", "folder of images and results; images resume")
    num_steps: int = option(25, "sampling steps")
    batch_size: int = option(32, "images per batch")
    seed: int = option(0, "first seed")


class Bench:
    """A model, its judges and a folder: what every study samples with and judges by.

    Args:
        config: Options that all studies share.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.folder = Path(config.output) / config.split

    @functools.cached_property
    def pipe(self) -> Any:
        """The pipeline."""
        from guidance.pipelines import load_pipeline

        return load_pipeline(self.config.model)

    @functools.cached_property
    def judges(self) -> Judges:
        """The networks that grade and guide nothing."""
        return load_judges()

    def head(self, folder: str) -> Any:
        """Load a head."""
        from guidance.heads import load_head

        return load_head(folder)

    def captions(self) -> list[Job]:
        """One noise for each of ``num_images`` captions."""
        prompts = load_prompts(f"testbed:{self.config.split}", self.config.num_images, 0)
        return list_jobs(prompts, 1, self.config.seed)

    def repeated(self, name: str, count: int) -> list[Job]:
        """The empty prompt under ``count`` noises, called ``name``."""
        return list_jobs([Prompt(name, "", name)], count, self.config.seed)

    def sample(
        self, folder: str, jobs: Sequence[Job], arms: Sequence[Arm], **options: Any
    ) -> dict[str, Sampled]:
        """Sample what is missing, and read all images back; arms by name.

        Args:
            folder: Below that of the study's split.
            jobs, arms, **options: See :func:`guidance.run.sample_arms`.
        """
        store = RecordStore(self.folder / folder)
        options = {"num_steps": self.config.num_steps} | options
        options |= {"model": self.config.model, "batch_size": self.config.batch_size}
        sample_arms(self.pipe, jobs, arms, store, **options)
        found = {r.key: r for r in store.load()}
        sampled = {}
        for arm in arms:
            records = [found[arm.name, job.prompt.id, job.seed] for job in jobs]
            sampled[arm.name] = Sampled(load_images(store.folder, records), records)
        return sampled


def with_interval(value: float, interval: tuple[float, float], spec: str = "+.2f") -> str:
    """Write a number and its interval.

    >>> with_interval(0.5, (0.4, 0.62))
    '+0.50 [+0.40, +0.62]'
    """
    low, high = interval
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def share(hits: Sequence[bool] | np.ndarray) -> str:
    """A percentage with its Wilson interval.

    >>> share([True, True, True, False])
    '75.0 [30.1, 95.4]'
    """
    hits = np.asarray(hits, bool)
    low, high = wilson(int(hits.sum()), len(hits))
    return f"{100 * hits.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def truth_change(base: Sampled, other: Sampled) -> str:
    """Paired change of the truth score, in standard deviations of the base's images."""
    d = paired_difference(base.truth, other.truth, [r.prompt_id + str(r.seed) for r in base.records])
    return with_interval(d.effect_size, d.effect_interval)


def agreement(bench: Bench, sampled: Sampled, names: Sequence[str] = ("object", "colour", "time")) -> str:
    """Share of images in which the judge classifier sees what the caption says."""
    seen = bench.judges.agreement(sampled.images, [r.prompt for r in sampled.records])
    return " / ".join(f"{100 * seen[name].mean():.1f}" for name in names)


def drift(base: Sampled, other: Sampled) -> Float[np.ndarray, " n"]:
    """Root mean square pixel difference of each pair, in grey levels."""
    difference = base.images.astype(np.float32) - other.images.astype(np.float32)
    return np.sqrt(np.square(difference).mean(axis=(1, 2, 3)))


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of rows with the same keys.

    >>> print(markdown([{"arm": "a", "score": "1"}]))
    | arm | score |
    |---|---|
    | a | 1 |
    """
    if not rows:
        raise UserError("Expected at least one row, got none.")
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([text[0], "|" + "---|" * len(rows[0]), *text[1:]])
