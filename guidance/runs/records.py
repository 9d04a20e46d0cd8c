"""Records: one JSON line per image, the image files, and the audit that two arms are paired.

An image is written before its record, and a record is appended in one synchronised write: after a kill at any time the
folder holds complete images, complete records, and at most one torn last line, which is dropped.
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

#: Fields that must be equal between the images of a pair, besides prompt id and seed.
PAIRED_FIELDS = (
    *("prompt", "noise_hash", "start", "model_fingerprint"),
    *("scheduler", "num_steps", "cfg_scale", "cfg"),
)


@dataclasses.dataclass(frozen=True)
class Record:
    """Record of an image: how it was made, and its file.

    Attributes:
        prompt_id, prompt, category, challenge: See :class:`guidance.data.prompts.Prompt`.
        seed: Seed of the image's generator.
        noise_hash: :func:`noise_hash` of its initial latents.
        arm: Name of the method: "unguided", "scale=1".
        guides: One description per guide: method, name, guidance_scale, objective, target, normalize, start,
            stop, every, space, head, head_fingerprint.  Empty for unguided images.
        cfg_scale, scheduler, num_steps: As in :func:`guidance.sampling.loop.sample_latents`; the scheduler by its
            class name.
        model, model_fingerprint: Name and fingerprint of the model.
        dtype: Precision of the denoiser.
        image: Path of the PNG relative to the folder of the records, with forward slashes.
        sha256, bytes: Hash and size of that file.
        seconds: Wall-clock time of sampling and decoding: that of the batch divided by its size.
        batch_size: Images in that batch.
        score: The guide's score at its last active step; None without a guide.
        nan_skipped: Steps in which the gradient was not finite and the image was left unguided.
        truncated: Whether the prompt was longer than the tokenizer's limit.
        head: Path of the head; "" without one.
        version: Version of this toolkit.
        conditioning: Text that the denoiser saw instead of the prompt; None: the prompt.
        steering: Options of steering and the guide that scores the particles; None: one sample per image.
        cfg: Options of :class:`guidance.sampling.cfg.ClassifierFree` besides the weight; None: none.
        start: Digest of the image from which sampling started, and the strength; None: noise.
        steps: Solver steps taken; 0 in records of earlier versions.
        gradients: Denoiser calls in which guides took a gradient or a direction.
        pushes: Denoiser calls whose prediction was shifted, or solver steps whose latents were moved.
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
    steps: int = 0
    gradients: int = 0
    pushes: int = 0

    @property
    def scale(self) -> float:
        """The scale of the first guide; 0 without one."""
        return float(self.guides[0]["guidance_scale"]) if self.guides else 0.0

    @property
    def key(self) -> tuple[str, str, int]:
        """Key of an image in its folder: (arm, prompt id, seed)."""
        return self.arm, self.prompt_id, self.seed


class RecordStore:
    """The records and images of one folder, which several processes may fill.

    Args:
        folder: Holds ``records.jsonl`` and ``images/ARM/PROMPT-SEED.png``; created with the first image.
        process_index: The process that appends, each to its own file: the second to ``records-1.jsonl``.

    Raises:
        UserError: If a line other than a torn last one cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], process_index: int = 0) -> None:
        self.folder = Path(folder)
        self.path = self.folder / (f"records-{process_index}.jsonl" if process_index else RECORDS_FILE)
        self._records: dict[tuple[str, str, int], Record] = {}
        # file -> end and number of its last complete line; the next append to our own file cuts off what follows
        self._ends: dict[Path, tuple[int, int]] = {}
        for file in sorted(self.folder.glob("records*.jsonl")):
            self._read(file)

    def refresh(self) -> None:
        """Read what other processes have appended."""
        for file in self.folder.glob("records*.jsonl"):
            if file != self.path and file.stat().st_size > self._ends.get(file, (0, 0))[0]:
                self._read(file)

    def _read(self, file: Path) -> None:
        """Read the new complete lines of a file of records."""
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
        """Count the recorded ones among these images."""
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
                raise UserError(f"{problem}; run the command that made the folder again to replace it.")
        return list(self._records.values())

    def problem(self, record: Record, *, read: bool = False) -> str | None:
        """Describe what is wrong with the file of a record, or return None; `read` also compares its hash."""
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
            record: Its ``sha256`` and ``bytes`` are filled in here, and a score that is not finite becomes None (JSON
                has no NaN); the image is written to ``record.image``.
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
    """Pair the images of every arm with the baseline's, and check that they differ only in the guidance.

    Args:
        records: Records of one or several folders.
        baseline_arm: The arm to compare with.
        vary: Fields of :data:`PAIRED_FIELDS` that may differ: "cfg_scale" for a sweep of plain CFG.

    Returns:
        Arm -> (baseline, image) of each prompt and seed, in the order of the baseline; without the baseline's arm.

    Raises:
        UserError: At the first image without a partner or pair that differs.
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
    """Encode an RGB image; equal pixels give equal bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


@functools.cache
def toolkit_version() -> str:
    """Return the installed version, or "source" if the package is not installed."""
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
            f"Expected a record, but {where} cannot be read; remove that line to make its image again."
        ) from error
    if not isinstance(values, dict) or not needed <= values.keys() <= names:
        other = [*(needed - values.keys()), *(values.keys() - names)] if isinstance(values, dict) else ["type"]
        raise UserError(
            f"Expected a record of this version ({toolkit_version()}), but {where} differs in "
            f"{', '.join(sorted(other)[:3])}; read the folder with the version that wrote it, or sample anew."
        )
    return Record(**values)
