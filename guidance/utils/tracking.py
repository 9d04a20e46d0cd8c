"""Track experiments through accelerate's trackers; a failing tracker never ends a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

#: ``log(values, step)``.
Log = Callable[[Mapping[str, float], int], None]


def wandb_is_configured() -> bool:
    """Tell whether a Weights & Biases account (or a mode) is set up on this machine."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "api.wandb.ai" in netrc.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def start_tracking(accelerator: Accelerator, project: str, config: Mapping[str, Any], run_name: str) -> Log:
    """Start the trackers of an accelerator.

    W&B runs offline where there is no account; ``wandb sync`` uploads such a run later.

    Args:
        accelerator: ``accelerate.Accelerator(log_with=..., project_dir=...)``.
        project: Name of the project.
        config: Hyperparameters to record.
        run_name: Name of the run.

    Returns:
        ``log(values, step)``; after a failure it warns once and does nothing more.
    """
    if not wandb_is_configured():
        os.environ["WANDB_MODE"] = "offline"
    options = {"wandb": {"name": run_name, "dir": str(accelerator.project_dir)}}
    failed = [not _survives(accelerator.init_trackers, project, _flat(config), options)]

    def log(values: Mapping[str, float], step: int) -> None:
        if not failed[0]:
            failed[0] = not _survives(accelerator.log, dict(values), step)

    return log


def log_table(accelerator: Accelerator, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table; a failure only warns.

    Args:
        accelerator: With running trackers.
        name: Name of the table.
        columns: Names of the columns.
        rows: Cells: text, numbers, None, or the path of an image.  TensorBoard, which has no tables, shows paths.
    """
    for tracker in accelerator.trackers:
        _survives(_TABLES[tracker.name], tracker.tracker, name, list(columns), [list(row) for row in rows])


def log_files(accelerator: Accelerator, name: str, files: Sequence[Path]) -> None:
    """Keep files with the run, in W&B as an artifact; TensorBoard notes their paths.  A failure only warns."""
    for tracker in accelerator.trackers:
        _survives(_FILES[tracker.name], tracker.tracker, name, list(files))


def _wandb_table(run: Any, name: str, columns: list[str], rows: list[list[Any]]) -> None:
    import wandb

    data = [[wandb.Image(str(cell)) if isinstance(cell, Path) else cell for cell in row] for row in rows]
    run.log({name: wandb.Table(columns=[*columns], data=data)})


def _wandb_files(run: Any, name: str, files: list[Path]) -> None:
    import wandb

    artifact = wandb.Artifact(name, type="records")
    for file in files:
        artifact.add_file(str(file))
    run.log_artifact(artifact)


def _tensorboard_table(writer: Any, name: str, columns: list[str], rows: list[list[Any]]) -> None:
    lines = [columns, ["---"] * len(columns), *rows]
    writer.add_text(name, "\n".join(" | ".join(map(str, line)) for line in lines))  # Markdown


def _tensorboard_files(writer: Any, name: str, files: list[Path]) -> None:
    writer.add_text(name, ", ".join(str(file.resolve()) for file in files))


_TABLES = {"wandb": _wandb_table, "tensorboard": _tensorboard_table}

_FILES = {"wandb": _wandb_files, "tensorboard": _tensorboard_files}


def stop_tracking(accelerator: Accelerator) -> None:
    """Close the trackers only: ``end_training`` would end the process group too."""
    for tracker in accelerator.trackers:
        _survives(tracker.finish)


def _survives(function: Callable[..., Any], *arguments: Any) -> bool:
    try:
        function(*arguments)
    except Exception as error:  # a tracker is never worth a training run
        warnings.warn(f"Tracking failed and is off for this run ({type(error).__name__}: {error}).", stacklevel=3)
        return False
    return True


def _flat(config: Mapping[str, Any]) -> dict[str, int | float | str | bool]:
    """Convert values to numbers and text, which every tracker takes."""
    plain = int | float | str | bool
    return {key: value if isinstance(value, plain) else str(value) for key, value in config.items()}
