"""Load pipelines by name: the embedded testbed, or any diffusers pipeline from a hub id or a folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guidance.errors import UserError, nearest

TESTBED = "testbed"
TESTBED_FOLDER = Path(__file__).parent / "testbed" / "weights"


def load_pipeline(
    name: str | os.PathLike[str] = TESTBED,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    local_files_only: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Load a pipeline, frozen and in eval mode, ready for guidance.

    Args:
        name: "testbed" (embedded), a folder in diffusers format, or a hub id such as
            "stabilityai/stable-diffusion-2-1-base".
        device: None picks CUDA, then MPS, then the CPU.
        dtype: None keeps float32; ``torch.float16`` or ``bfloat16`` for half precision.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never reach for the hub.
        **kwargs: Passed on to ``DiffusionPipeline.from_pretrained``.

    Returns:
        The pipeline class named in the model's ``model_index.json``, without safety checker.  Weights are read from
        safetensors only, and no code of a downloaded folder is run.

    Raises:
        UserError: If there is no such model, or it has no safetensors.
    """
    from diffusers import DiffusionPipeline

    folder = TESTBED_FOLDER if name == TESTBED else Path(name)
    source = str(folder) if name == TESTBED or folder.is_dir() else str(name)
    if folder.is_dir() and not (folder / "model_index.json").exists():
        raise UserError(
            f"Expected a diffusers pipeline in '{name}', found no model_index.json there; choose the folder that "
            f"holds unet/, vae/ and scheduler/, or write 'testbed' for the embedded model."
        )
    if name == TESTBED and not folder.is_dir():
        raise UserError(
            "Expected the embedded testbed weights in guidance/testbed/weights; reinstall the package."
        )
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    if revision is not None:
        options["revision"] = revision
    if local_files_only is not None:
        options["local_files_only"] = local_files_only
    try:
        pipe = DiffusionPipeline.from_pretrained(
            source,
            dtype=dtype or torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
            **kwargs,
        )
    except (OSError, ValueError) as error:
        hint = nearest(str(name), [TESTBED])
        raise UserError(
            f"Expected 'testbed', a folder or a reachable hub id, but '{name}' could not be loaded: "
            f"{str(error).strip().splitlines()[0][:200]}{hint}"
        ) from error
    freeze(pipe)
    pipe.to(default_device() if device is None else device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def freeze(pipe: Any) -> None:
    """Put every network of a pipeline in eval mode without parameter gradients."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)


def default_device() -> str:
    """The best device at hand: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def latent_channels(unet: Any) -> int:
    """Channels of a denoiser's latents: inpainting models take more in, learned variances come out besides."""
    return int(min(unet.config.in_channels, unet.config.out_channels))


def fingerprint(model: nn.Module) -> str:
    """Identify weights: 12 hex digits of a hash over names, shapes and a few numbers of every parameter.

    Reads 8 values per tensor in float16 (so half and full precision copies agree), in milliseconds.
    """
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        flat = p.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 8)][:8]
        digest.update(f"{name}{tuple(p.shape)}".encode())
        digest.update(picked.to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()[:12]
