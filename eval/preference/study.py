"""A study of preferences: which arms of which run are compared, by which questions; kept in RUN/preference/NAME.

The folder holds ``study.json`` (what is asked; written once), ``secret`` (of this server's random ids) and the votes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.comparison.arms import ArmImage, Arms, load_arms
from eval.preference.pairs import Item, Plan, ask_pairs
from guidance.utils.config import list_differences
from guidance.utils.errors import UserError, nearest
from guidance.utils.io import atomic_path, read_json, write_json

FOLDER, FILE, SECRET = "preference", "study.json", "secret"

QUESTIONS = {"looks": "Which image looks better?", "fits": "Which image fits the prompt better?"}

Key = tuple[str, str, int]  # arm, prompt id, seed


@dataclasses.dataclass(frozen=True)
class Study:
    """What is asked.

    Attributes:
        folder: Of the study.
        options: It was made with; see :class:`StudyOptions`.
        arms: Arm -> guidance scale (None where nothing is recorded), the baseline first.
        items: Pairs that can be asked.
        digests: Image -> beginning of the SHA-256 of its file.
        files: Image -> number of its folder, and path in that folder.
        notes: What a reader of the results must know of the pairing, in sentences.
    """

    folder: Path
    options: StudyOptions
    arms: dict[str, float | None]
    items: list[Item]
    digests: dict[Key, str]
    files: dict[Key, tuple[int, str]]
    notes: list[str] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def id(self) -> str:
        """The same wherever the same images are compared with the same options."""
        content = [self.options.__dict__, self.arms, list(map(dataclasses.astuple, self.items))]
        text = json.dumps([*content, sorted(map(list, self.digests.items()))], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def plan(self) -> Plan:
        """How queues are made."""
        o = self.options
        return Plan(o.seed, o.per_rater, o.shared, o.repeats, o.checks)

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs of arms."""
        return list(dict.fromkeys((item.first, item.second) for item in self.items))


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """What makes a study; the same for all its servers and machines.

    Attributes:
        compare: See :func:`eval.preference.pairs.ask_pairs`.
        questions: Keys of :data:`QUESTIONS`.
        seed, per_rater, shared, repeats, checks: See :class:`eval.preference.pairs.Plan`.
        target: Votes to collect for each pair of arms.
    """

    compare: str
    questions: list[str]
    seed: int
    per_rater: int | None
    shared: float
    repeats: float
    checks: float
    target: int


def study_folder(folders: Sequence[str], name: str) -> Path:
    """Return the folder of a study of a run; of several folders it is beside the first one's images.

    Raises:
        UserError: If the name cannot be that of a folder.
    """
    if not folders:
        raise UserError(
            "Expected the folder of a run, got none; write for example 'serve runs/samples/NAME'."
        )
    if not re.fullmatch(r"[\w-]{1,60}", name):
        raise UserError(f"Expected a name of letters, digits, '-' and '_' for the study, got '{name}'.")
    return Path(folders[0]) / FOLDER / name


def open_study(folder: Path, folders: Sequence[str], options: StudyOptions, **loading: Any) -> Study:
    """Make a study, or go on with the one that is there.

    Args:
        folder: Of the study.
        folders: Runs with records, or plain folders of images.
        options: Of the study.
        loading: See :func:`eval.comparison.arms.load_arms`.

    Raises:
        UserError: If a run has no pairs, or the study was made with other options or of other arms.
    """
    for question in options.questions:
        if question not in QUESTIONS:
            raise UserError(f"Unknown question '{question}'.{nearest(question, QUESTIONS)}")
    if not options.questions or len(set(options.questions)) < len(options.questions):
        raise UserError(
            f"Expected one or both of the questions {', '.join(QUESTIONS)}, got {options.questions}."
        )
    if (folder / FILE).exists():
        made = load_study(folder)
        _check_same(made, options, loading)
        return made
    arms = load_arms(folders, **loading)
    study = _new_study(folder, folders, options, arms)
    find_images(folders, study)
    write_json(folder / FILE, _to_json(study))
    return study


