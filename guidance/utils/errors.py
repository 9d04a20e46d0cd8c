"""Errors a user can fix, and how a script shows them: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from guidance.utils.extras import explain_missing

_MAX_LISTED = 12

_DISK_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another output folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another output folder",
    errno.EROFS: "the disk is read-only; choose an output folder that can be written",
    errno.EACCES: "permission denied; choose a folder you may write to, or change its permissions",
}


class UserError(ValueError):
    """Report a mistake in the input, not in the code.

    The message is one sentence that says what was expected, what came, and what to do about it. Scripts print
    it as it is (see `friendly_errors`); in a notebook it is an ordinary `ValueError`.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return the tail of a message about an unknown name: the nearest valid one, and the list if it is short.

    Args:
        name: What the user wrote.
        choices: The valid names, in the order to list them.

    Returns:
        Text that starts with a space, ready to be appended to a sentence; empty if there is no choice at all.

    >>> nearest("midblok", ["midblock", "clip"])
    " Did you mean 'midblock'? Choices: midblock, clip."
    >>> nearest("zzz", ["midblock", "clip"])
    ' Choices: midblock, clip.'
    """
    names = list(choices)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f" Did you mean '{match[0]}'?" if match else ""
    if not names:
        return ""
    if len(names) <= _MAX_LISTED:
        return f"{hint} Choices: {', '.join(names)}."
    return hint or f" There are {len(names)} choices, from '{names[0]}' to '{names[-1]}'."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def friendly_errors(prog: str) -> Iterator[None]:
    """Turn the errors a user can fix into one line on stderr and an exit code; let all others pass.

    Works as a context manager and as a decorator of `main`. A `UserError`, a missing optional package and a disk that
    is full, read-only or forbidden exit with 2, Ctrl-C with 130. Everything else keeps its traceback: it is a bug.

    Args:
        prog: Name of the program as the user called it, put before the message.

    Raises:
        SystemExit: With code 2 or 130, caused by the original exception.
    """
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_no_torchvision_notice)
    try:
        yield
    except UserError as error:
        raise _stop(prog, str(error), code=2) from error
    except KeyboardInterrupt as error:
        raise _stop(prog, "interrupted", code=130) from error
    except Exception as error:
        message = explain_missing(error) if isinstance(error, ModuleNotFoundError) else _disk_message(error)
        if message is None:
            raise
        raise _stop(prog, message, code=2) from error


def _is_no_torchvision_notice(record: logging.LogRecord) -> bool:
    """Filter out the notice of transformers that image processors work without torchvision, as they do here."""
    return "requires torchvision (not installed); falling back to" not in record.getMessage()


def _stop(prog: str, message: str, *, code: int) -> SystemExit:
    label = "error: " if code == 2 else ""
    print(f"{prog}: {label}{' '.join(message.split())}", file=sys.stderr, flush=True)
    return SystemExit(code)


def _disk_message(error: Exception) -> str | None:
    """Describe a disk error in one sentence, or return None if `error` is something else."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
        # safetensors (Rust) and pyarrow carry the number in the text only.
        match = re.search(r"(?:os error|Errno) (\d+)", str(error))
        number = int(match.group(1)) if match else None
        if number is None and re.search(r"\d+ requested and \d+ written", str(error)):  # NumPy's tofile
            number = errno.ENOSPC
    if number not in _DISK_ADVICE:
        return None
    filename = getattr(error, "filename", None)
    where = f"cannot use '{filename}': " if filename else ""
    return f"{where}{_DISK_ADVICE[number]}."


_SIGNS = ("out of memory", "defaultcpuallocator", "not enough memory", "allocate memory")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Detect out-of-memory errors of any device, also as the cause of another error."""
    import torch

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS):
            return True
        error = error.__cause__
    return False
