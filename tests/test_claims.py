"""Claims: one holder at a time, the dead and the stalled are found out, and sleepers notice."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guidance.runs import claims as module
from guidance.runs.claims import SUFFIX, Claims

HOUR = 3600


def elsewhere(claims: Claims) -> Claims:
    """The claims of a process of another machine, of which only the heartbeat can be known."""
    claims.me = dataclasses.replace(claims.me, machine="another", pid=1, started="1")
    return claims


def set_back(folder: Path, name: str, seconds: float) -> None:
    file = folder / f"{name}{SUFFIX}"
    then = file.stat().st_mtime - seconds
    os.utime(file, (then, then))


def keep_trying(claims: Claims, name: str, seconds: float) -> float | None:
    """Seconds until a claim was had."""
    begun = time.monotonic()
    while time.monotonic() < begun + seconds:
        if claims.take(name):
            return time.monotonic() - begun
        time.sleep(0.02)
    return None


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    a, b = Claims(tmp_path / "c"), Claims(tmp_path / "c")
    assert a.take("x") and not b.take("x") and b.take("y") and not a.take("x")
    assert a.holds("x") and not b.holds("x") and not a.holds("z") and b.is_busy("x")
    holder = b.holder("x")
    assert holder is not None and holder.pid == os.getpid() and not holder.is_gone()
    assert f"process {os.getpid()} on " in str(holder) and " since 2" in str(holder)
    b.release("x")  # not its own
    assert a.holds("x")
    a.release("x")
    assert b.take("x") and b.holder("z") is None
    a.close()
    assert (tmp_path / "c").is_dir()
    b.close()
    assert not (tmp_path / "c").exists()


def test_numbers_are_the_lowest_free(tmp_path: Path) -> None:
    a, b, c = (Claims(tmp_path / "c") for _ in range(3))
    assert [x.take_number("writer") for x in (a, b, c)] == [0, 1, 2]
    b.close()
    assert Claims(tmp_path / "c").take_number("writer") == 1


def _race(folder: str, barrier, queue) -> None:
    claims = Claims(folder)
    barrier.wait()
    queue.put(sum(claims.take(f"unit-{i}") for i in range(300)))
    barrier.wait()  # who is gone holds nothing


def test_processes_that_race_share_the_work(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_race, args=(str(tmp_path / "c"), barrier, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert sum(queue.get(timeout=30) for _ in workers) == 300
    for worker in workers:
        worker.join()


def _die(folder: str) -> None:
    claims = Claims(folder)
    assert claims.take("x") and claims.take("y") and claims.take_number("writer") == 0
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_held_is_free_at_once(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_die, args=(str(tmp_path / "c"),))
    worker.start()
    worker.join()
    claims = Claims(tmp_path / "c")
    holder = claims.holder("x")
    assert holder is not None and holder.is_gone() and not claims.is_busy("x")
    assert claims.take("x") and claims.take_number("writer") == 0
    claims.close()  # and what it left beside that is removed
    assert not (tmp_path / "c").exists()


def test_a_pid_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    a, b = Claims(tmp_path / "c"), Claims(tmp_path / "c")
    a.me = dataclasses.replace(a.me, started="12345")
    assert a.take("x") and b.take("x")


def test_a_stalled_holder_loses_and_notices(tmp_path: Path) -> None:
    a, b = elsewhere(Claims(tmp_path / "c", HOUR)), Claims(tmp_path / "c", 0.4)
    assert a.take("x") and not b.take("x")
    set_back(tmp_path / "c", "x", HOUR)
    assert not b.is_busy("x") and a.holds("x")
    waited = keep_trying(b, "x", 5)
    assert waited is not None and 0.1 <= waited < 0.4  # watched for a heartbeat and a half
    assert b.holds("x") and not a.holds("x")
    a.release("x")
    assert b.holds("x")


def test_a_clock_that_jumps_takes_nothing_from_the_living(tmp_path: Path) -> None:
    """Forwards, every claim looks old until its next heartbeat; backwards, it seems to come from the future."""
    a, b = elsewhere(Claims(tmp_path / "c", 0.4)), Claims(tmp_path / "c", 0.4)
    assert a.take("x")
    for jump in (HOUR, -HOUR):
        set_back(tmp_path / "c", "x", jump)
        assert keep_trying(b, "x", 0.7) is None and a.holds("x") and b.is_busy("x")


def test_a_heartbeat_from_the_future_that_stands_still_is_dead(tmp_path: Path) -> None:
    a, b = elsewhere(Claims(tmp_path / "c", HOUR)), Claims(tmp_path / "c", 0.3)
    assert a.take("x")
    set_back(tmp_path / "c", "x", -HOUR)
    assert b.take_from_dead("x")


def test_the_living_keep_their_claims(tmp_path: Path) -> None:
    a, b = elsewhere(Claims(tmp_path / "c", 0.2)), Claims(tmp_path / "c", 0.2)
    assert a.take("x") and not b.take_from_dead("x")
    assert keep_trying(b, "x", 0.6) is None and a.holds("x")


def test_numbers_of_the_stalled_are_not_used_again(tmp_path: Path) -> None:
    a, b = elsewhere(Claims(tmp_path / "c", HOUR)), Claims(tmp_path / "c", 0.01)
    assert a.take_number("writer") == 0
    set_back(tmp_path / "c", "writer-0", HOUR)
    b.take("writer-0", only_dead=True)
    time.sleep(0.05)
    assert b.take_number("writer") == 1


def test_a_claim_that_was_never_written_is_found_out(tmp_path: Path) -> None:
    """Its holder was killed, or the disk was full, between making the file and writing to it."""
    (tmp_path / f"x{SUFFIX}").touch()
    claims = Claims(tmp_path, 0.2)
    assert claims.holder("x") is None and not claims.take("x")
    assert keep_trying(claims, "x", 5) is not None


def test_a_dead_claim_that_was_made_anew_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    """Between judging a claim dead and removing it, another process may have taken it over."""
    a, b, c = elsewhere(Claims(tmp_path / "c", HOUR)), Claims(tmp_path / "c", 0.1), Claims(tmp_path / "c")
    assert a.take("x")
    dead = a.holder("x")
    module._rename_away(tmp_path / "c" / f"x{SUFFIX}", dead)
    assert c.take("x")
    assert not module._rename_away(tmp_path / "c" / f"x{SUFFIX}", dead)
    assert c.holds("x") and not b.take("x")


def test_a_disk_that_is_full_leaves_no_claim(tmp_path: Path, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="full"):
            Claims(tmp_path / "c").take("x")
    assert not list((tmp_path / "c").iterdir()) and Claims(tmp_path / "c").take("x")


def test_a_file_system_without_links(tmp_path: Path, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    a, b = elsewhere(Claims(tmp_path / "c", 0.4)), Claims(tmp_path / "c", 0.4)
    assert a.take("x") and not b.take("x") and keep_trying(b, "x", 0.8) is None  # it has a heartbeat of its own
    a.release("x")
    assert b.take("x")
    a.close()
    b.close()
    assert not (tmp_path / "c").exists()


def test_a_process_that_sleeps_is_not_gone(tmp_path: Path) -> None:
    """Stopped by a signal it lives, and loses its claim by its heartbeat only."""
    code = "import sys, time\nfrom guidance.runs.claims import Claims\nc = Claims(sys.argv[1], 0.4)\n"
    code += "assert c.take('x')\nprint('ready', flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None and worker.stdout.readline()
        claims = Claims(tmp_path, 0.4)
        assert keep_trying(claims, "x", 0.6) is None
        os.kill(worker.pid, signal.SIGSTOP)
        holder = claims.holder("x")
        assert holder is not None and not holder.is_gone() and json.dumps(dataclasses.asdict(holder))
        assert claims.take_from_dead("x") or keep_trying(claims, "x", 5) is not None
        worker.kill()