def load_study(folder: Path) -> Study:
    """Read a study that was made.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    if not (folder / FILE).exists():
        there = sorted(path.parent.name for path in folder.parent.glob(f"*/{FILE}"))
        hint = nearest(folder.name, there) or " Make one by 'python -m eval.preference serve RUN'."
        raise UserError(f"Expected a study of preferences in '{folder}', found none.{hint}")
    values = read_json(folder / FILE)
    try:
        return Study(
            folder,
            StudyOptions(**values["options"]),
            values["arms"],
            [Item(**item) for item in values["items"]],
            {(arm, prompt_id, seed): digest for arm, prompt_id, seed, digest, *_ in values["images"]},
            {(arm, prompt_id, seed): (n, name) for arm, prompt_id, seed, _, n, name in values["images"]},
            values["notes"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"Expected a study of this version in '{folder / FILE}', but it differs ({error}); start a new one under "
            "another name: study=NAME."
        ) from error


def find_images(folders: Sequence[str], study: Study) -> dict[Key, Path]:
    """Return the path of each image of a study; none is opened, and it need not be there any more.

    Raises:
        UserError: If the folders are not as many as the study was made of, or a path leads out of them.
    """
    needed = 1 + max(number for number, _ in study.files.values())
    if len(folders) != needed:
        raise UserError(
            f"Expected the {needed} folders that the study was made of, in order, got {len(folders)}."
        )
    roots = [Path(folder).resolve() for folder in folders]
    found = {key: Path(folders[number]) / name for key, (number, name) in study.files.items()}
    for key, path in found.items():
        if not path.resolve().is_relative_to(roots[study.files[key][0]]):
            raise UserError(
                f"Expected images inside the run, but '{path}' lies elsewhere; copy it into the run."
            )
    return found


def read_secret(folder: Path) -> bytes:
    """Return the study's secret, made at the first call; ids of images and the token are derived from it."""
    file = folder / SECRET
    if not file.exists():
        with atomic_path(file) as temporary:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(secrets.token_bytes(32))
    return file.read_bytes()


def _new_study(folder: Path, folders: Sequence[str], options: StudyOptions, arms: Arms) -> Study:
    scales = {name: _scale(images[0]) for name, images in arms.images.items()}
    names = list(scales)
    if options.compare != "baseline" and all(scale is not None for scale in scales.values()):
        names.sort(key=lambda name: scales[name] or 0.0)
    items = [
        Item(row.prompt_id, row.prompt, row.category, row.seed, first, second)
        for first, second in ask_pairs(names, options.compare)
        for row in arms.rows
    ]
    images = {(name, *image.pair): image for name, rows in arms.images.items() for image in rows}
    digests = {key: image.digest[:16] for key, image in images.items()}
    files = {key: _place(image.file, folders) for key, image in images.items()}
    notes = [f"{len(gone)} pairs were left out from the start: {why}." for why, gone in arms.excluded.items()]
    if not arms.audited:
        notes.append(
            "Images are paired by name only: nothing is recorded of noise, model, scheduler and steps."
        )
    return Study(folder, options, scales, items, digests, files, notes)


def _place(file: Path, folders: Sequence[str]) -> tuple[int, str]:
    number = next(i for i, folder in enumerate(folders) if file.is_relative_to(folder))
    return number, file.relative_to(folders[number]).as_posix()


def _scale(image: ArmImage) -> float | None:
    return image.record.scale if image.record else None


def _check_same(made: Study, options: StudyOptions, loading: Mapping[str, Any]) -> None:
    different = list_differences(made.options.__dict__, options.__dict__)
    only, baseline = loading.get("only") or (), loading.get("baseline")
    if only and {*only} - {next(iter(made.arms))} != {*list(made.arms)[1:]}:
        different.append(f"arms: {', '.join(made.arms)} there, {', '.join(only)} here")
    if baseline and baseline != next(iter(made.arms)):
        different.append(f"baseline: {next(iter(made.arms))} there, {baseline} here")
    if different:
        raise UserError(
            f"Expected the options that the study in '{made.folder}' was made with, but {'; '.join(different)}; leave "
            "them as they were, or start another study: study=NAME."
        )


def _to_json(study: Study) -> dict[str, Any]:
    return {
        "id": study.id,
        "options": study.options,
        "arms": study.arms,
        "items": study.items,
        "images": [[*key, digest, *study.files[key]] for key, digest in study.digests.items()],
        "notes": study.notes,
    }
