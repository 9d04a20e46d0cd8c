"""The processes of a run: how many there are, and which one this is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from guidance.utils.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState


ROOT = Path(__file__).resolve().parents[2]


def launched() -> int:
    """How many processes ``accelerate launch`` or ``torchrun`` started; told without a heavy import."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes() -> PartialState:
    """Join the processes that ``accelerate launch`` or ``torchrun`` started, or stay alone.

    accelerate joins processes on CPUs only if it is told that they are: without that each would do all the work.

    Returns:
        accelerate's state: ``process_index``, ``num_processes``, ``device``, ``wait_for_everyone``.
    """
    import torch
    from accelerate import PartialState

    return PartialState(cpu=launched() > 1 and not torch.accelerator.is_available())


def leave_processes(state: PartialState) -> None:
    """Part from the other processes at a script's end; alone there is nothing to part from."""
    if state.num_processes > 1:
        state.destroy_process_group()


def run_script(module: str, words: Sequence[str], *, processes: int = 1) -> None:
    """Run a script as a user would, on several processes with one thread each.

    Args:
        module: Its name: "sample.sweep".
        words: Its arguments.
        processes: How many share the work.

    Raises:
        UserError: If it fails; it has said why.
    """
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(launch if processes > 1 else []), module, *words]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
    if subprocess.run(command, env=os.environ | threads | {"PYTHONPATH": path}, check=False).returncode:
        raise UserError(f"Expected {module} to finish, but it failed; its message is above.")
