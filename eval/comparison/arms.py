"""Arms of a comparison, read from folders of images with or without records, and paired image by image."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from guidance.data.tables import read_rows, require_cell
from guidance.runs.records import UNGUIDED, Record, RecordStore, audit_pairs
from guidance.utils.errors import UserError, nearest
from guidance.utils.images import IMAGE_SUFFIXES, to_rgb

Pair = tuple[str, int]  # prompt id and seed

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as image folders of datasets have them


@dataclasses.dataclass(frozen=True)
class ArmImage:
    """One image of an arm.

    Attributes:
        file: Its path.
        digest: SHA-256 of its bytes, hexadecimal.
        prompt_id, prompt, category, challenge, seed: As in a record.  A folder without prompts has "" and the
            file's name as ``prompt_id``.
        record: How it was made; None in plain folders.
    """

    file: Path
    digest: str
    prompt_id: str
    prompt: str = ""
    category: str = ""
    challenge: str = ""
    seed: int = 0
    record: Record | None = None

    @property
    def pair(self) -> Pair:
        """Identify the pair: images of a pair have the same prompt and seed."""
        return self.prompt_id, self.seed

    def open(self) -> Image.Image:
        """Read it as RGB."""
        with Image.open(self.file) as opened:
            image = to_rgb(opened)
        image.info["prompt"] = self.prompt  # as in a PNG's text chunk; heads that use captions read it
        return image


def read_folder(folder: Path, prompts: str | os.PathLike[str] | None = None) -> dict[str, list[ArmImage]]:
    """List the images of a folder, arm by arm, without opening them.

    Args:
        folder: With ``records.jsonl``, or of images, at any depth; a plain folder is one arm named after it.
        prompts: As for `load_arms`.

    Raises:
        UserError: If there is no such folder, it has no images, or the table of prompts does not fit.
    """
    if not folder.is_dir():
        raise UserError(f"Expected a folder of images at '{folder}', found none; check the path.")
    if not any(folder.glob("records*.jsonl")):
        return {folder.resolve().name: _read_plain(folder, prompts)}
    arms: dict[str, list[ArmImage]] = {}
    for r in RecordStore(folder).load(check=None):
        image = ArmImage(folder / r.image, r.sha256, r.prompt_id, r.prompt, r.category, r.challenge, r.seed, r)
        arms.setdefault(r.arm, []).append(image)
    return arms


def _read_plain(folder: Path, prompts: str | os.PathLike[str] | None) -> list[ArmImage]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"Expected images ({', '.join(IMAGE_SUFFIXES)}) or records in '{folder}', found none.")
    tables = [Path(prompts)] if prompts else [folder / name for name in TABLES if (folder / name).is_file()]
    table = _read_table(tables[0]) if tables else {}
    images, seeds = [], dict[str, int]()
    for file in files:
        name = file.relative_to(folder).with_suffix("").as_posix()
        if table and name not in table:
            raise UserError(f"Expected a row for '{name}' in '{tables[0]}', found none; add its prompt.")
        row = table.get(name, {})
        key = str(row.get("prompt_id") or row.get("prompt") or name)
        seeds[key] = seeds.get(key, -1) + 1
        seed = seeds[key] if row.get("seed") in (None, "") else int(row["seed"])
        prompt, category, challenge = (str(row.get(k) or "") for k in ("prompt", "category", "challenge"))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        images.append(ArmImage(file, digest, key, prompt, category, challenge, seed))
    return images


def _read_table(file: Path) -> dict[str, dict[str, Any]]:
    """Read the rows of plain images by the name of the file without its suffix."""
    table: dict[str, dict[str, Any]] = {}
    for row in read_rows(file):
        name = require_cell(row, ("file_name", "filename", "image", "id"), f"'{file}'", "names of the images")
        prompt = require_cell(row, ("prompt", "caption", "text"), f"'{file}'")
        rest = {str(key).strip().lower(): value for key, value in row.items()}
        key = Path(str(name)).with_suffix("").as_posix()
        if key in table:
            raise UserError(f"Expected one row an image in '{file}', got two for '{name}'; remove one.")
        table[key] = rest | {"prompt": " ".join(str(prompt or "").split())}
    return table


def load_images(folder: str | os.PathLike[str], records: Sequence[Record]) -> UInt8[np.ndarray, "n h w 3"]:
    """Read the images of records, uint8 RGB."""
    return np.stack([np.asarray(Image.open(Path(folder) / r.image).convert("RGB")) for r in records])


@dataclasses.dataclass(frozen=True)
class Arms:
    """Arms whose images correspond, row by row.

    Attributes:
        baseline: Name of the first one.
        images: Arm -> images, all arms in the same order of pairs.
        audited: Records show that prompt, noise, model, scheduler and steps are the same.
        excluded: Reason -> pairs ("PROMPT, seed SEED") left out of all arms.
        converted: Mode or size -> number of images that were not plain 8-bit RGB of the usual size.
    """

    baseline: str
    images: dict[str, list[ArmImage]]
    audited: bool
    excluded: dict[str, list[str]]
    converted: dict[str, int]

    @property
    def names(self) -> list[str]:
        """Names, the baseline first."""
        return list(self.images)

    @property
    def rows(self) -> list[ArmImage]:
        """Images of the baseline, whose prompts and seeds all arms share."""
        return self.images[self.baseline]


def load_arms(
    folders: Sequence[str | os.PathLike[str]],
    *,
    baseline: str | None = None,
    only: Collection[str] = (),
    vary: Collection[str] = (),
    prompts: str | os.PathLike[str] | None = None,
    exclude: bool = False,
) -> Arms:
    """Read the arms of folders and pair their images; a single arm needs no partner.

    A folder with ``records.jsonl`` holds the arms its records name; a plain folder of images is one arm, named after
    the folder, whose images are paired by file name.  The arms of several folders with records are named FOLDER/ARM, or
    FOLDER where it holds one.

    Args:
        folders: One with records, or more of either kind.
        baseline: Arm with which the others are compared; None: "unguided" if there is one, else the first.
        only: Arms to compare besides the baseline; empty takes all.
        vary: Record fields in which pairs may differ on purpose: "cfg_scale", "scheduler", "num_steps", and
            "model_fingerprint" for two checkpoints.  Plain sampling at another CFG weight may always differ in that.
        prompts: Table with file_name (or id) and prompt, optionally category, challenge and seed, for plain folders;
            None looks for `TABLES` in each folder.
        exclude: Leave out and count pairs in which an image is missing, unreadable or without a partner, instead of
            raising an error.

    Raises:
        UserError: If a folder has no images, two arms are not paired, or an image cannot be used.
    """
    if not folders:
        raise UserError("Expected one or more folders of images, got none.")
    found = _named([(Path(folder), read_folder(Path(folder), prompts)) for folder in folders])
    base, *others = _order(found, baseline, only)
    arms = {name: _by_pair(name, found[name]) for name in (base, *others)}
    excluded: dict[str, list[str]] = {}
    pairs = _common(arms, exclude, excluded)
    audited = _audit(arms, pairs, vary)
    converted = _check_images(arms, pairs, exclude, excluded)
    dropped = {pair for gone in excluded.values() for pair in gone}
    pairs = [pair for pair in pairs if _label(pair) not in dropped]
    if len(pairs) < 2:
        raise UserError(f"Expected two or more pairs of images, {len(pairs)} can be used; sample more.")
    images = {name: [by_pair[pair] for pair in pairs] for name, by_pair in arms.items()}
    _check_prompts(images, base)
    return Arms(base, images, audited, excluded, converted)


def _named(found: Sequence[tuple[Path, dict[str, list[ArmImage]]]]) -> dict[str, list[ArmImage]]:
    if len(found) == 1:
        return dict(found[0][1])
    named: dict[str, list[ArmImage]] = {}
    for folder, arms in found:
        for arm, images in arms.items():
            name = folder.resolve().name if len(arms) == 1 else f"{folder.resolve().name}/{arm}"
            if name in named:
                raise UserError(f"Expected folders of different names, got two arms called '{name}'; rename one.")
            named[name] = images
    return named


def _order(found: Mapping[str, Sequence[ArmImage]], baseline: str | None, only: Collection[str]) -> list[str]:
    """List the arms to compare: the baseline, then the others by their scale."""
    base = baseline if baseline is not None else UNGUIDED if UNGUIDED in found else next(iter(found))
    for name in (base, *only):
        if name not in found:
            expected = "the baseline to be one of" if name == base else "arms among"
            raise UserError(f"Expected {expected} {', '.join(found)}, got '{name}'.{nearest(name, found)}")
    records = {name: images[0].record for name, images in found.items() if name != base and (not only or name in only)}
    return [base, *sorted(records, key=lambda name: record.scale if (record := records[name]) else 0.0)]


def _by_pair(arm: str, images: Sequence[ArmImage]) -> dict[Pair, ArmImage]:
    ordered = {image.pair: image for image in images}
    if len(ordered) < len(images):
        again = next(i for i in images if ordered[i.pair] is not i)
        raise UserError(
            f"Expected one image for each prompt and seed of '{arm}', got '{again.file.name}' and "
            f"'{ordered[again.pair].file.name}' for {_label(again.pair)}; remove one."
        )
    return ordered


def _common(arms: Mapping[str, Collection[Pair]], exclude: bool, excluded: dict[str, list[str]]) -> list[Pair]:
    """List the pairs that every arm has, in the order of the first."""
    union = list(dict.fromkeys(pair for pairs in arms.values() for pair in pairs))
    for name, pairs in arms.items():
        lacking = [_label(pair) for pair in union if pair not in pairs]
        if lacking and not exclude:
            shown = "; ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
            raise UserError(
                f"Expected the same prompts and seeds in every arm, but '{name}' lacks {shown} of {len(union)}; let "
                "its run finish, or set exclude=true to leave those pairs out."
            )
        if lacking:
            excluded[f"no image in '{name}'"] = lacking
    return [pair for pair in union if all(pair in pairs for pairs in arms.values())]


def _audit(arms: Mapping[str, Mapping[Pair, ArmImage]], pairs: Sequence[Pair], vary: Collection[str]) -> bool:
    """Audit the records of the pairs with those of the first arm; return False if an arm has none."""
    found = {name: [images[pair].record for pair in pairs] for name, images in arms.items()}
    records = {name: [r for r in rows if r is not None] for name, rows in found.items()}
    if records != found:
        return False
    base, *others = records
    for name in others:
        plain = not any(r.guides or r.steering for r in records[name])
        both = [dataclasses.replace(r, arm=arm) for arm in (base, name) for r in records[arm]]
        audit_pairs(both, base, vary={*vary, "cfg_scale", "cfg"} if plain else vary)
    return True


def _check_images(
    arms: Mapping[str, Mapping[Pair, ArmImage]], pairs: Sequence[Pair], exclude: bool, excluded: dict[str, list[str]]
) -> dict[str, int]:
    """Check every file once: exclude the pairs of unreadable files, and count files that have to be converted."""
    modes: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    for pair in pairs:
        for name, images in arms.items():
            problem = _problem(images[pair], modes, sizes)
            if problem and not exclude:
                raise UserError(
                    f"Expected an image of '{name}' at '{images[pair].file}', but it {problem}; make it again, or set "
                    "exclude=true to leave its pair out."
                )
            if problem:
                excluded.setdefault(f"an image in '{name}' {problem}", []).append(_label(pair))
    usual = max(sizes, key=sizes.__getitem__, default=(0, 0))
    others = {f"{w}x{h} instead of {usual[0]}x{usual[1]}": n for (w, h), n in sizes.items() if (w, h) != usual}
    return {f"mode {mode}": n for mode, n in modes.items() if mode != "RGB"} | others


def _problem(image: ArmImage, modes: Counter[str], sizes: Counter[tuple[int, int]]) -> str | None:
    """Say what keeps an image from being used; files with records are decoded only when features are computed."""
    try:
        if image.record and image.file.stat().st_size != image.record.bytes:
            return "is not the one that was recorded"
        with Image.open(image.file) as opened:
            mode, size = opened.mode, opened.size
            if not image.record:
                opened.load()  # without a recorded size, only decoding reveals a truncated file
    except FileNotFoundError:
        return "is missing"
    except (OSError, SyntaxError, ValueError):
        return "cannot be read"
    modes[mode] += 1
    sizes[size] += 1
    return None


def _check_prompts(images: Mapping[str, Sequence[ArmImage]], base: str) -> None:
    """Refuse arms with different prompts; it is enough if one of them has prompts."""
    for name, rows in images.items():
        for a, b in zip(images[base], rows, strict=True):
            if a.prompt != b.prompt and a.prompt and b.prompt:
                raise UserError(
                    f"Expected '{base}' and '{name}' to have the same prompts, but for {_label(a.pair)} they are "
                    f"{a.prompt!r} and {b.prompt!r}; pair the folders by the same table."
                )


def _label(pair: Pair) -> str:
    return f"'{pair[0]}', seed {pair[1]}"
