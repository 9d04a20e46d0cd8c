"""Common ground of the studies: a bench that samples and judges, and the cells of their tables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from eval.comparison.arms import load_images
from eval.metrics.precision_recall import precision_recall
from eval.stats.paired import PairedDifference, paired_difference, wilson
from eval.stats.tables import with_interval
from guidance.data.prompts import Prompt, load_prompts
from guidance.guides.base import Guide
from guidance.heads import Head, load_head
from guidance.models.pipelines import load_on
from guidance.runs.arms import Arm, guide_arms
from guidance.runs.records import Record, RecordStore
from guidance.runs.run import Job, Sampling, list_jobs, sample_arms
from guidance.testbed.judges import Judges, load_judges
from guidance.testbed.render import render_scenes
from guidance.testbed.scenes import ATTRIBUTES, scenes
from guidance.testbed.truth import truth_score
from guidance.utils.config import option
from guidance.utils.errors import UserError
from guidance.utils.processes import join_processes

_RESAMPLES = 2000

Images = UInt8[np.ndarray, "n h w 3"]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Images of an arm and their records, in the order of the jobs."""

    images: Images
    records: list[Record]

    @functools.cached_property
    def truth(self) -> Float[np.ndarray, " n"]:
        """Truth score of each image; its standard deviation over training scenes is 1."""
        return truth_score(self.images)

    @property
    def seconds(self) -> float:
        """Median seconds per image."""
        return float(np.median([r.seconds for r in self.records]))

    def change(self, base: Sampled, values: np.ndarray, base_values: np.ndarray) -> PairedDifference:
        """Compare a value per image with that of the paired images of another arm."""
        return paired_difference(base_values, values, [r.prompt_id + str(r.seed) for r in base.records])

    def truth_change(self, base: Sampled) -> str:
        """Format the paired change of the truth score, in standard deviations of the base's images."""
        d = self.change(base, self.truth, base.truth)
        return with_interval(d.effect_size, d.effect_interval)

    def drift(self, base: Sampled) -> str:
        """Format the mean of :func:`pixel_rms` to the paired images."""
        return f"{pixel_rms(base.images, self.images).mean():.1f}"

    def slowdown(self, base: Sampled) -> str:
        """Format the ratio of seconds per image."""
        return f"{self.seconds / base.seconds:.2f}x"


@dataclasses.dataclass
class StudyConfig:
    """Options of every study."""

    split: Literal["test", "validation"] = option("test", "captions: validation to choose, test to report")
    num_images: int = option(500, "images per arm")
    model: str = option("testbed", "the testbed or a folder of another model")
    output: str = option("runs/guides", "folder of images and results; sampling resumes")
    num_steps: int = option(25, "sampling steps")
    batch_size: int = option(32, "images per batch")
    seed: int = option(0, "first seed")

    def table_name(self, study: str) -> str:
        """Return the name of the study's table."""
        return study


