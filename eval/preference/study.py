"""Studies: which pairs of images are asked, in which order, with which image on the left.

The folder RUN/preference/NAME holds ``study.json`` (what is asked; written once), ``secret`` (key of the image ids) and
the votes.  A queue is a function of the study's seed and the rater's name: a rater who returns, on another machine or
after a restart, finds the same one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from eval.comparison.arms import load_arms
from eval.preference.config import FolderConfig, MergeConfig, Plan, StudyConfig
from eval.preference.votes import Vote, read_lines, write_lines
from guidance.utils.config import list_differences
from guidance.utils.errors import UserError, nearest
from guidance.utils.io import read_json, write_json

Key = tuple[str, str, int]  # arm, prompt id, seed of an image
_GAP = 5  # trials between a pair and its repeat, at least


@dataclasses.dataclass(frozen=True)
class Item:
    """A pair of images of one prompt and one noise; the second arm is guided, or of the higher scale."""

    prompt_id: str
    prompt: str
    category: str
    seed: int
    first: str
    second: str

    @property
    def keys(self) -> tuple[Key, Key]:
        """Keys of the first and the second arm's image."""
        return (self.first, self.prompt_id, self.seed), (self.second, self.prompt_id, self.seed)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A position in a rater's queue."""

    index: int
    kind: str  # "pair", its "repeat", or "check": the item's first image beside a damaged copy of it
    item: int
    swapped: bool  # whether the second arm's image (or the damaged copy) is on the left


@dataclasses.dataclass(frozen=True)
class Study:
    """Description of a study; the baseline is the first arm."""

    folder: Path
    options: Plan
    arms: dict[str, float | None]  # guidance scales, where they are recorded
    items: list[Item]
    images: dict[Key, tuple[str, int, str]]  # first digits of the file's SHA-256, number of its folder, path in that
    notes: list[str]  # sentences about the pairing

    @functools.cached_property
    def id(self) -> str:
        """Hash of images and options: equal wherever the same images are compared with the same options."""
        digests = sorted([key, digest] for key, (digest, _, _) in self.images.items())
        content = [self.options.__dict__, self.arms, list(map(dataclasses.astuple, self.items)), digests]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs of arms."""
        return list(dict.fromkeys((item.first, item.second) for item in self.items))

    def vote(self, rater: str, trial: Trial, answers: dict[str, str] | None, **fields: Any) -> Vote:
        """Build a rater's vote on a trial; ``answers`` None undoes it."""
        item = self.items[trial.item]
        place = (trial.index, trial.kind, item.prompt_id, item.seed, item.first, item.second, trial.swapped)
        return Vote("", 0.0, self.id, rater, *place, answers, **fields)


def queue(n_items: int, plan: Plan, rater: str) -> list[Trial]:
    """Make the queue of a rater.

    Half of the pairs are swapped, at random; the side of a repeat and of a check is drawn independently.
    """
    digest = hashlib.sha256(f"{plan.seed}\0{rater}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    n = min(plan.per_rater or n_items, n_items)
    order = np.random.default_rng(plan.seed).permutation(n_items)
    n_shared = round(plan.shared * n)
    individual = rng.permutation(order[n_shared:])[: n - n_shared]
    chosen = rng.permutation(np.concatenate([order[:n_shared], individual]))
    swapped = rng.permutation(np.arange(n) % 2 == rng.integers(2))
    placed: list[tuple[Any, ...]] = [(i, "pair", chosen[i], swapped[i]) for i in range(n)]  # place, kind, item, side
    for i in rng.permutation(max(0, n - _GAP))[: round(plan.repeats * n)]:
        placed.append((rng.uniform(i + _GAP, n), "repeat", chosen[i], rng.integers(2)))
    for item in rng.permutation(n_items)[: round(plan.checks * n)]:
        placed.append((rng.uniform(0, n), "check", item, rng.integers(2)))
    placed.sort(key=lambda entry: entry[0])
    return [Trial(index, kind, int(item), bool(side)) for index, (_, kind, item, side) in enumerate(placed)]


def votes_needed(rate: float, power: float = 0.8) -> int:
    """Return the independent, decided votes that tell a rate from one half at level 5% (Fleiss et al. 2003, 2.5).

    >>> votes_needed(0.55), votes_needed(0.6), votes_needed(0.55, power=0.9)
    (783, 194, 1047)
    """
    if not (0 < rate < 1 and rate != 0.5 and 0.05 < power < 1):
        raise UserError(
            f"Expected a rate to detect other than 0.5, and a power above 0.05, both below 1, got {rate} and {power}; "
            "detect=0.55 and power=0.8 are usual."
        )
    quantile = NormalDist().inv_cdf
    root = quantile(0.975) * 0.5 + quantile(power) * math.sqrt(rate * (1 - rate))
    return math.ceil((root / (rate - 0.5)) ** 2)


def open_study(config: StudyConfig) -> Study:
    """Make the study of the options, or continue it; refuse other options or arms than it was made with."""
    options = Plan(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Plan)})
    options.target = options.target or votes_needed(config.detect, config.power)
    file = _study_file(config)
    if file.exists():
        study = load_study(config)
        baseline, *others = study.arms
        arms = [arm for arm in others if not config.arms or arm in config.arms]
        arms += [arm for arm in config.arms if arm not in study.arms]
        there = study.options.__dict__ | {"baseline": baseline, "arms": others}
        here = options.__dict__ | {"baseline": config.baseline or baseline, "arms": arms}
        if different := "; ".join(list_differences(there, here)):
            made = f"Expected the options that the study in '{study.folder}' was made with, got others: {different}"
            raise UserError(f"{made}; leave them as they were, or start another study: study=NAME.")
        return study
    study = _new_study(file.parent, options, config)
    find_images(config.folders, study)
    content = {name: getattr(study, name) for name in ("id", "options", "arms", "items", "notes")}
    write_json(file, content | {"images": [[*key, *image] for key, image in study.images.items()]})
    return study


