"""Heads: small networks that read a property of the picture off the features of a tap.

A head is saved as ``head.safetensors`` and ``config.json``; the config says which model, tap, noise levels
and target it was trained on, so that :func:`check_fits` can refuse a model it does not fit.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from guidance.errors import UserError, nearest
from guidance.head_config import FORMAT_VERSION, HeadConfig
from guidance.head_networks import HEADS, AttentionHead, ConvHead, Head, LinearHead, build_head
from guidance.io import atomic_dir, read_json, write_json
from guidance.schedule import NoiseSchedule
from guidance.taps import resolve_tap

__all__ = [
    "HEADS",
    "AttentionHead",
    "ConvHead",
    "Head",
    "HeadConfig",
    "LinearHead",
    "build_head",
    "check_fits",
    "check_replaceable",
    "load_head",
    "save_head",
    "write_head",
]

WEIGHTS_FILE, CONFIG_FILE = "head.safetensors", "config.json"


def save_head(head: Head, folder: str | os.PathLike[str]) -> None:
    """Save weights and config as a folder that :func:`load_head` reads; it appears as a whole or not at all.

    Raises:
        UserError: If ``folder`` holds something that is not a head.
    """
    check_replaceable(folder)
    with atomic_dir(folder) as temporary:
        write_head(head, temporary)


def write_head(head: Head, folder: Path) -> None:
    """Write the two files of a head into an existing folder."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    write_json(folder / CONFIG_FILE, head.config)


def check_replaceable(folder: str | os.PathLike[str]) -> None:
    """Refuse to replace a folder that is not empty and holds no head."""
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()) and not (path / WEIGHTS_FILE).exists():
        raise UserError(
            f"Expected '{folder}' to be new, empty or a head, but it has other files; choose another."
        )


def load_head(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Head:
    """Load a head, frozen and in eval mode.

    Args:
        path: Folder that holds ``head.safetensors`` and ``config.json``.
        device: Where to put it.

    Raises:
        UserError: If there is no head (the message lists those beside it), or its files do not fit together.
    """
    folder = Path(path)
    if not (folder / WEIGHTS_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        raise UserError(f"Expected a head, {WEIGHTS_FILE} and {CONFIG_FILE}, in '{path}'.{_beside(folder)}")
    values = read_json(folder / CONFIG_FILE)
    known = {field.name for field in dataclasses.fields(HeadConfig)}
    if not isinstance(values, dict) or not {"kind", "in_channels"} <= values.keys() <= known:
        raise UserError(
            f"Expected the config of a head of format {FORMAT_VERSION} in '{folder / CONFIG_FILE}', but its "
            "keys differ; update this package, or train the head anew."
        )
    head = build_head(HeadConfig(**values))
    try:
        head.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(
            f"Expected weights of the head that '{folder / CONFIG_FILE}' describes, but {WEIGHTS_FILE} does "
            f"not fit or is cut short ({str(error).splitlines()[0]}); train or copy the head again."
        ) from error
    return head.to(device).eval().requires_grad_(False)


def _beside(folder: Path) -> str:
    """Name the heads in the same folder, for the message about a missing one."""
    siblings = sorted(p.parent.name for p in folder.parent.glob(f"*/{WEIGHTS_FILE}"))
    advice = " There is none beside it either: train one with 'accelerate launch train/head.py'."
    return nearest(folder.name, siblings) if siblings else advice


def check_fits(head: Head, unet: nn.Module, schedule: NoiseSchedule, fingerprint: str | None = None) -> None:
    """Check that a head can read this model.

    Args:
        head: The head.
        unet: The denoiser it is to guide.
        schedule: The denoiser's noise schedule.
        fingerprint: :func:`guidance.pipelines.fingerprint` of the denoiser; another than the head's only
            warns, since fine-tuned descendants of a model share its features to some extent.

    Raises:
        UserError: If tap, channels, prediction type or number of timesteps differ.
    """
    config = head.config
    trained_on = f"; the head was trained on {config.base_model or 'another model'}: train one for this one"
    channels = _tap_channels(resolve_tap(unet, config.tap))
    if channels not in (None, config.in_channels):
        raise UserError(
            f"Expected {config.in_channels} channels at '{config.tap}', but {type(unet).__name__} has "
            f"{channels} there{trained_on}."
        )
    for name in ("prediction_type", "num_train_timesteps"):
        wanted, got = getattr(config, name), getattr(schedule, name)
        if wanted != got:
            raise UserError(f"Expected a model with {name} {wanted}, got {got}{trained_on}.")
    if fingerprint and config.base_fingerprint and fingerprint != config.base_fingerprint:
        warnings.warn(
            f"The head for '{config.target}' was trained on other weights ({config.base_model}, "
            f"{config.base_fingerprint}) than this model's ({fingerprint}); its scores may be off.",
            stacklevel=2,
        )


def _tap_channels(module: nn.Module) -> int | None:
    """The channels a block puts out, or None where its attributes do not say."""
    last = module.resnets[-1] if isinstance(getattr(module, "resnets", None), nn.ModuleList) else module
    channels = getattr(last, "out_channels", None)
    return channels if isinstance(channels, int) else None
