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
from safetensors.torch import load_file, save_file
from torch import nn

from guidance.heads.hub import fetch, is_hub_id, push_folder
from guidance.schedule import NoiseSchedule
from guidance.utils.errors import UserError, first_line, nearest
from guidance.utils.io import atomic_dir, read_json, write_json

CONFIG_FILE = "config.json"

M = TypeVar("M", bound="SavedModel")


class SavedModel(ModelHubMixin, nn.Module):
    """A network with a config that is saved as a folder and published on the hub; no pickle is ever read or written.

    Attributes:
        noun: What a model of this class is called.
        weights_file: Name of the file of its weights.
        config_class: Dataclass of its config, with ``base_model``, ``base_fingerprint``, ``prediction_type`` and
            ``num_train_timesteps`` of the diffusion model it was trained on.
        required_keys: Keys that every config has.
        training_command: The command that trains one.
    """

    noun: ClassVar[str]
    weights_file: ClassVar[str]
    config_class: ClassVar[type[Any]]
    required_keys: ClassVar[frozenset[str]]
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
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, save_directory / self.weights_file, {"format": "pt"})
        write_json(save_directory / CONFIG_FILE, self.config)

    def save_pretrained(  # type: ignore[override]
        self, folder: str | os.PathLike[str], *, card: str | None = None, **texts: str
    ) -> None:
        """Save weights, config and model card as one folder; it appears as a whole or not at all.

        Args:
            folder: A new or empty folder, or one with a model of this kind to replace.
            card: Text of ``README.md``; None takes :meth:`card`.
            **texts: Further files: ``train=...`` becomes ``train.yaml``.

        Raises:
            UserError: If ``folder`` holds something else.
        """
        self.check_replaceable(folder)
        with atomic_dir(folder) as temporary:
            self._save_pretrained(temporary)
            (temporary / "README.md").write_text(card or self.card(os.fspath(folder)), encoding="utf-8")
            for name, text in texts.items():
                (temporary / f"{name}.yaml").write_text(text, encoding="utf-8")

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish weights, config and model card as ``user/name``; see :func:`guidance.heads.hub.push_folder`.

        That function publishes the folder of a training whole, with its measurements.
        """
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

        Raises:
            UserError: If there is none (the message lists those beside it), or its files do not fit together.
        """
        folder, advice = Path(path), ""
        if is_hub_id(path):
            files = (cls.weights_file, CONFIG_FILE)
            folder = fetch(os.fspath(path), files, revision=revision, local_files_only=local_files_only)
            advice = " The repository has no such files: choose another, or another revision."
        elif revision is not None:
            raise UserError(
                f"Expected a hub id with revision='{revision}', got the folder '{path}'; leave revision out."
            )
        if not all((folder / name).is_file() for name in (cls.weights_file, CONFIG_FILE)):
            raise UserError(
                f"Expected {cls._article()} {cls.noun}, {cls.weights_file} and {CONFIG_FILE}, in '{path}'."
                f"{advice or cls._siblings(folder)}"
            )
        return cls._from_pretrained(model_id=os.fspath(folder)).to(device)

    @classmethod
    def _from_pretrained(cls: type[M], *, model_id: str) -> M:  # type: ignore[override]
        """Read config and weights of a folder."""
        description, weights = Path(model_id) / CONFIG_FILE, Path(model_id) / cls.weights_file
        values = read_json(description)
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        if not isinstance(values, dict) or not cls.required_keys <= values.keys() <= known:
            raise UserError(
                f"Expected the config of {cls._article()} {cls.noun} in '{description}', but its keys differ; update "
                f"this package, or train the {cls.noun} anew."
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
                f"Expected '{folder}' to be new, empty or {cls._article()} {cls.noun}, but it has other files; choose "
                "another."
            )

    def check_base(self, schedule: NoiseSchedule, fingerprint: str | None, *, gives: str) -> None:
        """Check a denoiser's parameterisation against the config; warn of other weights.

        Args:
            schedule: The denoiser's noise schedule.
            fingerprint: :func:`guidance.models.denoiser.fingerprint` of the denoiser; None for no warning.
            gives: What the model predicts, for the warning.

        Raises:
            UserError: If prediction type or number of timesteps differ.
        """
        config = self.config
        for key in ("prediction_type", "num_train_timesteps"):
            wanted, got = getattr(config, key), getattr(schedule, key)
            if wanted != got:
                raise UserError(f"Expected a model with {key} {wanted}, got {got}{self.advise_training()}")
        if fingerprint and config.base_fingerprint and fingerprint != config.base_fingerprint:
            warnings.warn(
                f"The {self.noun} was trained on other weights ({config.base_model}, {config.base_fingerprint}) than "
                f"this model's ({fingerprint}); its {gives} may be off.",
                stacklevel=3,  # the caller of check_fits
            )

    def advise_training(self) -> str:
        """Return the end of a message about a denoiser that the model does not fit."""
        base = self.config.base_model or "another model"
        return f"; the {self.noun} was trained on {base}: train one for this one."

    @classmethod
    def _article(cls) -> str:
        return "an" if cls.noun[0] in "aeiou" else "a"

    @classmethod
    def _siblings(cls, folder: Path) -> str:
        """Name the models in the same folder, for the message about a missing one."""
        names = sorted(p.parent.name for p in folder.parent.glob(f"*/{cls.weights_file}"))
        advice = f" There is none beside it either: train one with '{cls.training_command}'."
        return nearest(folder.name, names) if names else advice
