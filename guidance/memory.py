"""Whether memory is out."""

from __future__ import annotations

import torch

_SIGNS = ("out of memory", "defaultcpuallocator", "not enough memory", "allocate memory")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory is out, on any device."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS):
            return True
        error = error.__cause__
    return False
