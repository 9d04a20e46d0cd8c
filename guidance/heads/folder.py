"""The folder of a small trained model, a head or an adapter: safetensors, a config, and what it says of its base model.

Each kind is one :class:`ModelFolder`; :mod:`guidance.heads` and :mod:`guidance.heads.adapter` are its callers.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from guidance.heads.hub import fetch, is_hub_id, push_folder
from guidance.schedule import NoiseSchedule
from guidance.utils.errors import UserError, nearest
from guidance.utils.io import atomic_dir, read_json, write_json

CONFIG_FILE = "config.json"

M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class ModelFolder(Generic[M]):
    """How one kind of model lies in a folder.

    Attributes:
        kind: What it is called, after "a " or "an ".
        weights: Name of the file of its weights.
        config: Dataclass of its config, with ``base_model``, ``base_fingerprint``, ``prediction_type`` and
            ``num_train_timesteps`` of the diffusion model it was trained on.
        required: Keys that every config has.
        format_version: Version of the format.
        command: The command that trains one.
        build: Makes an untrained model from its config; the model keeps it as ``config``.
        card: Model card of a model, given the name that loads it.
    """

    kind: str
    weights: str
    config: type[Any]
    required: frozenset[str]
    format_version: int
    command: str
    build: Callable[[Any], M]
    card: Callable[[M, str], str]

    @property
    def _one(self) -> str:
        """The kind with its article."""
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"

    def write(self, model: M, folder: Path) -> None:
        """Write weights and config into an existing folder."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, folder / self.weights, {"format": "pt"})
        write_json(folder / CONFIG_FILE, model.config)

    def save(self, model: M, folder: str | os.PathLike[str], card: str | None = None, **texts: str) -> None:
        """Save weights, config and model card as one folder; it appears as a whole or not at all.

        Args:
            model: What to save.
            folder: A new or empty folder, or one with a model of this kind to replace.
            card: Text of ``README.md``; None takes :attr:`card`.
            **texts: Further files: ``train=...`` becomes ``train.yaml``.

        Raises:
            UserError: If ``folder`` holds something else.
        """
        self.check_replaceable(folder)
        files = {"README.md": card or self.card(model, os.fspath(folder))}
        files |= {f"{name}.yaml": text for name, text in texts.items()}
        with atomic_dir(folder) as temporary:
            self.write(model, temporary)
            for name, text in files.items():
                (temporary / name).write_text(text, encoding="utf-8")

    def check_replaceable(self, folder: str | os.PathLike[str]) -> None:
        """Refuse to replace a folder that is not empty and holds no model of this kind."""
        path = Path(folder)
        if path.is_dir() and any(path.iterdir()) and not (path / self.weights).exists():
            raise UserError(
                f"Expected '{folder}' to be new, empty or {self._one}, but it has other files; choose another."
            )

    def is_kept(self, folder: str | os.PathLike[str], overwrite: bool) -> bool:
        """Tell whether a training's output folder holds a model already that is not to be replaced."""
        self.check_replaceable(folder)
        return not overwrite and (Path(folder) / CONFIG_FILE).is_file()

    def check_same(self, folder: str | os.PathLike[str], differs: Sequence[str]) -> None:
        """Refuse to take the model in a training's output folder for this training's if the config differs."""
        if differs:
            raise UserError(
                f"Expected '{folder}' to be new or trained with this config, but it holds {self._one} of another "
                f"({differs[0]}); choose another output, or set overwrite=true."
            )

    def load(
        self,
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
            local_files_only: Never reach for the hub; take what its cache has.

        Raises:
            UserError: If there is none (the message lists those beside it), or its files do not fit together.
        """
        folder, advice = Path(path), ""
        if is_hub_id(path):
            options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
            folder = fetch(os.fspath(path), (self.weights, CONFIG_FILE), **options)
            advice = " The repository has no such files: choose another, or another revision."
        elif revision is not None:
            raise UserError(
                f"Expected a hub id with revision='{revision}', got the folder '{path}'; leave revision out."
            )
        weights, description = folder / self.weights, folder / CONFIG_FILE
        if not weights.is_file() or not description.is_file():
            raise UserError(
                f"Expected {self._one}, {self.weights} and {CONFIG_FILE}, in '{path}'.{advice or self._beside(folder)}"
            )
        values = read_json(description)
        known = {field.name for field in dataclasses.fields(self.config)}
        if not isinstance(values, dict) or not self.required <= values.keys() <= known:
            raise UserError(
                f"Expected the config of {self._one} of format {self.format_version} in '{description}', but its "
                f"keys differ; update this package, or train the {self.kind} anew."
            )
        model = self.build(self.config(**values))
        try:
            model.load_state_dict(load_file(weights))
        except (RuntimeError, SafetensorError) as error:
            raise UserError(
                f"Expected weights of the {self.kind} that '{description}' describes, but {self.weights} does "
                f"not fit or is cut short ({str(error).splitlines()[0]}); train or copy the {self.kind} again."
            ) from error
        return model.to(device).eval().requires_grad_(False)

    def _beside(self, folder: Path) -> str:
        """Name the models in the same folder, for the message about a missing one."""
        siblings = sorted(p.parent.name for p in folder.parent.glob(f"*/{self.weights}"))
        advice = f" There is none beside it either: train one with '{self.command}'."
        return nearest(folder.name, siblings) if siblings else advice

    def trained_on(self, config: Any) -> str:
        """The end of a message about a denoiser that a model of this config does not fit."""
        base = config.base_model or "another model"
        return f"; the {self.kind} was trained on {base}: train one for this one"

    def check_base(
        self, config: Any, schedule: NoiseSchedule, fingerprint: str | None, *, name: str, gives: str
    ) -> None:
        """Check the parameterisation of a denoiser against a model's config; warn of other weights.

        Args:
            config: The model's.
            schedule: The denoiser's noise schedule.
            fingerprint: :func:`guidance.models.denoiser.fingerprint` of the denoiser; None for no warning.
            name: What the warning calls the model.
            gives: What the model gives, which may be off with other weights.

        Raises:
            UserError: If prediction type or number of timesteps differ.
        """
        for key in ("prediction_type", "num_train_timesteps"):
            wanted, got = getattr(config, key), getattr(schedule, key)
            if wanted != got:
                raise UserError(f"Expected a model with {key} {wanted}, got {got}{self.trained_on(config)}.")
        if fingerprint and config.base_fingerprint and fingerprint != config.base_fingerprint:
            warnings.warn(
                f"{name} was trained on other weights ({config.base_model}, {config.base_fingerprint}) than this "
                f"model's ({fingerprint}); its {gives} may be off.",
                stacklevel=3,  # the caller of check_fits
            )


class Published:
    """What a model of a :class:`ModelFolder` has beside its network: it saves itself, and goes to the hub."""

    @property
    def kept_as(self) -> ModelFolder[Any]:
        """How models of this kind lie in a folder."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save weights, config and model card as a folder; see :meth:`ModelFolder.save`."""
        self.kept_as.save(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Publish weights, config and model card as ``user/name``; loading takes that name in place of a folder.

        A folder of ``train/head.py`` or ``train/amortise.py`` says more of the training than the model itself knows:
        :func:`guidance.heads.hub.push_folder`, which this calls and which explains the arguments, publishes it whole.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.rpartition("/")[2]
            self.kept_as.save(self, folder, self.kept_as.card(self, repo_id))
            return push_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                commit_message=commit_message,
                token=token,
            )
