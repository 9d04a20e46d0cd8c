"""Records: one JSON line per image, the images beside them, and the audit that two arms are paired.

An image is on the disk before its record is, and a record is appended in one synchronised write: after a kill
at any time the folder holds whole images, whole records, and at most one torn last line, which is dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from guidance.utils.errors import UserError
from guidance.utils.io import append_bytes, atomic_path

RECORDS_FILE = "records.jsonl"

UNGUIDED = "unguided"

#: What must be equal between the images of a pair, besides prompt id and seed.
PAIRED_FIELDS: tuple[str, ...] = (
    "prompt",
    "noise_hash",
    "start",
    "model_fingerprint",
    "scheduler",
    "num_steps",
)

PAIRED_FIELDS += ("cfg_scale", "cfg")


@dataclasses.dataclass(frozen=True)
class Record:
    """How one image was made, and where it is.

    Attributes:
        prompt_id, prompt, category, challenge: See :class:`guidance.data.prompts.Prompt`.
        seed: Seed of the image's generator.
        noise_hash: :func:`noise_hash` of its initial latents.
        arm: Name of the method: "unguided", "scale=1".
        guides: One description per guide: method, name, guidance_scale, objective, target, normalize, start,
            stop, every, space, head, head_fingerprint.  Empty for unguided images.
        cfg_scale, scheduler, num_steps: As in :func:`guidance.sampling.loop.sample_latents`; the scheduler by its
            class name.
        model, model_fingerprint: What the model was called, and what its weights were.
        dtype: Precision of the denoiser.
        image: Path of the PNG relative to the folder of the records, with forward slashes.
        sha256, bytes: Hash and size of that file.
        seconds: Wall-clock time, sampling and decoding; the batch's divided by its size.
        batch_size: Images in that batch.
        score: The guide's score at its last active step; None without a guide.
        nan_skipped: Steps in which the gradient was not finite and the image was left unguided.
        truncated: Whether the prompt was longer than the tokenizer's limit.
        head: Path of the head; "" without one.
        version: Of this toolkit.
        conditioning: What the denoiser was told instead of the prompt; None: the prompt.
        steering: Particles, their potential, and what scores them; None: one sample an image.
        cfg: What :class:`guidance.sampling.cfg.ClassifierFree` does beside its weight, and what modulates it;
            None: nothing.
        start: Image that sampling began with (its digest) and the strength; None: noise.
    """

    prompt_id: str
    prompt: str
    category: str
    challenge: str
    seed: int
    noise_hash: str
    arm: str
    guides: list[dict[str, Any]]
    cfg_scale: float
    scheduler: str
    num_steps: int
    model: str
    model_fingerprint: str
    dtype: str
    image: str
    sha256: str
    bytes: int
    seconds: float
    batch_size: int
    score: float | None
    nan_skipped: int
    truncated: bool
    head: str
    version: str
    conditioning: str | None = None
    steering: dict[str, Any] | None = None
    cfg: dict[str, Any] | None = None
    start: dict[str, Any] | None = None

    @property
    def scale(self) -> float:
        """The scale of the first guide; 0 without one."""
        return float(self.guides[0]["guidance_scale"]) if self.guides else 0.0

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells an image from all others of its folder: (arm, prompt id, seed)."""
        return self.arm, self.prompt_id, self.seed