def load_study(config: FolderConfig) -> Study:
    """Read a study."""
    file = _study_file(config)
    if not file.exists():
        there = sorted(path.parent.name for path in file.parent.parent.glob("*/study.json"))
        hint = nearest(config.study, there) or " Make one by 'python -m eval.preference serve RUN'."
        raise UserError(f"Expected a study of preferences in '{file.parent}', found none.{hint}")
    values = read_json(file)
    try:
        options, items = Plan(**values["options"]), [Item(**item) for item in values["items"]]
        images = {(arm, prompt_id, seed): tuple(image) for arm, prompt_id, seed, *image in values["images"]}
        return Study(file.parent, options, values["arms"], items, images, values["notes"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"Expected a study of this version in '{file}', got {error}; start a new one.") from error


def find_images(folders: Sequence[str], study: Study) -> dict[Key, Path]:
    """Return the path of each image of a study, whether or not it still exists; refuse one that leads out of a run."""
    needed = 1 + max(number for _, number, _ in study.images.values())
    if len(folders) != needed:
        raise UserError(f"Expected the {needed} folders of the study, in order, got {len(folders)}.")
    found = {key: Path(folders[number]) / name for key, (_, number, name) in study.images.items()}
    for path, (_, number, _) in zip(found.values(), study.images.values(), strict=True):
        if not path.resolve().is_relative_to(Path(folders[number]).resolve()):
            raise UserError(f"Expected images inside the run, got '{path}'; copy it into the run.")
    return found


def merge(config: MergeConfig) -> None:
    """Add the votes of other machines, from files or folders of such files, to a study."""
    study = load_study(config)
    files = [Path(file) for file in (*config.folders[1:], *config.files)]
    if not files:
        raise UserError("Expected files of votes to merge, got none; name them after the run.")
    existing, new = {vote.id for vote in read_lines(study.folder)}, dict[str, Vote]()
    for file in files:
        new |= {vote.id: vote for vote in read_lines(file, study.id) if vote.id not in existing}
    if new:
        digest = hashlib.sha256("".join(new).encode()).hexdigest()[:12]
        write_lines(study.folder / f"votes-merged-{digest}.jsonl", new.values())
    print(f"{len(new)} new votes in {study.folder}")


def _study_file(config: FolderConfig) -> Path:
    if not config.folders:
        raise UserError("Expected the folder of a run, got none; for example 'serve runs/samples/NAME'.")
    if not re.fullmatch(r"[\w-]{1,60}", config.study):
        raise UserError(f"Expected a name of letters, digits, '-' and '_' for the study, got '{config.study}'.")
    return Path(config.folders[0], "preference", config.study, "study.json")


def _new_study(folder: Path, options: Plan, config: StudyConfig) -> Study:
    loading = {name: getattr(config, name) for name in ("baseline", "vary", "prompts", "exclude")}
    arms = load_arms(config.folders, only=config.arms, **loading)
    records = {name: images[0].record for name, images in arms.images.items()}
    scales = {name: record.scale if record else None for name, record in records.items()}
    names = list(scales)
    if len(names) < 2:
        raise UserError(f"Expected two or more arms, got '{names[0]}' alone; sample a guided one, or name two folders.")
    if options.compare != "baseline" and None not in scales.values():
        names.sort(key=lambda name: scales[name] or 0.0)
    pairs = {
        "baseline": itertools.product(names[:1], names[1:]),
        "adjacent": itertools.pairwise(names),
        "all": itertools.combinations(names, 2),
    }
    items = [
        Item(row.prompt_id, row.prompt, row.category, row.seed, first, second)
        for first, second in pairs[options.compare]
        for row in arms.rows
    ]
    images: dict[Key, tuple[str, int, str]] = {}
    for name, image in ((name, image) for name, images in arms.images.items() for image in images):
        number = next(i for i, root in enumerate(config.folders) if image.file.is_relative_to(root))
        path = image.file.relative_to(config.folders[number]).as_posix()
        images[name, *image.pair] = image.digest[:16], number, path
    notes = [f"{len(gone)} pairs were left out from the start: {why}." for why, gone in arms.excluded.items()]
    if not arms.audited:
        notes.append("Images are paired by name only: nothing is recorded of noise, model, scheduler and steps.")
    return Study(folder, options, scales, items, images, notes)
