"""guidance.utils.io: whole or absent, whatever happens in between."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from guidance.utils.errors import UserError
from guidance.utils.io import atomic_dir, atomic_path, check_writable, read_json, write_json

FAILURES = [ValueError("no"), KeyboardInterrupt(), SystemExit(1)]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "new" / "folder" / "a.txt"
    with atomic_path(final) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == final.parent and temporary.suffix == ".txt"
        assert not final.exists()
    assert final.read_text() == "whole" and names(final.parent) == ["a.txt"]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    final = tmp_path / "a.txt"
    final.write_text("old")
    with pytest.raises(type(failure)), atomic_path(final) as temporary:
        temporary.write_text("ne")
        raise failure
    assert final.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_the_suffix_survives_for_libraries_that_look_at_it(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.npy") as temporary:
        np.save(temporary, np.arange(3))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2] and names(tmp_path) == ["a.npy"]


def test_a_link_keeps_pointing(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_path(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "runs" / "head"
    with atomic_dir(final) as temporary:
        (temporary / "old.txt").write_text("1")
        assert not final.exists()
    with atomic_dir(final) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "new.txt").write_text("2")
        assert names(final) == ["old.txt"]
    assert names(final) == ["sub"] and names(final.parent) == ["head"]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    final = tmp_path / "head"
    final.mkdir()
    (final / "old.txt").write_text("1")
    with pytest.raises(type(failure)), atomic_dir(final) as temporary:
        (temporary / "new.txt").write_text("2")
        raise failure
    assert names(tmp_path) == ["head"] and names(final) == ["old.txt"]


def test_a_swap_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "head"
    final.mkdir()
    (final / "old.txt").write_text("1")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if ".old-" not in f"{source}{target}":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError), atomic_dir(final) as temporary:
        (temporary / "new.txt").write_text("2")
    assert names(tmp_path) == ["head"] and names(final) == ["old.txt"]


@pytest.mark.parametrize("atomic", [atomic_path, atomic_dir])
def test_a_file_where_a_folder_should_be(tmp_path: Path, atomic: object) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Expected a folder"), atomic(tmp_path / "file" / "x" / "y"):  # type: ignore[operator]
        pass
    with pytest.raises(UserError, match="Expected a folder"), atomic_dir(tmp_path / "file"):
        pass
    assert names(tmp_path) == ["file"]


@dataclass
class Result:
    score: float
    where: Path


def test_json_round_trip(tmp_path: Path) -> None:
    content = {
        "a": Result(float("nan"), Path("x/y")),
        "b": (np.float32(0.5), np.arange(2), np.float64("inf"), np.bool_(True)),
        3: "é",
    }
    write_json(tmp_path / "a.json", content)
    expected = {"a": {"score": None, "where": "x/y"}, "b": [0.5, [0, 1], None, True], "3": "é"}
    assert read_json(tmp_path / "a.json") == expected
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError, match="JSON-like"):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == {"a": 1} and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b'{"a": [1, 2', b"\xff\xfe\x00", None])
def test_broken_or_missing_json_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_an_output_that_cannot_be_written_is_known_before_the_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder")
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="found a file; choose another path"):
        check_writable(tmp_path / "file" / "head")

    def refuse(dir):
        raise OSError(errno.EROFS, "read-only", f"{dir}/tmp123")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError) as info:
        check_writable(tmp_path / "head")
    assert info.value.filename == str(tmp_path / "head")
