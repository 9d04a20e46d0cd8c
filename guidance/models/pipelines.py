"""Load pipelines by name: the testbed, published models, folders, single files, or their shapes with random weights."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from guidance.models.checks import (
    INDEX,
    PICKLES,
    check_file,
    check_folder,
    explained,
    is_offline,
    parts_of,
    preset_of_file,
)
from guidance.models.presets import PRESETS, RANDOM, TINY, find_preset
from guidance.models.types import Pipeline
from guidance.utils.errors import UserError, first_line, nearest

if TYPE_CHECKING:
    from accelerate import PartialState


TESTBED = "testbed"

TESTBED_FOLDER = Path(__file__).parents[1] / "testbed" / "weights"

#: The denoiser alone, for ``parts``.
DENOISER = ("unet", "transformer")

#: Task -> the class of diffusers that finds the pipeline for it.
TASKS = {
    "text2img": "AutoPipelineForText2Image",
    "img2img": "AutoPipelineForImage2Image",
    "inpaint": "AutoPipelineForInpainting",
}

_UNCHECKED: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}


def load_pipeline(
    name: str | os.PathLike[str] = TESTBED,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool | None = None,
    task: str | None = None,
    parts: Collection[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Pipeline:
    """Load a pipeline, frozen and in eval mode, ready for guidance.

    Args:
        name: One of

            * "testbed": the embedded model;
            * a key of :data:`guidance.models.presets.PRESETS` such as "sd-2.1-base", or any hub id;
            * a folder in diffusers format;
            * a single-file checkpoint, ``x.safetensors``, in the layout of the original repositories;
            * ``random:`` before a key of ``PRESETS``: the real classes and shapes with random weights, offline (options
              of files, such as ``revision``, have no effect); with ``-tiny`` at the end, every width divided by 32
              ("random:sdxl-tiny", for tests).
        device: None picks CUDA, then MPS, then the CPU.
        dtype: None keeps float32; ``torch.float16`` or "float16", ``bfloat16`` for half precision.
        revision: Branch, tag or commit on the hub.
        variant: Variant of the weight files: "fp16" halves the download where there is one; it does not set ``dtype``.
        local_files_only: Do not access the hub; the environment variable ``HF_HUB_OFFLINE=1`` has the same effect.
        task: A key of :data:`TASKS`: the pipeline of the same parts that starts from text, an image, or a mask.
        parts: Networks to load, by the names in ``model_index.json``; all others and the tokenizers are None.
            :data:`DENOISER` is enough to measure costs.  None loads everything.
        config: For a single file: the model whose configurations and tokenizer to use, as a short name, hub id or
            folder; None identifies it by the file, and loads them from the hub or its cache.
        **kwargs: Passed on to ``from_pretrained`` or ``from_single_file`` of the pipeline; a part's name replaces the
            part, or leaves it out (``vae=None``).

    Returns:
        The pipeline class named in the model's ``model_index.json``, without safety checker.  Weights are read from
        safetensors only, and no code of a downloaded folder is run.

    Raises:
        UserError: If there is no such model, device, part or task, a part is missing or has no safetensors, the
            pipeline has no denoiser, the hub is not reached, or memory is exhausted.
    """
    name, dtype = os.fspath(name), _dtype(dtype)
    device = torch.device(default_device() if device is None else _checked(device))
    hub = {"revision": revision, "local_files_only": local_files_only}
    hub |= {key: kwargs.pop(key, None) for key in ("token", "cache_dir")}
    hub = {key: value for key, value in hub.items() if value is not None}
    with explained(name, device, dtype):
        if name.startswith(RANDOM):
            pipe = _random(name, parts, device=device, dtype=dtype, **kwargs)
        elif Path(name).suffix in (".safetensors", *PICKLES) and not Path(name).is_dir():
            pipe = _from_single_file(Path(name), config, parts, hub, dtype=dtype, **kwargs)
        else:
            pipe = _from_pretrained(name, parts, hub, dtype=dtype, variant=variant, **kwargs)
        pipe = pipe if task is None else for_task(pipe, task)
        freeze(pipe)
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"Expected a floating-point type such as float32, float16 or bfloat16 as dtype, got {dtype!r}.")
    return found


def for_task(pipe: Pipeline, task: str) -> Pipeline:
    """Return the pipeline of another task with the same parts; nothing is loaded or copied.

    Args:
        pipe: A pipeline of diffusers.
        task: Key of :data:`TASKS`.

    Raises:
        UserError: If diffusers maps no pipeline to this one and the task.
    """
    import diffusers

    if task not in TASKS:
        raise UserError(f"Expected a task, got '{task}'.{nearest(task, TASKS)}")
    try:
        return getattr(diffusers, TASKS[task]).from_pipe(pipe)
    except ValueError as error:
        raise UserError(
            f"Expected a pipeline that diffusers can turn to '{task}', got {type(pipe).__name__}; build the class you "
            "mean from its parts: Class(**pipe.components)."
        ) from error


# ---- sources ------------------------------------------------------------------------------------------------------
def _random(name: str, parts: Collection[str] | None, **options: Any) -> Pipeline:
    from guidance.models.random_weights import build_pipeline

    preset = find_preset(name.removeprefix(RANDOM))
    pipe = build_pipeline(preset.name, **(_left_out(preset.parts, parts) | options))
    pipe.register_to_config(_name_or_path=name)
    return pipe


def _from_pretrained(
    name: str, parts: Collection[str] | None, hub: dict[str, Any], *, variant: str | None, **options: Any
) -> Pipeline:
    from diffusers import DiffusionPipeline

    source = source_of(name)
    index = DiffusionPipeline.load_config(source, **hub)
    _check_denoiser(index)
    unchecked = _UNCHECKED if "safety_checker" in index else {}
    options = unchecked | _left_out(parts_of(index), parts) | options
    if Path(source).is_dir():
        check_folder(Path(source), index, [k for k, v in options.items() if v is None], variant)
    safe = {"use_safetensors": True, "trust_remote_code": False}
    return DiffusionPipeline.from_pretrained(source, variant=variant, **safe, **hub, **options)


def _from_single_file(
    file: Path,
    config: str | os.PathLike[str] | None,
    parts: Collection[str] | None,
    hub: dict[str, Any],
    *,
    dtype: torch.dtype,
    **options: Any,
) -> Pipeline:
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    check_file(file)
    source = source_of(preset_of_file(file) if config is None else os.fspath(config))
    try:
        index = diffusers.DiffusionPipeline.load_config(source, **hub)
        _check_denoiser(index)
        cls = getattr(diffusers, index["_class_name"], None)
        if cls is None or not hasattr(cls, "from_single_file"):
            raise UserError(
                f"Expected a pipeline that reads single files, got {index['_class_name']} from '{source}'; give a "
                "folder in diffusers format instead of the file."
            )
        unchecked = _UNCHECKED if "safety_checker" in index else {}
        options = unchecked | _left_out(parts_of(index), parts) | options
        return cls.from_single_file(str(file), config=source, torch_dtype=dtype, **hub, **options)
    except (SingleFileComponentError, KeyError) as error:
        raise UserError(
            f"Expected '{file}' to hold every part of the pipeline configured in '{source}', but it does not "
            f"({first_line(error)}); load that part by itself and pass it on by name."
        ) from error
    except OSError as error:
        if not is_offline(error):
            raise
        raise UserError(
            f"Expected the configurations and the tokenizer of '{source}' for '{file}', but the hub is not reached "
            f"and its cache lacks them; where there is a network, run: hf download {source} --include '*.json' '*.txt' "
            "--local-dir FOLDER, and give config=FOLDER."
        ) from error


def source_of(name: str) -> str:
    """Return the folder or hub id that a name stands for."""
    folder = TESTBED_FOLDER if name == TESTBED else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).exists():
            raise UserError(
                f"Expected a diffusers pipeline in '{name}', found no {INDEX} there; choose the folder that "
                f"holds unet/, vae/ and scheduler/, or write 'testbed' for the embedded model."
            )
        return str(folder)
    if name.count("/") == 1 and name[0] not in "./~":
        return name
    if "/" in name or os.sep in name:
        raise UserError(f"Expected a folder in diffusers format, got '{name}', which does not exist.")
    base = name.removesuffix(TINY)
    if base in PRESETS and (base != name or PRESETS[base].hub_id is None):
        raise UserError(
            f"Expected a model with published weights, got '{name}', which has none; write '{RANDOM}{name}'."
        )
    if base not in PRESETS:
        raise UserError(
            f"Expected 'testbed', a folder, a .safetensors file, a hub id (owner/name) or a published model's short "
            f"name, got '{name}'.{nearest(name, [TESTBED, *PRESETS])}"
        )
    return str(PRESETS[name].hub_id)


def _left_out(names: Collection[str], parts: Collection[str] | None) -> dict[str, None]:
    """Map every part that is not wanted to None; the scheduler is always loaded."""
    if parts is None:
        return {}
    if unknown := [part for part in parts if part not in names and part not in DENOISER]:
        raise UserError(f"Expected parts of the model, got '{unknown[0]}'.{nearest(unknown[0], names)}")
    return {part: None for part in names if part not in parts and part != "scheduler"}


def _check_denoiser(index: Mapping[str, Any]) -> None:
    from guidance.models.layouts import SUPPORTED

    if not set(DENOISER) & set(parts_of(index)):
        raise UserError(
            f"Expected a pipeline with a unet or a transformer, got {index.get('_class_name')}, which has none; "
            f"supported are {', '.join(SUPPORTED)}."
        )


def _checked(device: str | torch.device) -> str | torch.device:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"Expected a device of this machine, got '{device}' ({first_line(error)}); leave device out."
        ) from error
    return device


def freeze(pipe: Pipeline) -> None:
    """Put every network of a pipeline in eval mode without parameter gradients."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)


def default_device() -> str:
    """Return the best available device: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_on(
    state: PartialState, model: str, *, revision: str | None = None, device: str | None = None, dtype: str = "float32"
) -> Pipeline:
    """Load a pipeline on the device of this process.

    Args:
        state: The processes of this launch.
        model, revision: See :func:`guidance.models.pipelines.load_pipeline`.
        device: None takes the device of the process, or the best available.
        dtype: Name of a torch type.
    """
    device = device or (state.device if state.num_processes > 1 else None)
    return load_pipeline(model, revision=revision, device=device, dtype=dtype)
