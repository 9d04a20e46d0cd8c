"""Votes: one JSON line each, appended and synchronised before the rater hears that it is stored.

Every server process has a file of its own, which nobody else writes: nothing is lost when it is killed, a torn last
line (of a vote that was never acknowledged) is dropped, and files of several machines are merged by laying them side
by side.  Nothing is ever changed: an undo is a line, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from guidance.utils.errors import UserError
from guidance.utils.io import append_bytes, atomic_path

CHOICES = ("left", "right", "tie", "skip")

PATTERN = "votes-*.jsonl"


@dataclasses.dataclass(frozen=True)
class Vote:
    """The answers of a rater to one trial, or that they are undone.

    Attributes:
        id: Of this line, everywhere.
        time: Seconds since 1970; rises strictly with each line of a rater.
        study: Of :attr:`eval.preference.study.Study.id`.
        rater: Name or anonymous id.
        trial, kind, swapped: See :class:`eval.preference.pairs.Trial`.
        prompt_id, seed, first, second: See :class:`eval.preference.pairs.Item`.
        answers: Question -> "left", "right", "tie" or "skip"; None undoes the trial's earlier line.
        seconds: Between the pair's appearance and the vote.
        simulated: Whether a program voted.
    """

    id: str
    time: float
    study: str
    rater: str
    trial: int
    kind: str
    prompt_id: str
    seed: int
    first: str
    second: str
    swapped: bool
    answers: dict[str, str] | None
    seconds: float | None = None
    simulated: bool = False

    def preferred(self, question: str) -> float | None:
        """1 where the second arm's image (of a check: the damaged copy) is preferred, 0 the first's, 0.5 for a tie."""
        choice = (self.answers or {}).get(question)
        if choice == "tie":
            return 0.5
        return None if choice not in ("left", "right") else float((choice == "left") == self.swapped)


class VoteStore:
    """The votes of a study's folder, and the file that this process appends to.

    Args:
        folder: Holds ``votes-*.jsonl``; made with the first vote.

    Raises:
        UserError: If a line other than a torn last one cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        name = "".join(c if c.isalnum() else "-" for c in platform.node())[:40]
        self.path = self.folder / f"votes-{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._lock = threading.RLock()
        self._latest: dict[str, float] = {}
        self._standing: dict[str, dict[int, Vote]] = {}
        for vote in read_lines(self.folder):
            self._take(vote)

    def votes_of(self, rater: str) -> dict[int, Vote]:
        """Trial -> vote of a rater, without those that were undone."""
        with self._lock:
            return dict(self._standing.get(rater, {}))

    def count(self) -> int:
        """Pairs that were voted on by all raters, repeats, checks and skipped ones not counted."""
        with self._lock:
            return sum(is_counted(v) for votes in self._standing.values() for v in votes.values())

    def has_people(self) -> bool:
        """Whether any vote was cast by other than a program."""
        with self._lock:
            return any(not v.simulated for votes in self._standing.values() for v in votes.values())

    def append(self, vote: Vote) -> Vote:
        """Store a vote; when this returns it is on the disk.

        Args:
            vote: Its ``id`` and ``time`` are filled in here.

        Returns:
            The vote as stored.

        Raises:
            OSError: If it is not stored; the file is as it was.
        """
        with self._lock:
            now = max(time.time(), self._latest.get(vote.rater, 0.0) + 1e-3)
            vote = dataclasses.replace(vote, id=uuid.uuid4().hex, time=round(now, 3))
            _append_line(self.path, _line(vote))
            self._take(vote)
        return vote

    def append_once(self, vote: Vote) -> bool:
        """Store a vote unless its trial has one (``answers`` None: unless it has none); tells whether it did."""
        with self._lock:
            if (vote.trial in self._standing.get(vote.rater, {})) == (vote.answers is not None):
                return False
            self.append(vote)
        return True

    def _take(self, vote: Vote) -> None:
        self._latest[vote.rater] = max(vote.time, self._latest.get(vote.rater, 0.0))
        own = self._standing.setdefault(vote.rater, {})
        if vote.answers is None:
            own.pop(vote.trial, None)
        else:
            own[vote.trial] = vote


def read_lines(folder: str | os.PathLike[str]) -> list[Vote]:
    """Read every line of every file of votes in the order of time, each once."""
    found: dict[str, Vote] = {}
    for file in sorted(Path(folder).glob(PATTERN)):
        found |= {vote.id: vote for vote in read_file(file)}
    return sorted(found.values(), key=lambda vote: (vote.time, vote.id))


def standing(lines: Iterable[Vote]) -> list[Vote]:
    """The votes that hold: the last line of each rater and trial, without those that undo."""
    last = {(vote.rater, vote.trial): vote for vote in lines}
    return [vote for vote in last.values() if vote.answers is not None]


def is_counted(vote: Vote) -> bool:
    """Whether a vote counts for the preference rate: neither repeat nor check, and not skipped throughout."""
    return vote.kind == "pair" and any(choice != "skip" for choice in (vote.answers or {}).values())


def read_file(file: Path) -> list[Vote]:
    """Read the whole lines of a file.

    Raises:
        UserError: If there is no such file, or a line is not a vote.
    """
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"Expected a file of votes at '{file}', found none; check the path.") from None
    return [
        _parse(line, f"line {i} of '{file}'") for i, line in enumerate(lines, start=1) if line.endswith(b"\n")
    ]


def merge(folder: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]], study: str) -> int:
    """Add votes from elsewhere to a folder; those that are there already are left out.

    Args:
        folder: Of the study.
        files: Files of votes, or folders of such files.
        study: Id of the study.

    Returns:
        Number of lines added.

    Raises:
        UserError: If a file holds no votes, or those of another study.
    """
    there = {vote.id for vote in read_lines(folder)}
    fresh: dict[str, Vote] = {}
    for name in map(Path, files):
        lines = read_lines(name) if name.is_dir() else read_file(name)
        if not lines:
            raise UserError(
                f"Expected votes in '{name}', found none; name a file votes-*.jsonl, or its folder."
            )
        other = next((vote.study for vote in lines if vote.study != study), None)
        if other is not None:
            raise UserError(
                f"Expected votes of the study {study} in '{name}', got some of {other}; merge only votes on the same "
                "images, asked with the same options."
            )
        fresh |= {vote.id: vote for vote in lines if vote.id not in there}
    if fresh:
        text = "".join(fresh)
        write_lines(
            Path(folder) / f"votes-merged-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl",
            fresh.values(),
        )
    return len(fresh)


def write_lines(path: Path, votes: Iterable[Vote]) -> None:
    """Write votes to a file of their own."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(map(_line, votes)))


def _line(vote: Vote) -> bytes:
    return json.dumps(dataclasses.asdict(vote), allow_nan=False).encode() + b"\n"


def _append_line(path: Path, line: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    append_bytes(path, line)
    if is_new:  # the file's name must survive a power cut, too
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _parse(line: bytes, where: str) -> Vote:
    try:
        values: Any = json.loads(line)
        vote = Vote(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"Expected a vote, but {where} cannot be read; remove that line.") from error
    known = isinstance(vote.answers, dict) and all(choice in CHOICES for choice in vote.answers.values())
    if vote.answers is not None and not known:
        raise UserError(
            f"Expected answers among {', '.join(CHOICES)}, but {where} has others; remove that line."
        )
    return vote
