"""Why a model cannot be loaded, in a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from guidance.errors import UserError
from guidance.memory import is_out_of_memory
from guidance.model_files import pickled
from guidance.presets import PRESETS, RANDOM


@contextmanager
def explained(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Say in a sentence why a model cannot be loaded, and what to do."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(
                f"Expected enough memory for '{name}' in {str(dtype).removeprefix('torch.')} on {device}, but it ran "
                "out; load it with dtype=torch.float16 or bfloat16 (half the memory), on device='cpu' followed by "
                "pipe.enable_model_cpu_offload(), or without what you do not need (parts=..., vae=None)."
            ) from error
        if isinstance(error, RuntimeError):
            raise
        if "necessary `safetensors` weights" in str(error):  # of a repository on the hub
            raise UserError(pickled(_hub_id(name))) from error
        if is_offline(error):
            raise UserError(
                f"Expected a folder or a reachable hub id, but '{name}' could not be loaded: the hub is not reached "
                f"and its cache lacks the model; where there is a network, run: hf download {_hub_id(name)} "
                f"--local-dir FOLDER, and give that folder, or choose 'testbed' or '{_random(name)}' (random weights)."
            ) from error
        raise UserError(
            f"Expected 'testbed', a folder or a reachable hub id, but '{name}' could not be loaded: "
            f"{first_line(error)}"
        ) from error


def _hub_id(name: str) -> str:
    return (PRESETS[name].hub_id if name in PRESETS else None) or name


def _random(name: str) -> str:
    return RANDOM + (name if name in PRESETS else "NAME")


def is_offline(error: BaseException | None) -> bool:
    """Whether the hub client found neither a network, or leave to use it, nor the files in its cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
