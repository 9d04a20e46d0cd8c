"""Heads: small networks that read a property of the picture off the features of a tap.

A head is saved as ``head.safetensors`` and ``config.json``; the config says which model, tap, noise levels
and target it was trained on, so that :func:`check_fits` can refuse a model it does not fit.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from guidance.errors import UserError
from guidance.head_config import FORMAT_VERSION, HeadConfig
from guidance.head_networks import (
    HEADS,
    AttentionHead,
    ConvHead,
    Head,
    LinearHead,
    MultiScaleHead,
    build_head,
)
from guidance.model_card import head_card
from guidance.model_folder import ModelFolder
from guidance.schedule import NoiseSchedule
from guidance.tap_features import split_taps, tap_channels

__all__ = [
    "HEADS",
    "AttentionHead",
    "ConvHead",
    "Head",
    "HeadConfig",
    "LinearHead",
    "MultiScaleHead",
    "build_head",
    "check_fits",
    "check_replaceable",
    "load_head",
    "save_head",
    "write_head",
]

HEAD_FOLDER: ModelFolder[Head] = ModelFolder(
    kind="head",
    weights="head.safetensors",
    config=HeadConfig,
    required=frozenset({"kind", "in_channels"}),
    format_version=FORMAT_VERSION,
    command="accelerate launch train/head.py",
    build=build_head,
    card=head_card,
)


def save_head(head: Head, folder: str | os.PathLike[str]) -> None:
    """Save weights, config and model card as a folder that :func:`load_head` reads; as a whole or not at all.

    Raises:
        UserError: If ``folder`` holds something that is not a head.
    """
    HEAD_FOLDER.save(head, folder)


def write_head(head: Head, folder: Path) -> None:
    """Write the two files of a head into an existing folder."""
    HEAD_FOLDER.write(head, folder)


def check_replaceable(folder: str | os.PathLike[str]) -> None:
    """Refuse to replace a folder that is not empty and holds no head."""
    HEAD_FOLDER.check_replaceable(folder)


def load_head(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Head:
    """Load a head, frozen and in eval mode.

    Args:
        path: Folder that holds ``head.safetensors`` and ``config.json``, or a hub id ``user/name``.
        device: Where to put it.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never reach for the hub; take what its cache has.

    Raises:
        UserError: If there is no head (the message lists those beside it), or its files do not fit together.
    """
    return HEAD_FOLDER.load(path, device, revision=revision, local_files_only=local_files_only)


def check_fits(head: Head, unet: nn.Module, schedule: NoiseSchedule, fingerprint: str | None = None) -> None:
    """Check that a head can read this model.

    Args:
        head: The head.
        unet: The denoiser it is to guide.
        schedule: The denoiser's noise schedule.
        fingerprint: :func:`guidance.pipelines.fingerprint` of the denoiser; another than the head's only
            warns, since fine-tuned descendants of a model share its features to some extent.

    Raises:
        UserError: If a tap, its channels, prediction type or number of timesteps differ.
    """
    config = head.config
    found = tap_channels(unet, config.tap)
    for tap, wanted, channels in zip(split_taps(config.tap), config.channels, found, strict=True):
        if channels not in (None, wanted):
            raise UserError(
                f"Expected {wanted} channels at '{tap}', but {type(unet).__name__} has {channels} there"
                f"{HEAD_FOLDER.trained_on(config)}."
            )
    name = f"The head for '{config.target}'"
    HEAD_FOLDER.check_base(config, schedule, fingerprint, name=name, gives="scores")