class StudyBench:
    """Model, judges and output folder of a study.

    Processes of a launch share the sampling; then each judges all images, and the main one writes.
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
        """Networks that grade the images and guide none."""
        return load_judges()

    @functools.cached_property
    def pictures(self) -> Images:
        """Rendered scenes of the split, as many as there are images."""
        return render_scenes(scenes(self.config.split, self.config.num_images))

    @functools.cached_property
    def real(self) -> Float[np.ndarray, "n d"]:
        """Judge features of :attr:`pictures`."""
        return self.judges.features(self.pictures)

    def captions(self) -> list[Job]:
        """Return one job for each of ``num_images`` captions."""
        prompts = load_prompts(f"testbed:{self.config.split}", self.config.num_images, 0)
        return list_jobs(prompts, 1, self.config.seed)

    def sample(self, folder: str, jobs: Sequence[Job], arms: Sequence[Arm], **options: Any) -> dict[str, Sampled]:
        """Sample the images that are missing and load them all, by arm.

        Args:
            folder: Where the images go, below the folder of the split.
            jobs, arms: See :func:`guidance.runs.run.sample_arms`.
            **options: Of :class:`guidance.runs.run.Sampling`.
        """
        state, config = self.state, self.config
        store = RecordStore(self.folder / folder, state.process_index)
        sampling = Sampling(**({"num_steps": config.num_steps} | options))
        shared: dict[str, Any] = {"process_index": state.process_index, "num_processes": state.num_processes}
        shared |= {"model": config.model, "batch_size": config.batch_size, "progress": state.is_main_process}
        sample_arms(self.pipe, jobs, arms, store, sampling, **shared)
        state.wait_for_everyone()
        store.refresh()
        found = {r.key: r for r in store.load()}
        records = {arm.name: [found[arm.name, job.prompt.id, job.seed] for job in jobs] for arm in arms}
        return {arm: Sampled(load_images(store.folder, rows), rows) for arm, rows in records.items()}

    def sample_classes(self, folder: str, attribute: str, arms: Callable[[str], Sequence[Arm]]) -> dict[str, Sampled]:
        """Sample each class of an attribute from the empty prompt without CFG; the images are spread over the classes.

        Args:
            folder: As in :meth:`sample`; ``{label}`` stands for the class.
            attribute: For example "colour".
            arms: Returns the arms that guide to a class.

        Returns:
            Images by arm, class by class; the prompt id of a record is ATTRIBUTE-CLASS.  All classes start from the
            same noises.
        """
        labels = ATTRIBUTES[attribute]
        parts: dict[str, list[Sampled]] = {}
        for label in labels:
            name = f"{attribute}-{label}"
            jobs = list_jobs([Prompt(name, "", name)], self.config.num_images // len(labels), self.config.seed)
            unconditional = [dataclasses.replace(arm, conditioning="") for arm in arms(label)]
            images = self.sample(folder.format(label=label), jobs, unconditional, cfg_scale=1.0)
            for arm, s in images.items():
                parts.setdefault(arm, []).append(s)
        return {
            arm: Sampled(np.concatenate([s.images for s in found]), [r for s in found for r in s.records])
            for arm, found in parts.items()
        }

    def agreement(self, sampled: Sampled) -> str:
        """Format the shares of images in which the judge classifier sees the caption's object, colour and time."""
        seen = self.judges.agreement(sampled.images, [r.prompt for r in sampled.records])
        return " / ".join(f"{100 * seen[name].mean():.1f}" for name in ("object", "colour", "time"))

    def class_hits(self, attribute: str, sampled: Sampled) -> Bool[np.ndarray, " n"]:
        """Tell in which images of :meth:`sample_classes` the judge classifier sees their class."""
        classes = np.array(ATTRIBUTES[attribute])[self.judges.classify(sampled.images)[attribute]]
        return np.array([r.prompt_id for r in sampled.records]) == np.char.add(f"{attribute}-", classes)

    def precision(self, sampled: Sampled) -> str:
        """Format the precision of images; 0 if they are all alike, as under far too strong a guide."""
        features = self.judges.features(sampled.images)
        return f"{precision_recall(self.real, features).precision if np.ptp(features, 0).any() else 0.0:.2f}"


def load_class_head(folder: str) -> tuple[Head, str]:
    """Load a class head of the testbed, and name its attribute; refuse heads that predict something else."""
    head = load_head(folder)
    if (attribute := head.config.target) not in ATTRIBUTES:
        raise UserError(f"Expected a class head for {', '.join(ATTRIBUTES)}, got '{attribute}' in '{folder}'.")
    return head, attribute


def share(hits: Sequence[bool] | np.ndarray) -> str:
    """Format a percentage with its Wilson interval.

    >>> share([True, True, True, False])
    '75.0 [30.1, 95.4]'
    """
    hits = np.asarray(hits, bool)
    low, high = wilson(int(hits.sum()), len(hits))
    return f"{100 * hits.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def pixel_rms(a: Images, b: Images) -> Float[np.ndarray, " n"]:
    """Return the root mean square difference of each pair of images, in grey levels."""
    return np.sqrt(np.square(a.astype(np.float32) - b.astype(np.float32)).mean(axis=(1, 2, 3)))


def resampled(n: int) -> Int[np.ndarray, "resamples n"]:
    """Return rows of bootstrap samples of n images, the same in every study."""
    return np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))


def guided_arms(name: str, spec: Guide, scales: Sequence[float]) -> list[Arm]:
    """Return the arms of a guide at each scale, called ``NAME, scale=...``, without the unguided one."""
    arms = guide_arms([spec], scales)[1:]
    return [dataclasses.replace(arm, name=f"{name}, {arm.name}") for arm in arms]
