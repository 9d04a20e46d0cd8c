"""What the studies share: models loaded once, images sampled into records and read back, arms."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from eval.comparison.arms import load_images
from eval.metrics.precision_recall import precision_recall
from eval.stats.paired import PairedDifference, paired_difference, wilson
from eval.stats.tables import with_interval
from guidance.data.prompts import Prompt, load_prompts
from guidance.models.pipelines import load_on
from guidance.runs.arms import Arm, guide_arms
from guidance.runs.records import Record, RecordStore
from guidance.runs.run import Job, Sampling, list_jobs, sample_arms
from guidance.runs.specs import GuideSpec
from guidance.testbed.judges import Judges, load_judges
from guidance.testbed.render import render_scenes
from guidance.testbed.scenes import ATTRIBUTES, scenes
from guidance.testbed.truth import truth_score
from guidance.utils.config import option
from guidance.utils.processes import join_processes

_RESAMPLES = 2000


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

    def table_name(self, study: str) -> str:
        """What the study's table is called in the folder of its split."""
        return study


class Bench:
    """A model, its judges and a folder: what every study samples with and judges by.

    Processes of a launch share the sampling; then each judges all images, and the main one writes.

    Args:
        config: Options that all studies share.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.folder = Path(config.output) / config.split
        self.state = join_processes()

    @functools.cached_property
    def pipe(self) -> Any:
        """The pipeline."""
        return load_on(self.state, self.config.model)

    @functools.cached_property
    def judges(self) -> Judges:
        """The networks that grade and guide nothing."""
        return load_judges()

    @functools.cached_property
    def pictures(self) -> UInt8[np.ndarray, "n h w 3"]:
        """As many rendered scenes of the split as there are images."""
        return render_scenes(scenes(self.config.split, self.config.num_images))

    @functools.cached_property
    def real(self) -> Float[np.ndarray, "n d"]:
        """Judge features of :attr:`pictures`."""
        return self.judges.features(self.pictures)

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
            jobs, arms: See :func:`guidance.runs.run.sample_arms`.
            **options: Of :class:`guidance.runs.run.Sampling`.
        """
        state = self.state
        store = RecordStore(self.folder / folder, state.process_index)
        sampling = Sampling(**({"num_steps": self.config.num_steps} | options))
        options = {"model": self.config.model, "batch_size": self.config.batch_size}
        options |= {"process_index": state.process_index, "num_processes": state.num_processes}
        sample_arms(self.pipe, jobs, arms, store, sampling, progress=state.is_main_process, **options)
        state.wait_for_everyone()
        store.refresh()
        found = {r.key: r for r in store.load()}
        sampled = {}
        for arm in arms:
            records = [found[arm.name, job.prompt.id, job.seed] for job in jobs]
            sampled[arm.name] = Sampled(load_images(store.folder, records), records)
        return sampled


def share(hits: Sequence[bool] | np.ndarray) -> str:
    """A percentage with its Wilson interval.

    >>> share([True, True, True, False])
    '75.0 [30.1, 95.4]'
    """
    hits = np.asarray(hits, bool)
    low, high = wilson(int(hits.sum()), len(hits))
    return f"{100 * hits.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def change(base: Sampled, before: np.ndarray, after: np.ndarray) -> PairedDifference:
    """Paired change of a value an image, the base's images being the pairs."""
    return paired_difference(before, after, [r.prompt_id + str(r.seed) for r in base.records])


def truth_change(base: Sampled, other: Sampled) -> str:
    """Paired change of the truth score, in standard deviations of the base's images."""
    d = change(base, base.truth, other.truth)
    return with_interval(d.effect_size, d.effect_interval)


def agreement(bench: Bench, sampled: Sampled) -> str:
    """Share of images in which the judge classifier sees the object, colour and time that the caption says."""
    seen = bench.judges.agreement(sampled.images, [r.prompt for r in sampled.records])
    return " / ".join(f"{100 * seen[name].mean():.1f}" for name in ("object", "colour", "time"))


def class_hits(bench: Bench, attribute: str, label: str, sampled: Sampled) -> Bool[np.ndarray, " n"]:
    """Whether the judge classifier sees one class of an attribute in each image."""
    return bench.judges.classify(sampled.images)[attribute] == ATTRIBUTES[attribute].index(label)


def precision(real: Float[np.ndarray, "n d"], features: Float[np.ndarray, "m d"]) -> float:
    """Of images that are all alike: 0, which a guide that is far too strong may make."""
    return precision_recall(real, features).precision if np.ptp(features, axis=0).any() else 0.0


def pixel_rms(a: UInt8[np.ndarray, "n h w 3"], b: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, " n"]:
    """Root mean square difference of each pair of images, in grey levels."""
    return np.sqrt(np.square(a.astype(np.float32) - b.astype(np.float32)).mean(axis=(1, 2, 3)))


def resampled(n: int) -> Int[np.ndarray, "resamples n"]:
    """Rows of bootstrap samples of n images; the same in every study."""
    return np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))


def guided_arms(name: str, spec: GuideSpec, scales: Sequence[float], **changes: Any) -> list[Arm]:
    """The arms of a guide at each scale, without the unguided one, called ``NAME, scale=...``."""
    arms = guide_arms([spec], scales)[1:]
    return [dataclasses.replace(arm, name=f"{name}, {arm.name}", **changes) for arm in arms]
