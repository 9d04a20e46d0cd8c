"""Votes: one JSON line each, appended and synchronised before the rater sees that it is stored.

Every server process appends to a file of its own, which no other writes: a kill loses nothing but a torn last line (of
a vote that was never acknowledged), and files of several machines are merged by placing them side by side.  Lines are
never changed: an undo is a line, too.
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
    """A rater's answers to one trial, or their undoing.

    Attributes:
        id: Unique id of this line.
        time: Seconds since 1970, strictly increasing over the lines of a rater.
        study: Id of the study.
        rater: Name or anonymous id.
        trial, kind, swapped: See :class:`eval.preference.pairs.Trial`.
        prompt_id, seed, first, second: See :class:`eval.preference.pairs.Item`.
        answers: Question -> "left", "right", "tie" or "skip"; None undoes the trial's earlier line.
        seconds: Between the pair's appearance and the vote.
        simulated: Whether the rater is simulated.
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
        """Return 1 for the second arm's image (in a check: the damaged copy), 0 for the first's, 0.5 for a tie."""
        choice = (self.answers or {}).get(question)
        if choice == "tie":
            return 0.5
        return None if choice not in ("left", "right") else float((choice == "left") == self.swapped)


class VoteStore:
    """The votes of a study's folder, and the file that this process appends to.

    Args:
        folder: Folder of ``votes-*.jsonl``; created with the first vote.

    Raises:
        UserError: If a line other than a torn last one cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        name = "".join(c if c.isalnum() else "-" for c in platform.node())[:40]
        self.path = self.folder / f"votes-{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._lock = threading.RLock()
        self._latest: dict[str, float] = {}
        self._current: dict[str, dict[int, Vote]] = {}
        for vote in read_lines(self.folder):
            self._index(vote)

    def votes_of(self, rater: str) -> dict[int, Vote]:
        """Return a rater's current votes by trial."""
        with self._lock:
            return dict(self._current.get(rater, {}))

    def count(self) -> int:
        """Count the votes of all raters, without repeats, checks and skipped pairs."""
        with self._lock:
            return sum(count_votes(votes.values()) for votes in self._current.values())

    def has_people(self) -> bool:
        """Tell whether any vote is not simulated."""
        with self._lock:
            return any(not v.simulated for votes in self._current.values() for v in votes.values())

    def append(self, vote: Vote) -> Vote | None:
        """Store a vote on the disk, unless its trial has one (an undo: unless it has none).

        Returns:
            The vote with its id and time; None if it was not stored.

        Raises:
            OSError: If it could not be stored; the file is unchanged.
        """
        with self._lock:
            if (vote.trial in self._current.get(vote.rater, {})) == (vote.answers is not None):
                return None
            now = max(time.time(), self._latest.get(vote.rater, 0.0) + 1e-3)
            vote = dataclasses.replace(vote, id=uuid.uuid4().hex, time=round(now, 3))
            _append_line(self.path, _line(vote))
            self._index(vote)
        return vote

    def _index(self, vote: Vote) -> None:
        self._latest[vote.rater] = max(vote.time, self._latest.get(vote.rater, 0.0))
        votes = self._current.setdefault(vote.rater, {})
        if vote.answers is None:
            votes.pop(vote.trial, None)
        else:
            votes[vote.trial] = vote


def read_lines(folder: str | os.PathLike[str]) -> list[Vote]:
    """Read the distinct lines of all files of votes in a folder, in the order of time."""
    found: dict[str, Vote] = {}
    for file in sorted(Path(folder).glob(PATTERN)):
        found |= {vote.id: vote for vote in read_file(file)}
    return sorted(found.values(), key=lambda vote: (vote.time, vote.id))


def current_votes(lines: Iterable[Vote]) -> list[Vote]:
    """Return the votes in effect: the last line of each rater and trial, unless it is an undo."""
    last = {(vote.rater, vote.trial): vote for vote in lines}
    return [vote for vote in last.values() if vote.answers is not None]


def count_votes(votes: Iterable[Vote]) -> int:
    """Count the votes on pairs, without repeats, checks and pairs skipped in every question."""
    return sum(v.kind == "pair" and bool({*(v.answers or {}).values()} - {"skip"}) for v in votes)


def check_votes(votes: Sequence[Vote], study: str, path: Path) -> None:
    """Check that there are votes, all of one study.

    Raises:
        UserError: If not.
    """
    if not votes:
        raise UserError(f"Expected votes in '{path}', found none; let raters vote, or name another path.")
    if others := {vote.study for vote in votes} - {study}:
        raise UserError(
            f"Expected votes of the study {study} in '{path}', got some of {', '.join(sorted(others))}; studies differ "
            "in images or options."
        )


def read_file(file: Path) -> list[Vote]:
    """Read the complete lines of a file.

    Raises:
        UserError: If there is no such file, or a line is not a vote.
    """
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"Expected a file of votes at '{file}', found none; check the path.") from None
    return [_parse(line, f"line {i} of '{file}'") for i, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def merge_votes(folder: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]], study: str) -> int:
    """Add the votes of other files to a folder, except those it already has.

    Args:
        folder: Folder of the study.
        files: Files of votes, or folders of such files.
        study: Id of the study.

    Returns:
        Number of lines added.

    Raises:
        UserError: If a file holds no votes, or those of another study.
    """
    existing = {vote.id for vote in read_lines(folder)}
    new: dict[str, Vote] = {}
    for file in map(Path, files):
        lines = read_lines(file) if file.is_dir() else read_file(file)
        check_votes(lines, study, file)
        new |= {vote.id: vote for vote in lines if vote.id not in existing}
    if new:
        digest = hashlib.sha256("".join(new).encode()).hexdigest()[:12]
        write_lines(Path(folder) / f"votes-merged-{digest}.jsonl", new.values())
    return len(new)


def write_lines(path: Path, votes: Iterable[Vote]) -> None:
    """Write votes to a file, replacing it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(map(_line, votes)))


def _line(vote: Vote) -> bytes:
    return json.dumps(dataclasses.asdict(vote), allow_nan=False).encode() + b"\n"


def _append_line(path: Path, line: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    append_bytes(path, line)
    if is_new:  # the directory entry must survive a power cut, too
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
        raise UserError(f"Expected answers among {', '.join(CHOICES)}, but {where} has others; remove it.")
    return vote
