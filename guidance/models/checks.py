"""Validate a model folder or a single-file checkpoint before loading it, and say why a model cannot be loaded.

Weights are read from safetensors only: a pickle may run code when it is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guidance.models.presets import PRESETS, RANDOM
from guidance.utils.errors import UserError, is_out_of_memory, nearest

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")

INDEX = "model_index.json"

#: What diffusers calls the layout of a single file -> the published model whose configuration it takes.
_LAYOUTS = {
    "v1": "sd-1.5",
    "xl_base": "sdxl",
    "inpainting": "sd-1.5-inpainting",
    "inpainting_v2": "sd-2-inpainting",
    "instruct-pix2pix": "instruct-pix2pix",
    "sd3": "sd3-medium",
    "flux-dev": "flux-dev",
}


def parts_of(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts a pipeline's ``model_index.json`` names: part -> (library, class); those set to null are left out."""
    pairs = {k: v for k, v in index.items() if isinstance(v, list | tuple) and len(v) == 2 and k[0] != "_"}
    return {k: (library, cls) for k, (library, cls) in pairs.items() if cls is not None}


def check_folder(
    folder: Path, index: Mapping[str, Any], left_out: Collection[str], variant: str | None
) -> None:
    """Look whether a model folder holds every part, in safetensors.

    Args:
        folder: In diffusers format.
        index: Its ``model_index.json``.
        left_out: Parts that are not read.
        variant: Of the weights' files, such as "fp16".

    Raises:
        UserError: If a part is missing, has no weights, or has them as pickles or in another variant only.
    """
    for part, (library, cls) in parts_of(index).items():
        if part in left_out or library not in ("diffusers", "transformers"):
            continue
        if not (folder / part).is_dir():
            raise UserError(
                f"Expected the part '{part}' ({cls}) in '{folder}', found no folder {part}/; copy it there from the "
                f"model, or load without it by {part}=None."
            )
        if _is_network(library, cls):
            _check_weights(folder, part, variant)


def _is_network(library: str, cls: str) -> bool:
    import diffusers
    import transformers

    found = getattr({"diffusers": diffusers, "transformers": transformers}[library], cls, None)
    return isinstance(found, type) and issubclass(found, nn.Module)


def _check_weights(folder: Path, part: str, variant: str | None) -> None:
    files = [file for file in (folder / part).iterdir() if file.is_file()]
    weights = [file.name for file in files if file.suffix == ".safetensors"]
    if not weights and any(file.suffix in PICKLES for file in files):
        raise UserError(pickled(str(folder)))
    if not weights:
        raise UserError(
            f"Expected weights of the part '{part}' in safetensors, found none in '{folder / part}'; copy them there "
            f"from the model, or load without it by {part}=None."
        )
    variants = {name.split(".")[1].partition("-")[0] for name in weights if name.count(".") > 1}
    if variant is None and len(variants) == 1 and all(name.count(".") > 1 for name in weights):
        raise UserError(
            f"Expected weights of the part '{part}' in '{folder}', found only those of the variant "
            f"'{variants.pop()}'; name it by variant=..."
        )


def pickled(source: str) -> str:
    """The sentence about weights that are pickles, with the command that converts them."""
    if source.endswith(PICKLES):
        target = str(Path(source).with_suffix(".safetensors"))
        command = (
            f"import torch; from safetensors.torch import save_file as save; "
            f"w = torch.load({source!r}, map_location='cpu', weights_only=True); w = w.get('state_dict', w); "
            f"save({{k: v.clone().contiguous() for k, v in w.items() if torch.is_tensor(v)}}, {target!r})"
        )
    else:
        target = Path(source).name + "-safetensors"
        command = (
            f"from diffusers import DiffusionPipeline as P; "
            f"P.from_pretrained({source!r}).save_pretrained({target!r})"
        )
    return (
        f"Expected weights in safetensors, but '{source}' has pickles only, which may run code when they are loaded; "
        f"if you trust them, convert them once with: python -c \"{command}\" and load '{target}'."
    )


def check_file(file: Path) -> None:
    """Look whether a single-file checkpoint is there, in safetensors.

    Raises:
        UserError: If it is not.
    """
    if not file.is_file():
        raise UserError(f"Expected a checkpoint, got '{file}', which does not exist.{_beside(file)}")
    if file.suffix in PICKLES:
        raise UserError(pickled(str(file)))


def preset_of_file(file: Path) -> str:
    """Tell from the names and shapes in a single-file checkpoint which published model it is a version of.

    Raises:
        UserError: If they do not tell.
    """
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
            f"Expected to be told which Stable Diffusion 2 '{file}' is, since its names do not tell what it predicts; "
            "write config='sd-2.1-base' (512 px, epsilon) or config='sd-2.1' (768 px, v)."
        )
    told = layout in _LAYOUTS and (
        layout != "v1" or single_file_utils.CHECKPOINT_KEY_NAMES["v1"] in shapes
    )  # v1 is also what diffusers says when it knows nothing
    if not told:
        known = "nothing known" if layout == "v1" else f"'{layout}'"
        raise UserError(
            f"Expected a whole checkpoint of {', '.join(_LAYOUTS.values())}, but the names in '{file}' say {known}; "
            "say which model it is a version of by config=..., a short name, a hub id or a folder with its "
            "configurations."
        )
    return _LAYOUTS[layout]


def _beside(file: Path) -> str:
    if not file.parent.is_dir():
        return ""
    return nearest(file.name, sorted(f.name for f in file.parent.iterdir() if f.suffix == file.suffix))


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
