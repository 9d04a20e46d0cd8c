"""The processes of a run: how many there are, and which one this is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def join_processes() -> PartialState:
    """Join the processes that ``accelerate launch`` or ``torchrun`` started, or stay alone.

    accelerate joins processes on CPUs only if it is told that they are: without that each would do all the work.

    Returns:
        accelerate's state: ``process_index``, ``num_processes``, ``device``, ``wait_for_everyone``.
    """
    import torch
    from accelerate import PartialState

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=several and not torch.accelerator.is_available())


def leave_processes(state: PartialState) -> None:
    """Part from the other processes at a script's end; alone there is nothing to part from."""
    if state.num_processes > 1:
        state.destroy_process_group()
