"""Join and leave the processes of a run; run a script in processes of its own."""

from __future__ import annotations

import importlib
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
    """Return the number of processes that ``accelerate launch`` or ``torchrun`` started, without heavy imports."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Tell whether this is the main process, which alone shows bars, without heavy imports."""
    return os.environ.get("RANK", "0") == "0"


def join_processes() -> PartialState:
    """Join the processes that ``accelerate launch`` or ``torchrun`` started, if any; a script's first call.

    The bars of diffusers, transformers and datasets for loading, which tear those of the scripts, are turned off.
    accelerate joins processes on CPUs only with ``cpu=True``; without it each process would do all the work.

    Returns:
        accelerate's state: ``process_index``, ``num_processes``, ``device``, ``wait_for_everyone``.
    """
    import torch
    from accelerate import PartialState

    for library in ("diffusers", "transformers"):
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    return PartialState(cpu=launched() > 1 and not torch.accelerator.is_available())


def leave_processes(state: PartialState) -> None:
    """Leave the process group, if there is one, at the end of a script."""
    if state.num_processes > 1:
        state.destroy_process_group()


def run_script(module: str, words: Sequence[str], *, processes: int = 1) -> None:
    """Run a script as a user would, on several processes with one thread each.

    Args:
        module: Name of the script, for example "sample.sweep".
        words: Arguments.
        processes: Number of processes that share the work.
    """
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(launch if processes > 1 else []), module, *words]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
    if subprocess.run(command, env=os.environ | threads | {"PYTHONPATH": path}, check=False).returncode:
        raise UserError(f"Expected {module} to finish, but it failed; its message is above.")
