"""Votes: one JSON line each, appended and synchronised before the rater sees that it is stored.

Every server process appends to a file of its own, which no other writes: a kill loses nothing but a torn last line (of
a vote that was never acknowledged), and files of several machines are merged by placing them side by side.  Lines are
never changed: an undo is a line, too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from guidance.utils.errors import UserError
from guidance.utils.io import append_bytes, atomic_path

CHOICES = ("left", "right", "tie", "skip")


@dataclasses.dataclass(frozen=True)
class Vote:
    """A rater's answers to one trial, or their undoing; for most fields see `Trial` and `Item` of a study."""

    id: str  # of this line
    time: float  # seconds since 1970, strictly increasing over the lines of a process
    study: str  # id of the study
    rater: str  # name or anonymous id
    trial: int
    kind: str
    prompt_id: str
    seed: int
    first: str
    second: str
    swapped: bool
    answers: dict[str, str] | None  # question -> one of CHOICES; None undoes the trial's earlier line
    seconds: float | None = None  # between the pair's appearance and the vote
    simulated: bool = False

    def preferred(self, question: str) -> float | None:
        """Return 1 for the second arm's image (in a check: the damaged copy), 0 for the first's, 0.5 for a tie."""
        choice = (self.answers or {}).get(question)
        if choice == "tie":
            return 0.5
        return None if choice not in ("left", "right") else float((choice == "left") == self.swapped)


class VoteStore:
    """The votes of a study's folder, and the file that this process appends to; thread-safe."""

    def __init__(self, folder: Path) -> None:
        name = "".join(c if c.isalnum() else "-" for c in platform.node())[:40]
        self.path = folder / f"votes-{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._lock = threading.Lock()
        self._latest = 0.0
        self._current: dict[str, dict[int, Vote]] = {}
        for vote in read_lines(folder):
            self._index(vote)

    def votes_of(self, rater: str) -> dict[int, Vote]:
        """Return a rater's current votes by trial, the last one last."""
        with self._lock:
            return dict(self._current.get(rater, {}))

    def append(self, vote: Vote) -> bool:
        """Store a vote, unless its trial has one (an undo: unless it has none), and tell whether it was stored."""
        with self._lock:
            if (vote.trial in self._current.get(vote.rater, {})) == (vote.answers is not None):
                return False
            now = round(max(time.time(), self._latest + 1e-3), 3)
            vote = dataclasses.replace(vote, id=uuid.uuid4().hex, time=now)
            is_new = not self.path.exists()
            append_bytes(self.path, _line(vote))
            if is_new:  # the directory entry must survive a power cut, too
                parent = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(parent)
                os.close(parent)
            self._index(vote)
        return True

    def _index(self, vote: Vote) -> None:
        self._latest = max(vote.time, self._latest)
        votes = self._current.setdefault(vote.rater, {})
        votes.pop(vote.trial, None)
        if vote.answers is not None:
            votes[vote.trial] = vote


def read_lines(path: Path, study: str | None = None) -> list[Vote]:
    """Read the lines of a file, or the distinct ones of a folder's `votes-*.jsonl`, in the order of time.

    A torn last line is left out.  With the id of a study, no votes, and those of another study, are refused.
    """
    if not path.exists():
        raise UserError(f"Expected a file of votes at '{path}', found none; check the path.")
    found: dict[str, Vote] = {}
    for file in path.glob("votes-*.jsonl") if path.is_dir() else [path]:
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
            try:
                vote = Vote(**json.loads(line))
                valid = vote.answers is None or {*vote.answers.values()} <= {*CHOICES}
            except (ValueError, TypeError, AttributeError):
                valid = False
            if not valid:
                among = ", ".join(CHOICES)
                raise UserError(f"Expected a vote with answers among {among} in line {number} of '{file}'; remove it.")
            found[vote.id] = vote
    others = ", ".join(sorted({vote.study for vote in found.values()} - {study}))
    if study and (others or not found):
        fix = "let raters vote, or name another path; studies differ in images or options"
        raise UserError(f"Expected votes of the study {study} in '{path}', found {others or 'none'}; {fix}.")
    return sorted(found.values(), key=lambda vote: (vote.time, vote.id))


def write_lines(path: Path, votes: Iterable[Vote]) -> None:
    """Write votes to a file, replacing it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(map(_line, votes)))


def current_votes(lines: Iterable[Vote]) -> list[Vote]:
    """Return the votes in effect: the last line of each rater and trial, unless it is an undo."""
    last = {(vote.rater, vote.trial): vote for vote in lines}
    return [vote for vote in last.values() if vote.answers is not None]


def count_votes(votes: Iterable[Vote]) -> int:
    """Count the votes on pairs, without repeats, checks and pairs skipped in every question."""
    return sum(v.kind == "pair" and bool({*(v.answers or {}).values()} - {"skip"}) for v in votes)


def _line(vote: Vote) -> bytes:
    return json.dumps(dataclasses.asdict(vote), allow_nan=False).encode() + b"\n"
