"""Claims: small files by which processes that share a folder agree who does what; no server, no lock manager.

Each process has a file that says who it is, and touches it in the background.  A claim is a hard link to that file,
which one process alone can make, also over NFS, and which is there whole or not at all.  (Where there are no hard links
it is a file made by exclusive creation.)  A claim is free for another when

- it names a process of this machine that is gone (known at once: a killed run goes on without waiting), or
- its heartbeat has stopped.  Clocks are not compared: the age of a heartbeat is the difference between its time stamp
  and that of a file touched just now, both set by the file system's own clock.  As that clock may jump, a claim that
  looks old is watched until it has missed a heartbeat, and one that never looks old (the clock went back) until it
  has not moved for as long as an old one.

A dead claim is renamed away before it is made anew: of several processes one alone succeeds.  A process that was only
asleep asks :meth:`Claims.holds` before it writes, and finds that it has lost the claim.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import platform
import threading
import time
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from guidance.utils.errors import UserError

SUFFIX = ".claim"

STALLED_AFTER = 60.0

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a claim.

    Attributes:
        host, pid, since: For people; ``since`` is the holder's local time.
        machine: Boot and process namespace, in which a pid means something.
        started: When the process started, in ticks since the boot: pids are used again.
        token: Of these claims.
    """

    host: str
    pid: int
    since: str
    machine: str
    started: str
    token: str

    def is_gone(self) -> bool:
        """Whether it was a process of this machine that runs no more; False where that cannot be known."""
        return self.machine == _machine() and self.started != _started(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, at work since {self.since}"


class Claims:
    """The claims of one process in a folder.

    Args:
        folder: Of the claims; made with the first one, removed with the last.
        stalled_after: Seconds without a heartbeat after which a holder counts as stalled.

    Raises:
        UserError: If ``stalled_after`` is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], stalled_after: float = STALLED_AFTER) -> None:
        if not 0 < stalled_after < float("inf"):
            raise UserError(f"Expected stalled_after in seconds above 0, got {stalled_after}; 60 is usual.")
        self.folder, self.stalled_after = Path(folder), stalled_after
        now = datetime.now().isoformat(" ", "seconds")
        host, pid, token = platform.node(), os.getpid(), uuid.uuid4().hex
        self.me = Holder(host, pid, now, _machine(), _started(pid), token)
        self._held: set[str] = set()
        # claim -> its time stamp, and since when, by a clock that does not jump, it is so
        self._seen: dict[str, tuple[int, float]] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def interval(self) -> float:
        """Seconds between heartbeats."""
        return self.stalled_after / 4

    def take(self, name: str, *, only_dead: bool = False) -> bool:
        """Claim something; tells whether it is ours now.

        Args:
            name: Of the claim, fit for a file name.
            only_dead: Do not take it from a holder that may be merely stalled.
        """
        path = self._path(name)
        if not self._create(path):
            holder = self.holder(name)
            dead = holder is not None and holder.is_gone()
            if not (dead or (not only_dead and self._is_stalled(path))):
                return False
            if not (_rename_away(path, holder) and self._create(path)):
                return False
        self._held.add(name)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat of claims")
            self._thread.start()
        return True

    def take_from_dead(self, name: str) -> bool:
        """Claim something, and if its holder looks dead watch for as long as it takes to be sure."""
        while not self.take(name):
            if self.is_busy(name):
                return False
            time.sleep(self.interval / 4)
        return True

    def is_busy(self, name: str) -> bool:
        """Whether another's claim looks alive."""
        holder, age = self.holder(name), self._age(self._path(name))
        gone = holder is not None and holder.is_gone()
        return age is not None and 0 <= age <= self.stalled_after and not gone

    def take_number(self, name: str) -> int:
        """Claim the lowest free of NAME-0, NAME-1, ...; never a stalled holder's, who may go on."""
        number = 0
        while not self.take(f"{name}-{number}", only_dead=True):
            number += 1
        return number

    def holds(self, name: str) -> bool:
        """Whether a claim is still ours; a process that slept may have lost it."""
        holder = self.holder(name)
        return holder is not None and holder.token == self.me.token

    def holder(self, name: str) -> Holder | None:
        """Who holds a claim; None if nobody does, or the claim does not say (its holder died while writing it)."""
        return _read_holder(self._path(name))

    def release(self, name: str) -> None:
        """Give a claim back."""
        if self.holds(name):
            self._path(name).unlink(missing_ok=True)
        self._held.discard(name)

    def close(self) -> None:
        """Give all claims back, remove what dead processes of this machine have left, and the folder if it is empty."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        for name in list(self._held):
            self.release(name)
        with suppress(OSError):
            self._clear()

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            holder = _read_holder(path)
            if holder == self.me or (holder is not None and holder.is_gone()):
                _rename_away(path, holder)
            elif holder is None and path.suffix != SUFFIX and (self._age(path) or 0) > self.interval:
                path.unlink(missing_ok=True)  # its process was killed when it had just made it
        self._own.unlink(missing_ok=True)
        self.folder.rmdir()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _own(self) -> Path:
        return self.folder / f".process-{self.me.token}"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _create(self, path: Path) -> bool:
        try:
            self._touch()
            os.link(self._own, path)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the last of the others has just removed the folder
            return self._create(path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_file(path)
        return True

    def _create_file(self, path: Path) -> bool:
        try:
            with open(path, "x", encoding="utf-8") as stream:
                stream.write(self._own.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
        return True

    def _touch(self) -> None:
        """Show a sign of life, with which all links to it move."""
        try:
            os.utime(self._own)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._own.write_text(json.dumps(dataclasses.asdict(self.me)))
            except BaseException:  # a disk that is full
                self._own.unlink(missing_ok=True)
                raise

    def _is_stalled(self, path: Path) -> bool:
        """Whether the heartbeat of a claim has stopped, see the module."""
        age = self._age(path)
        if age is None:
            return False
        watched = time.monotonic() - self._seen[path.name][1]
        return watched > (1.5 * self.interval if age > self.stalled_after else self.stalled_after)

    def _age(self, path: Path) -> float | None:
        """Seconds by the file system's clock since a claim's last heartbeat; None if there is no claim."""
        try:
            beat = path.stat().st_mtime_ns
            self._touch()
            age = (self._own.stat().st_mtime_ns - beat) / 1e9
        except FileNotFoundError:  # given back
            return None
        if self._seen.get(path.name, (None, 0.0))[0] != beat:
            self._seen[path.name] = beat, time.monotonic()
        return age

    def _beat(self) -> None:
        while not self._done.wait(self.interval):
            with suppress(OSError):  # a file system that is away for a while
                self._touch()
                for name in [name for name in list(self._held) if self.holds(name)]:
                    os.utime(self._path(name))  # where it is no link


def _read_holder(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _rename_away(path: Path, holder: Holder | None) -> bool:
    """Remove the claim of a dead holder; False if it has become another's in the meantime."""
    aside = path.with_name(f".dead-{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    same = _read_holder(aside) == holder
    if not same:
        with suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
    return same


@functools.cache
def _machine() -> str:
    """What a pid belongs to: this boot of this machine, and the container."""
    facts: list[Any] = [platform.node()]
    with suppress(OSError):
        facts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    return " ".join(facts)


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot; "" if there is none, "?" where it cannot be told."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except (FileNotFoundError, ProcessLookupError):
        pass
    except OSError:
        return "?"
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "?"