class RecordStore:
    """The records and images of one folder, which several processes may fill.

    Args:
        folder: Holds ``records.jsonl`` and ``images/ARM/PROMPT-SEED.png``; made with the first image.
        process_index: The process that appends.  Each has a file of its own: ``records-1.jsonl`` is the second's.

    Raises:
        UserError: If a line other than a torn last one cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], process_index: int = 0) -> None:
        self.folder = Path(folder)
        self.path = self.folder / (f"records-{process_index}.jsonl" if process_index else RECORDS_FILE)
        self._records: dict[tuple[str, str, int], Record] = {}
        # file -> where its last whole line ends, and the number of that line; what follows in our own file is cut off
        # by the next append
        self._ends: dict[Path, tuple[int, int]] = {}
        for file in sorted(self.folder.glob("records*.jsonl")):
            self._read(file)

    def refresh(self) -> None:
        """Read what other processes have appended since."""
        for file in self.folder.glob("records*.jsonl"):
            if file != self.path and file.stat().st_size > self._ends.get(file, (0, 0))[0]:
                self._read(file)

    def _read(self, file: Path) -> None:
        """Read the whole lines of a file of records that have not been read."""
        end, number = self._ends.get(file, (0, 0))
        with file.open("rb") as stream:
            stream.seek(end)
            for line in stream.read().splitlines(keepends=True):
                if not line.endswith(b"\n"):  # torn, or just being written
                    break
                record = _parse(line, f"line {number + 1} of '{file}'")
                self._records[record.key] = record
                end, number = end + len(line), number + 1
        self._ends[file] = end, number

    def count(self, keys: Iterable[tuple[str, str, int]]) -> int:
        """How many of these images are recorded."""
        return sum(key in self._records for key in keys)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, arm: str, prompt_id: str, seed: int) -> Record | None:
        """Return the record of an image, whether or not its file is there."""
        return self._records.get((arm, prompt_id, seed))

    def has(self, arm: str, prompt_id: str, seed: int) -> bool:
        """Tell whether an image is done: recorded, and its file is there with the recorded size."""
        record = self.get(arm, prompt_id, seed)
        return record is not None and self.problem(record) is None

    def load(self, *, check: str | None = "size") -> list[Record]:
        """Return all records, file by file in the order in which their images were first made.

        Args:
            check: "size" (files exist and have the recorded size), "sha256" (reads them all), or None.

        Raises:
            UserError: If an image is missing or changed.
        """
        for record in self._records.values():
            problem = None if check is None else self.problem(record, read=check == "sha256")
            if problem:
                raise UserError(f"{problem}; run the command that made the folder again to make it anew.")
        return list(self._records.values())

    def problem(self, record: Record, *, read: bool = False) -> str | None:
        """Say what is wrong with the file of a record, or None; `read` compares its hash too."""
        file = self.folder / record.image
        try:
            size = file.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return f"Expected the image of a record at '{file}', found none"
        if size != record.bytes or (read and _digest(file.read_bytes()) != record.sha256):
            return f"Expected '{file}' as it was recorded, but it is another file now"
        return None

    def append(self, record: Record, image: UInt8[np.ndarray, "h w 3"]) -> Record:
        """Write an image and then its record.

        Args:
            record: Its ``sha256`` and ``bytes`` are filled in here, and a score that is not finite (JSON has
            no NaN) becomes None; the image goes to ``record.image``.
            image: RGB.

        Returns:
            The record as written.
        """
        data = encode_png(image)
        with atomic_path(self.folder / record.image) as temporary:
            temporary.write_bytes(data)
        score = record.score if record.score is not None and math.isfinite(record.score) else None
        record = dataclasses.replace(record, sha256=_digest(data), bytes=len(data), score=score)
        self._append_line(json.dumps(dataclasses.asdict(record), ensure_ascii=False, allow_nan=False))
        self._records[record.key] = record
        return record

    def _append_line(self, text: str) -> None:
        end, number = self._ends.get(self.path, (0, 0))
        self._ends[self.path] = append_bytes(self.path, text.encode() + b"\n", end=end), number + 1


def audit_pairs(
    records: Iterable[Record], baseline_arm: str = UNGUIDED, *, vary: Collection[str] = ()
) -> dict[str, list[tuple[Record, Record]]]:
    """Pair every arm's images with the baseline's, and refuse if they differ in more than the guidance.

    Args:
        records: Of one or of several folders.
        baseline_arm: The arm to compare with.
        vary: Fields of :data:`PAIRED_FIELDS` that may differ: "cfg_scale" for a sweep of plain CFG.

    Returns:
        Arm -> (baseline, image) of each prompt and seed, in the baseline's order; without its own arm.

    Raises:
        UserError: At the first image without a partner, or pair that differs.
    """
    arms: dict[str, dict[tuple[str, int], Record]] = {}
    for record in records:
        arms.setdefault(record.arm, {})[record.prompt_id, record.seed] = record
    if baseline_arm not in arms:
        raise UserError(f"Expected images of the arm '{baseline_arm}', got only {', '.join(arms) or 'none'}.")
    baseline = arms.pop(baseline_arm)
    for arm, images in arms.items():
        for prompt_id, seed in [*(baseline.keys() - images.keys()), *(images.keys() - baseline.keys())][:1]:
            lacking = arm if (prompt_id, seed) in baseline else baseline_arm
            raise UserError(
                f"Expected the same prompts and seeds in '{baseline_arm}' and '{arm}', but '{lacking}' lacks "
                f"prompt '{prompt_id}', seed {seed}; let the run that makes it finish."
            )
        for key, a in baseline.items():
            b = images[key]
            for field in PAIRED_FIELDS:
                x, y = getattr(a, field), getattr(b, field)
                if field not in vary and x != y:
                    raise UserError(
                        f"Expected '{baseline_arm}' and '{arm}' to be paired, but for prompt "
                        f"'{a.prompt_id}', seed {a.seed}, their {field} differs ({x!r} and {y!r}); sample "
                        "both in one run."
                    )
    return {arm: [(a, images[key]) for key, a in baseline.items()] for arm, images in arms.items()}


def noise_hash(latents: Tensor) -> str:
    """Identify the initial latents of one image: 16 hex digits of the SHA-256 of their float32 bytes.

    >>> import torch
    >>> noise_hash(torch.zeros(1, 4, 8, 8))
    '5f70bf18a0860070'
    """
    return _digest(latents.detach().float().cpu().contiguous().numpy().tobytes())[:16]


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode an RGB image; the same pixels give the same bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


@functools.cache
def toolkit_version() -> str:
    """The installed version, or "source" when the package is run without being installed."""
    try:
        return importlib.metadata.version("midblock-guidance")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _parse(line: bytes, where: str) -> Record:
    fields = dataclasses.fields(Record)
    names = {field.name for field in fields}
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"Expected a record, but {where} cannot be read; remove that line: its image is made again."
        ) from error
    if not isinstance(values, dict) or not needed <= values.keys() <= names:
        other = (
            [*(needed - values.keys()), *(values.keys() - names)] if isinstance(values, dict) else ["type"]
        )
        raise UserError(
            f"Expected a record of this version ({toolkit_version()}), but {where} differs in "
            f"{', '.join(sorted(other)[:3])}; read the folder with the version that wrote it, or sample anew."
        )
    return Record(**values)
