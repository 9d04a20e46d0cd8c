"""Validate a model folder or a single-file checkpoint before loading it; explain why a model cannot be loaded.

Weights are read from safetensors only: a pickle may run code when it is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from guidance.models.presets import PRESETS, RANDOM
from guidance.utils.errors import UserError, first_line, is_out_of_memory, nearest

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")

INDEX = "model_index.json"


def parts_of(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the parts in a ``model_index.json``: part -> (library, class), without those set to null."""
    pairs = {k: v for k, v in index.items() if isinstance(v, list | tuple) and len(v) == 2 and k[0] != "_"}
    return {k: (library, cls) for k, (library, cls) in pairs.items() if cls is not None}


def check_folder(folder: Path, index: Mapping[str, Any], left_out: Collection[str], variant: str | None) -> None:
    """Check that a model folder in diffusers format holds every part, in safetensors.

    Args:
        folder: The model.
        index: Its ``model_index.json``.
        left_out: Parts that are not loaded.
        variant: Variant of the weight files, such as "fp16".
    """
    for part, (library, cls) in parts_of(index).items():
        if part in left_out or library not in ("diffusers", "transformers"):
            continue
        if not (folder / part).is_dir():
            raise UserError(
                f"Expected the part '{part}' ({cls}) in '{folder}', found no folder {part}/; copy it there from the "
                f"model, or load without it by {part}=None."
            )
        if (folder / part / "config.json").is_file():  # a network; tokenizers and schedulers have no weights
            _check_weights(folder, part, variant)


def _check_weights(folder: Path, part: str, variant: str | None) -> None:
    weights = [file.name for file in (folder / part).glob("*.safetensors")]
    if not weights and any(file.suffix in PICKLES for file in (folder / part).iterdir()):
        raise refuse_pickles(folder)
    if not weights:
        raise UserError(
            f"Expected weights of the part '{part}' in safetensors, found none in '{folder / part}'; copy them there "
            f"from the model, or load without it by {part}=None."
        )
    if variant is None and all(name.count(".") > 1 for name in weights):
        raise UserError(
            f"Expected weights of the part '{part}' in '{folder}', found only those of a variant, '{weights[0]}'; "
            "name it by variant=..."
        )


def refuse_pickles(source: str | Path) -> UserError:
    """Return the error about weights that are pickles."""
    return UserError(
        f"Expected weights in safetensors, but '{source}' has only pickles, which may run code when they are loaded; "
        "if you trust them, convert them as in docs/usage.md, 'Weights that are pickles'."
    )


def check_file(file: Path) -> None:
    """Check that a single-file checkpoint exists, in safetensors."""
    if not file.is_file():
        others = sorted(f.name for f in file.parent.glob(f"*{file.suffix}"))
        raise UserError(f"Expected a checkpoint, got '{file}', which does not exist.{nearest(file.name, others)}")
    if file.suffix in PICKLES:
        raise refuse_pickles(file)


def preset_of_file(file: Path) -> str:
    """Identify the published model of which a single-file checkpoint is a version, by its names and shapes."""
    from diffusers.loaders import single_file_utils
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            shapes = {k: torch.empty(opened.get_slice(k).get_shape(), device="meta") for k in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"Expected a safetensors file, but '{file}' cannot be read ({error}); download it again."
        ) from error
    layout = single_file_utils.infer_diffusers_model_type(shapes)
    if layout == "v2":
        raise UserError(
            f"Expected a config for '{file}', since its names do not tell what this Stable Diffusion 2 predicts; "
            "write config='sd-2.1-base' (512 px, epsilon) or config='sd-2.1' (768 px, v)."
        )
    known = {preset.single_file: name for name, preset in PRESETS.items() if preset.single_file}
    # diffusers also answers "v1" when it recognises nothing
    if layout not in known or (layout == "v1" and single_file_utils.CHECKPOINT_KEY_NAMES["v1"] not in shapes):
        raise UserError(
            f"Expected a complete checkpoint of {', '.join(known.values())}, but the names in '{file}' are of none of "
            "them; give the model it is a version of by config=..., a short name, a hub id or a folder."
        )
    return known[layout]


@contextmanager
def explained(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Explain in one sentence why a model cannot be loaded, and what to do."""
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
        hub_id = (PRESETS[name].hub_id if name in PRESETS else None) or name
        if "necessary `safetensors` weights" in str(error):  # of a repository on the hub
            raise refuse_pickles(hub_id) from error
        if is_offline(error):
            raise UserError(
                f"Expected a folder or a reachable hub id, but '{name}' could not be loaded: the hub is not reached "
                f"and its cache lacks the model; where there is a network, run: hf download {hub_id} "
                f"--local-dir FOLDER, and give that folder, or choose 'testbed' or "
                f"'{RANDOM}{name if name in PRESETS else 'NAME'}' (random weights)."
            ) from error
        raise UserError(
            f"Expected 'testbed', a folder or a reachable hub id, but '{name}' could not be loaded: {first_line(error)}"
        ) from error


def is_offline(error: BaseException | None) -> bool:
    """Detect that the hub client found neither the network (or was told not to use it) nor the files in its cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False
