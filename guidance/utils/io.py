"""Write files and folders atomically; read and write JSON.

Everything is written under a temporary name in the same folder and renamed at the end, so that neither a reader nor a
second run after a kill ever sees half a file under its final name.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from guidance.utils.errors import UserError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it onto `path` on success, remove it on any exception.

    Args:
        path: Final file. Parent folders are created; an existing file stays until the new one is complete.

    Yields:
        A hidden path in the same folder with the same suffix (`numpy.save` and PIL look at the suffix).

    Raises:
        UserError: If a parent of `path` is a file.
        FileNotFoundError: If the body wrote nothing.
    """
    final = _destination(path)
    temporary = final.with_name(f".{final.stem}.{_unique()}{final.suffix}")
    try:
        yield temporary
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; rename it to `path` on success, remove it on any exception.

    An existing folder is moved aside, swapped, and only then removed. (Between the two renames, which take
    microseconds, the final name is absent; a rename that fails is undone.)

    Args:
        path: Final folder. Parent folders are created.

    Yields:
        The folder `NAME.tmp-PID-...` beside `path`.

    Raises:
        UserError: If `path` or one of its parents is a file.
    """
    final = _destination(path)
    if final.exists() and not final.is_dir():
        raise UserError(f"Expected a folder at '{final}', found a file; remove it or choose another name.")
    temporary = final.with_name(f"{final.name}.{_unique()}")
    temporary.mkdir()
    try:
        yield temporary
        _swap(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check before long work that `path` can be written after it; leave nothing behind.

    Raises:
        UserError: If one of its parents is a file.
        OSError: If the file system refuses (read-only, full, no permission).
    """
    parent = next(p for p in Path(path).absolute().parents if p.exists())
    if not parent.is_dir():
        raise UserError(f"Expected a folder at '{parent}', found a file; choose another path.")
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"\0")
    except OSError as error:
        error.filename = str(path)  # the name the user knows
        raise


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented JSON, atomically.

    Args:
        path: Final file.
        obj: Anything made of dicts, lists, strings and numbers; dataclasses, paths, NumPy scalars, arrays and
            tensors are converted. NaN and infinity, which JSON lacks, become null.
    """
    text = json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_bytes(path: str | os.PathLike[str], data: bytes, *, end: int | None = None) -> int:
    """Append to a file in one synchronised write; a failed write is cut off again.

    Args:
        path: The file; created if missing.
        data: Complete lines or rows.
        end: End of the last complete one in bytes; what follows, torn by a kill, is cut off first.  None: no cut.

    Returns:
        The new end of the file in bytes.

    Raises:
        OSError: If not all of it could be written.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        start = os.fstat(file).st_size if end is None else end
        os.ftruncate(file, start)
        os.lseek(file, start, os.SEEK_SET)
        try:
            if os.write(file, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
            os.fsync(file)
        except BaseException:
            os.ftruncate(file, start)
            raise
    finally:
        os.close(file)
    return start + len(data)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: If the file is missing, truncated or malformed; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"Expected a JSON file at '{path}', found none; check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"Expected JSON text in '{path}', found other bytes; write it anew.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"Expected JSON in '{path}', but line {error.lineno} cannot be read ({error.msg}); the file is "
            "malformed or cut short: delete it and run the step that writes it again."
        ) from error


def _destination(path: str | os.PathLike[str]) -> Path:
    """Return the path to write to, with symbolic links resolved and parent folders created."""
    final = Path(path)
    if final.is_symlink():  # renaming onto a link would replace the link, not what it points to
        final = final.resolve()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"Expected a folder at '{final.parent}', found a file; choose another path.") from None
    return final


def _unique() -> str:
    return f"tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _swap(temporary: Path, final: Path) -> None:
    if not final.exists():
        os.rename(temporary, final)
        return
    aside = final.with_name(f"{final.name}.old-{_unique()}")
    os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except BaseException:
        with suppress(OSError):
            os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _plain(obj: Any) -> Any:
    """Convert every value to a JSON type."""
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if obj is None or isinstance(obj, str | bool | int):
        return obj
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: _plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if hasattr(obj, "tolist"):  # NumPy scalars and arrays, torch tensors
        return _plain(obj.tolist())
    raise TypeError(f"Expected JSON-like data, got {type(obj).__name__}: {obj!r}.")
