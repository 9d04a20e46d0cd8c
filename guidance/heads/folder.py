"""Save and load small trained models, heads and adapters: a folder with safetensors, a config and a model card."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import ModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn

from guidance.heads.hub import fetch, is_hub_id, push_folder
from guidance.schedule import NoiseSchedule
from guidance.utils.errors import UserError, first_line, nearest
from guidance.utils.io import atomic_dir, read_json, write_json

CONFIG_FILE = "config.json"

M = TypeVar("M", bound="SavedModel")


class SavedModel(ModelHubMixin, nn.Module):
    """A network with a config that is saved as a folder and published on the hub; no pickle is ever read or written."""

    noun: ClassVar[str]  # in messages
    weights_file: ClassVar[str]
    config_class: ClassVar[type[Any]]  # with base_model, base_fingerprint, prediction_type and num_train_timesteps
    required_keys: ClassVar[frozenset[str]]  # that every config has
    training_command: ClassVar[str]
    config: Any

    @classmethod
    def build(cls, config: Any) -> SavedModel:
        """Build an untrained model of a config."""
        return cls(config)

    def card(self, name: str) -> str:
        """Return a model card as Markdown, with code that loads the model by ``name``."""
        raise NotImplementedError

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights and config into an existing folder."""
        save_model(self, str(save_directory / self.weights_file), {"format": "pt"})
        write_json(save_directory / CONFIG_FILE, self.config)

    def save_pretrained(  # type: ignore[override]
        self, folder: str | os.PathLike[str], *, card: str | None = None, **texts: str
    ) -> None:
        """Save weights, config and model card as one folder; it appears as a whole or not at all.

        Args:
            folder: A new or empty folder, or one with a model of this kind to replace.
            card: Text of ``README.md``; None takes :meth:`card`.
            **texts: Further files: ``train=...`` becomes ``train.yaml``.
        """
        self.check_replaceable(folder)
        files = {"README.md": card or self.card(os.fspath(folder))} | {f"{k}.yaml": text for k, text in texts.items()}
        with atomic_dir(folder) as temporary:
            self._save_pretrained(temporary)
            for name, text in files.items():
                (temporary / name).write_text(text, encoding="utf-8")

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish weights, config and model card; :func:`guidance.heads.hub.push_folder` has the options."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[M],
        path: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> M:
        """Load a model, frozen and in eval mode.

        Args:
            path: Folder that holds weights and config, or a hub id ``user/name``.
            device: Where to put it.
            revision: Branch, tag or commit on the hub.
            local_files_only: Take what the hub's cache has, without any connection.
        """
        folder, files = Path(path), (cls.weights_file, CONFIG_FILE)
        if on_hub := is_hub_id(path):
            folder = fetch(os.fspath(path), files, revision=revision, local_files_only=local_files_only)
        elif revision is not None:
            raise UserError(
                f"Expected a hub id with revision='{revision}', got the folder '{path}'; leave revision out."
            )
        if not all((folder / name).is_file() for name in files):
            advice = " The repository has no such files: choose another, or another revision."
            advice = advice if on_hub else cls._siblings(folder)
            raise UserError(f"Expected {cls._named()}, {cls.weights_file} and {CONFIG_FILE}, in '{path}'.{advice}")
        return cls._from_pretrained(model_id=os.fspath(folder)).to(device)

    @classmethod
    def _from_pretrained(cls: type[M], *, model_id: str) -> M:  # type: ignore[override]
        """Read config and weights of a folder."""
        description, weights = Path(model_id) / CONFIG_FILE, Path(model_id) / cls.weights_file
        values, known = read_json(description), {field.name for field in dataclasses.fields(cls.config_class)}
        if not isinstance(values, dict) or not cls.required_keys <= values.keys() <= known:
            raise UserError(
                f"Expected the config of {cls._named()} in '{description}', but its keys differ; update this package, "
                f"or train the {cls.noun} anew."
            )
        model = cls.build(cls.config_class(**values))
        assert isinstance(model, cls)
        try:
            model.load_state_dict(load_file(weights))
        except (RuntimeError, SafetensorError) as error:
            raise UserError(
                f"Expected weights of the {cls.noun} that '{description}' describes, but {weights.name} does not fit "
                f"or is cut short ({first_line(error)}); train or copy the {cls.noun} again."
            ) from error
        return model.eval().requires_grad_(False)

    @classmethod
    def check_replaceable(cls, folder: str | os.PathLike[str]) -> None:
        """Refuse to replace a folder that is not empty and holds no model of this kind."""
        path = Path(folder)
        if path.is_dir() and any(path.iterdir()) and not (path / cls.weights_file).exists():
            raise UserError(
                f"Expected '{folder}' to be new, empty or {cls._named()}, but it has other files; choose another."
            )

    def check_base(self, schedule: NoiseSchedule, fingerprint: str | None, *, gives: str) -> None:
        """Refuse a denoiser of another prediction type or number of timesteps; warn of other weights.

        The denoiser has ``schedule`` and ``fingerprint`` (None for no warning); the model predicts what it ``gives``.
        """
        base = self.config.base_fingerprint
        for key in ("prediction_type", "num_train_timesteps"):
            if (wanted := getattr(self.config, key)) != (got := getattr(schedule, key)):
                raise UserError(f"Expected a model with {key} {wanted}, got {got}{self.advise_training()}")
        if fingerprint and base and fingerprint != base:
            warnings.warn(
                f"The {self.noun} was trained on other weights ({self.config.base_model}, {base}) than "
                f"this model's ({fingerprint}); its {gives} may be off.",
                stacklevel=3,  # the caller of check_fits
            )

    def advise_training(self) -> str:
        """Return the end of a message about a denoiser that the model does not fit."""
        return f"; the {self.noun} was trained on {self.config.base_model or 'another model'}: train one for this one."

    @classmethod
    def _named(cls) -> str:
        return f"{'an' if cls.noun[0] in 'aeiou' else 'a'} {cls.noun}"

    @classmethod
    def _siblings(cls, folder: Path) -> str:
        """Name the models in the same folder, for the message about a missing one."""
        names = sorted(p.parent.name for p in folder.parent.glob(f"*/{cls.weights_file}"))
        advice = f" There is none beside it either: train one with '{cls.training_command}'."
        return nearest(folder.name, names) if names else advice
