"""Claims: small files by which processes that share a folder divide the work, without a server or lock manager.

Each process has a file that identifies it, and touches it in the background.  A claim is a hard link to that file,
which only one process can create, also over NFS, and which is complete or absent.  (Without hard links, it is a file
made by exclusive creation.)  Another process may take a claim over if

- it names a process of this machine that is gone (known at once: a killed run is resumed without waiting), or
- its heartbeat has stopped.  Clocks are not compared: the age of a heartbeat is the difference between its time stamp
  and that of a file touched just now, both set by the clock of the file system.  As that clock may jump, a claim that
  looks old is watched until it has missed a heartbeat, and one that never looks old (the clock went back) until it
  has not changed for as long as an old one.

A dead claim is renamed before it is created anew, so that only one of several processes succeeds.  A process that was
merely asleep calls :meth:`Claims.holds` before it writes, and finds that it has lost the claim.
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
    """The process that holds a claim.

    Attributes:
        host, pid, since: For messages; ``since`` is the holder's local time.
        machine: Boot and process namespace, within which a pid is valid.
        started: Start of the process in ticks since the boot, because pids are reused.
        token: Identifies the :class:`Claims` object.
    """

    host: str
    pid: int
    since: str
    machine: str
    started: str
    token: str

    def is_gone(self) -> bool:
        """Tell whether it was a process of this machine that has ended; False if that cannot be known."""
        return self.machine == _machine() and self.started != _started(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, at work since {self.since}"


class Claims:
    """The claims of one process in a folder.

    Args:
        folder: Folder of the claims, created with the first and removed with the last.
        stalled_after: Seconds without a heartbeat after which a holder counts as stalled.
    """

    def __init__(self, folder: str | os.PathLike[str], stalled_after: float = STALLED_AFTER) -> None:
        if not 0 < stalled_after < float("inf"):
            raise UserError(f"Expected stalled_after in seconds above 0, got {stalled_after}; 60 is usual.")
        self.folder, self.stalled_after = Path(folder), stalled_after
        now = datetime.now().isoformat(" ", "seconds")
        host, pid, token = platform.node(), os.getpid(), uuid.uuid4().hex
        self.me = Holder(host, pid, now, _machine(), _started(pid), token)
        self._held: set[str] = set()
        # claim -> its time stamp, and the monotonic time at which that was first seen
        self._seen: dict[str, tuple[int, float]] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def interval(self) -> float:
        """Seconds between heartbeats."""
        return self.stalled_after / 4

    def take(self, name: str, *, only_dead: bool = False) -> bool:
        """Try to take a claim, and tell whether it succeeded.

        Args:
            name: Name of the claim, valid as a file name.
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
        """Take a claim; if its holder looks dead, watch it for as long as it takes to be sure."""
        while not self.take(name):
            if self.is_busy(name):
                return False
            time.sleep(self.interval / 4)
        return True

    def is_busy(self, name: str) -> bool:
        """Tell whether a claim looks alive."""
        holder, age = self.holder(name), self._age(self._path(name))
        gone = holder is not None and holder.is_gone()
        return age is not None and 0 <= age <= self.stalled_after and not gone

    def take_number(self, name: str) -> int:
        """Take the lowest free claim of NAME-0, NAME-1, ...; never that of a stalled holder, who may continue."""
        number = 0
        while not self.take(f"{name}-{number}", only_dead=True):
            number += 1
        return number

    def holds(self, name: str) -> bool:
        """Tell whether a claim is still ours; a process that slept may have lost it."""
        holder = self.holder(name)
        return holder is not None and holder.token == self.me.token

    def holder(self, name: str) -> Holder | None:
        """Return the holder of a claim; None without one, or if it died while writing the claim."""
        return _read_holder(self._path(name))

    def release(self, name: str) -> None:
        """Release a claim."""
        if self.holds(name):
            self._path(name).unlink(missing_ok=True)
        self._held.discard(name)

    def close(self) -> None:
        """Release all claims, and remove those of dead processes of this machine, and the folder if it is empty."""
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
                path.unlink(missing_ok=True)  # its process was killed just after creating it
        self._identity.unlink(missing_ok=True)
        self.folder.rmdir()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _identity(self) -> Path:
        """File that identifies this process, to which claims are links."""
        return self.folder / f".process-{self.me.token}"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _create(self, path: Path) -> bool:
        try:
            self._touch()
            os.link(self._identity, path)
        except FileExistsError:
            return False
        except FileNotFoundError:  # another process has just removed the folder
            return self._create(path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_file(path)
        return True

    def _create_file(self, path: Path) -> bool:
        try:
            with open(path, "x", encoding="utf-8") as stream:
                stream.write(self._identity.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
        return True

    def _touch(self) -> None:
        """Send a heartbeat: update the time stamp of the identity file and all links to it."""
        try:
            os.utime(self._identity)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._identity.write_text(json.dumps(dataclasses.asdict(self.me)))
            except BaseException:  # a disk that is full
                self._identity.unlink(missing_ok=True)
                raise

    def _is_stalled(self, path: Path) -> bool:
        """Tell whether the heartbeat of a claim has stopped, see the module's documentation."""
        age = self._age(path)
        if age is None:
            return False
        watched = time.monotonic() - self._seen[path.name][1]
        return watched > (1.5 * self.interval if age > self.stalled_after else self.stalled_after)

    def _age(self, path: Path) -> float | None:
        """Return the seconds since a claim's last heartbeat, by the file system's clock; None without a claim."""
        try:
            beat = path.stat().st_mtime_ns
            self._touch()
            age = (self._identity.stat().st_mtime_ns - beat) / 1e9
        except FileNotFoundError:  # released
            return None
        if self._seen.get(path.name, (None, 0.0))[0] != beat:
            self._seen[path.name] = beat, time.monotonic()
        return age

    def _beat(self) -> None:
        while not self._done.wait(self.interval):
            with suppress(OSError):  # a file system that is away for a while
                self._touch()
                for name in [name for name in list(self._held) if self.holds(name)]:
                    os.utime(self._path(name))  # in case it is not a link


def _read_holder(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _rename_away(path: Path, holder: Holder | None) -> bool:
    """Remove the claim of a dead holder; False if another process has taken it in the meantime."""
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
    """Identify this boot of this machine and the container, within which a pid is valid."""
    facts: list[Any] = [platform.node()]
    with suppress(OSError):
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(facts)


def _started(pid: int) -> str:
    """Return the start of a process in ticks since the boot; "" if there is none, "?" if that is unknown."""
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
