"""Studies of preferences: which arms of which run are compared, by which questions; stored in RUN/preference/NAME.

The folder holds ``study.json`` (what is asked; written once), ``secret`` (key of the image ids) and the votes.
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

from eval.comparison.arms import Arms, load_arms
from eval.preference.config import StudyOptions
from eval.preference.pairs import Item, Key, Trial, ask_pairs
from eval.preference.votes import Vote
from guidance.utils.config import list_differences
from guidance.utils.errors import UserError, nearest
from guidance.utils.io import atomic_path, read_json, write_json

FOLDER, FILE, SECRET = "preference", "study.json", "secret"


@dataclasses.dataclass(frozen=True)
class Study:
    """Description of a study.

    Attributes:
        folder: Folder of the study.
        options: Options it was made with.
        arms: Arm -> guidance scale (None where nothing is recorded), the baseline first.
        items: Pairs that can be asked.
        digests: Image -> first digits of the SHA-256 of its file.
        files: Image -> number of its folder, and path in that folder.
        notes: Sentences about the pairing, for the report.
    """

    folder: Path
    options: StudyOptions
    arms: dict[str, float | None]
    items: list[Item]
    digests: dict[Key, str]
    files: dict[Key, tuple[int, str]]
    notes: list[str]

    @functools.cached_property
    def id(self) -> str:
        """Hash of images and options: equal wherever the same images are compared with the same options."""
        content = [self.options.__dict__, self.arms, list(map(dataclasses.astuple, self.items))]
        text = json.dumps([*content, sorted(map(list, self.digests.items()))], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs of arms."""
        return list(dict.fromkeys((item.first, item.second) for item in self.items))

    def vote(self, rater: str, trial: Trial, answers: dict[str, str] | None, **fields: Any) -> Vote:
        """Build a rater's vote on a trial; ``answers`` None undoes it."""
        item = self.items[trial.item]
        place = (trial.index, trial.kind, item.prompt_id, item.seed, item.first, item.second, trial.swapped)
        return Vote("", 0.0, self.id, rater, *place, answers, **fields)


def study_folder(folders: Sequence[str], name: str) -> Path:
    """Return the folder of a study, in the first of the folders.

    Raises:
        UserError: If the name cannot be that of a folder.
    """
    if not folders:
        raise UserError("Expected the folder of a run, got none; for example 'serve runs/samples/NAME'.")
    if not re.fullmatch(r"[\w-]{1,60}", name):
        raise UserError(f"Expected a name of letters, digits, '-' and '_' for the study, got '{name}'.")
    return Path(folders[0]) / FOLDER / name


def open_study(folder: Path, folders: Sequence[str], options: StudyOptions, **loading: Any) -> Study:
    """Make a study, or continue the one in the folder.

    Args:
        folder: Folder of the study.
        folders: Runs with records, or plain folders of images.
        options: Options of the study.
        loading: See :func:`eval.comparison.arms.load_arms`.

    Raises:
        UserError: If a run has no pairs, or the study was made with other options or arms.
    """
    if (folder / FILE).exists():
        study = load_study(folder)
        _check_same(study, options, loading)
        return study
    study = _new_study(folder, folders, options, load_arms(folders, **loading))
    find_images(folders, study)
    content = dataclasses.asdict(study)
    images = [[*key, digest, *study.files[key]] for key, digest in study.digests.items()]
    kept = {name: content[name] for name in ("options", "arms", "items")}
    write_json(folder / FILE, {"id": study.id, **kept, "images": images, "notes": study.notes})
    return study


def load_study(folder: Path) -> Study:
    """Read a study.

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
        message = f"Expected a study of this version in '{folder / FILE}', got another ({error}); start a new one."
        raise UserError(message) from error


def find_images(folders: Sequence[str], study: Study) -> dict[Key, Path]:
    """Return the path of each image of a study, whether or not it still exists.

    Raises:
        UserError: If the number of folders differs from the study's, or a path leads out of them.
    """
    needed = 1 + max(number for number, _ in study.files.values())
    if len(folders) != needed:
        raise UserError(f"Expected the {needed} folders of the study, in order, got {len(folders)}.")
    roots = [Path(folder).resolve() for folder in folders]
    found = {key: Path(folders[number]) / name for key, (number, name) in study.files.items()}
    for key, path in found.items():
        if not path.resolve().is_relative_to(roots[study.files[key][0]]):
            raise UserError(f"Expected images inside the run, got '{path}'; copy it into the run.")
    return found


def read_secret(folder: Path) -> bytes:
    """Return the study's secret, from which image ids and the token are derived; it is made at the first call."""
    file = folder / SECRET
    if not file.exists():
        with atomic_path(file) as temporary:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(secrets.token_bytes(32))
    return file.read_bytes()


def _new_study(folder: Path, folders: Sequence[str], options: StudyOptions, arms: Arms) -> Study:
    records = {name: images[0].record for name, images in arms.images.items()}
    scales = {name: record.scale if record else None for name, record in records.items()}
    names = list(scales)
    if options.compare != "baseline" and None not in scales.values():
        names.sort(key=lambda name: scales[name] or 0.0)
    items = [
        Item(row.prompt_id, row.prompt, row.category, row.seed, first, second)
        for first, second in ask_pairs(names, options.compare)
        for row in arms.rows
    ]
    digests: dict[Key, str] = {}
    files: dict[Key, tuple[int, str]] = {}
    for name, images in arms.images.items():
        for image in images:
            key = (name, *image.pair)
            number = next(i for i, f in enumerate(folders) if image.file.is_relative_to(f))
            digests[key] = image.digest[:16]
            files[key] = number, image.file.relative_to(folders[number]).as_posix()
    notes = [f"{len(gone)} pairs were left out from the start: {why}." for why, gone in arms.excluded.items()]
    if not arms.audited:
        notes.append("Images are paired by name only: nothing is recorded of noise, model, scheduler and steps.")
    return Study(folder, options, scales, items, digests, files, notes)


def _check_same(study: Study, options: StudyOptions, loading: Mapping[str, Any]) -> None:
    different = list_differences(study.options.__dict__, options.__dict__)
    baseline, *others = study.arms
    if loading["only"] and {*loading["only"]} - {baseline} != {*others}:
        different.append(f"arms: {', '.join(study.arms)} there, {', '.join(loading['only'])} here")
    if loading["baseline"] not in (None, "", baseline):
        different.append(f"baseline: {baseline} there, {loading['baseline']} here")
    if different:
        raise UserError(
            f"Expected the options that the study in '{study.folder}' was made with, got others: "
            f"{'; '.join(different)}; leave them as they were, or start another study: study=NAME."
        )
