"""Train a head on features, resumably and on any number of processes.

The order of the rows is a function of (seed, epoch) and a checkpoint holds all other state, so a killed and resumed run
ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from guidance.data.cache import FeatureSource
from guidance.data.features import clip_name
from guidance.heads.config import HeadConfig
from guidance.heads.networks import Head, build_head
from guidance.heads.tasks import get_task
from guidance.training.loop import learning_rate
from guidance.training.recipes import HeadRecipe
from guidance.utils.errors import UserError
from guidance.utils.io import atomic_path

CHECKPOINT = "checkpoint.safetensors"

_LOG_EVERY = 20

Log = Callable[[dict[str, float], int], None]


@dataclasses.dataclass
class FitState:
    """Progress of a training, kept in its checkpoint.

    Attributes:
        step: Optimiser steps done.
        seconds: Training time.
        best_loss, best_epoch: The best validation loss so far, and the number of epochs that led to it.
        history: Per epoch its number, training loss and validation loss.
        stopped: Whether early stopping has ended the training.
    """

    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_epoch: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    stopped: bool = False


class HeadTrainer:
    """Train a head with accelerate: any number of processes, mixed precision, resumable.

    Args:
        head: Built and initialised; changed in place.
        train, validation: Features.
        targets: "train" and "validation" targets, see :meth:`guidance.heads.tasks.Task.encode`.
        recipe: How to train.
        accelerator: An ``accelerate.Accelerator``.
        work: Folder of the checkpoint.
        identity: Identifies the training: a checkpoint of another one is refused.
        checkpoint_every: Seconds between checkpoints; one is also written after every epoch.
    """

    def __init__(
        self,
        head: Head,
        train: FeatureSource,
        validation: FeatureSource,
        targets: dict[str, Tensor],
        recipe: HeadRecipe,
        accelerator: Any,
        work: Path,
        *,
        identity: str = "",
        checkpoint_every: float = 60.0,
    ) -> None:
        self.head, self.train, self.validation, self.targets = head, train, validation, targets
        self.recipe, self.accelerator, self.path = recipe, accelerator, work / CHECKPOINT
        self.identity, self.checkpoint_every = identity, checkpoint_every
        self.state = FitState()
        self.best: dict[str, Tensor] = {}
        self.epoch_loss = torch.zeros((), device=accelerator.device)  # sum over the steps of this epoch
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        world = accelerator.num_processes
        self.batch_size = min(recipe.batch_size, len(train) // world * world)
        if self.batch_size % world or not self.batch_size:
            raise UserError(
                f"Expected a batch_size (now {recipe.batch_size}) and training rows (now {len(train)}) that "
                f"{world} processes can share equally; change batch_size."
            )
        self.steps_per_epoch = len(train) // self.batch_size
        self.total = self.steps_per_epoch * recipe.epochs
        self.task = get_task(head.config.task)
        self.scale = self.task.scale(targets["train"])
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        optimizer = kinds[recipe.optimizer](head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.model, self.optimizer = accelerator.prepare(head, optimizer)

    def fit(self, log: Log = lambda values, step: None, *, progress: bool = True) -> FitState:
        """Train to the end; leaves the chosen weights in the head, in eval mode."""
        self._resume()
        state, started = self.state, time.monotonic()
        saved, before = started, state.seconds
        bar = tqdm(total=self.total, initial=state.step, desc="train head", unit="step", disable=not progress)
        while state.step < self.total and not state.stopped:
            loss_here = self._step(state.step)
            self.epoch_loss += loss_here
            state.step += 1
            bar.update()
            if state.step % _LOG_EVERY == 0:
                loss = self._average(loss_here)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                log({"train/loss": loss, "train/lr": self.optimizer.param_groups[0]["lr"]}, state.step)
            state.seconds = before + time.monotonic() - started
            if state.step % self.steps_per_epoch == 0:
                self._end_epoch(log)
            elif time.monotonic() - saved > self.checkpoint_every:
                self._save()
                saved = time.monotonic()
        bar.total = state.step  # early stopping leaves no half bar
        bar.close()
        if self.best:
            self.head.load_state_dict(self.best)
        self.head.eval()
        return state

    def _step(self, step: int) -> Tensor:
        """Take one optimiser step; every process has an equal, interleaved part of the batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.train))
        rows = self._order[1][position * self.batch_size : (position + 1) * self.batch_size]
        rows = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        device = self.accelerator.device
        h, t = (x.to(device) for x in self.train.read(rows, epoch))
        lr, beta1 = learning_rate(self.recipe.schedule, step, self.total, self.recipe.lr)
        for group in self.optimizer.param_groups:
            group["lr"], group["betas"] = lr, (beta1, group["betas"][1])
        self.model.train()
        with self.accelerator.autocast():
            outputs = self.model(h, t)
        target = self.targets["train"][rows].to(device)
        loss = self.task.loss(outputs.float(), target, self.recipe, self.scale)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        return loss.detach()

    def _average(self, loss_here: Tensor) -> float:
        loss = float(self.accelerator.reduce(loss_here, "mean"))
        if not math.isfinite(loss):
            raise UserError(f"Expected a finite loss, got {loss} at step {self.state.step}; lower the lr.")
        return loss

    def _end_epoch(self, log: Log) -> None:
        state = self.state
        train_loss = self._average(self.epoch_loss / self.steps_per_epoch)
        self.epoch_loss.zero_()
        outputs, _ = predict(self.head, self.validation, self.accelerator, self.batch_size)
        loss = float(self.task.loss(outputs, self.targets["validation"], self.recipe, self.scale))
        epoch = state.step // self.steps_per_epoch
        state.history.append({"epoch": epoch, "train_loss": train_loss, "validation_loss": loss})
        log({"validation/loss": loss}, state.step)
        if self.recipe.patience is not None:
            if loss < state.best_loss:
                state.best_loss, state.best_epoch = loss, epoch
                self.best = {k: v.detach().clone() for k, v in self.head.state_dict().items()}
            state.stopped = epoch - state.best_epoch >= self.recipe.patience
        self._save()

    def _save(self) -> None:
        """Write the state of the training atomically, from the main process."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model.{k}": v for k, v in self.head.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()} | {"epoch_loss": self.epoch_loss}
        for name, parameter in self.head.named_parameters():
            moments = self.optimizer.state[parameter]
            tensors |= {f"{k}.{name}": moments[k] for k in ("exp_avg", "exp_avg_sq")}
        meta = {"state": json.dumps(dataclasses.asdict(self.state)), "identity": self.identity}
        if self.accelerator.scaler is not None:
            meta["scaler"] = json.dumps(self.accelerator.scaler.state_dict())
        with atomic_path(self.path) as temporary:
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, temporary, meta)

    def _resume(self) -> None:
        """Restore the checkpoint, if there is one of this training."""
        if not self.path.exists():
            return
        with safe_open(self.path, "pt") as file:
            meta = file.metadata()
        if meta["identity"] != self.identity:
            raise UserError(
                f"Expected a checkpoint of this training in '{self.path}', found one of another config; "
                "delete it, or choose another output."
            )
        tensors = load_file(self.path, device=str(self.accelerator.device))
        self.state = FitState(**json.loads(meta["state"]))
        self.head.load_state_dict(_part(tensors, "model."))
        self.best = _part(tensors, "best.")
        self.epoch_loss = tensors["epoch_loss"]
        for name, parameter in self.head.named_parameters():
            moments = {k: tensors[f"{k}.{name}"] for k in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(self.state.step)), **moments}
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(json.loads(meta["scaler"]))


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def predict(
    head: Head, source: FeatureSource, accelerator: Any, batch_size: int = 256, *, progress: str | None = None
) -> tuple[Float[Tensor, "n outputs"], Float[Tensor, " n"]]:
    """Run a head over all rows, shared among the processes.

    Args:
        head: The head, on the accelerator's device.
        source: Features.
        accelerator: Its processes share the rows.
        batch_size: Rows per forward.
        progress: Label of a progress bar; None shows none.

    Returns:
        Outputs and timesteps in the order of the rows, float32, on the CPU of every process.
    """
    world, device = accelerator.num_processes, accelerator.device
    padded = np.arange(math.ceil(len(source) / world) * world) % len(source)
    mine = padded[accelerator.process_index :: world]
    head.eval()
    outputs, timesteps = [], []
    with tqdm(total=len(mine), desc=progress, unit="row", disable=progress is None) as bar:
        for i in range(0, len(mine), batch_size):
            h, t = (x.to(device) for x in source.read(mine[i : i + batch_size]))
            outputs.append(head(h, t))
            timesteps.append(t)
            bar.update(len(h))
    gathered = [accelerator.gather(torch.cat(x)).cpu() for x in (outputs, timesteps)]
    order = torch.arange(len(padded)).reshape(-1, world).T.reshape(-1).argsort()  # undo the interleaving
    return gathered[0][order][: len(source)], gathered[1][order][: len(source)]


_STATISTICS_ROWS = 4096  # enough for a mean and a deviation per channel

_RECORDED = ("tap", "base_model", "base_fingerprint", "prediction_type", "num_train_timesteps", "timesteps")


def prepare_head(
    sources: Mapping[str, FeatureSource], recipe: HeadRecipe, settings: Mapping[str, Any]
) -> tuple[Head, dict[str, Tensor]]:
    """Build and initialise the head of a recipe, and encode the targets of every split.

    Args:
        sources: "train" and other splits.
        recipe: Target, task and network of the head.
        settings: Settings of the features, see :func:`guidance.data.features.describe_features`.

    Returns:
        The untrained head and its targets by split.
    """
    task = get_task(recipe.task)
    columns = {split: source.column(recipe.target) for split, source in sources.items()}
    labels = task.labels(columns["train"], recipe.target)
    targets = {split: task.encode(values, labels, recipe.target) for split, values in columns.items()}
    clip = clip_name(recipe.target) if task.clip_target else None
    config = HeadConfig(
        kind=recipe.kind,
        in_channels=sources["train"].read([0])[0].shape[1],
        outputs=task.num_outputs(labels, targets["train"]),
        time_conditioned=recipe.time_conditioned,
        hidden=recipe.hidden,
        target=recipe.target,
        task=recipe.task,
        labels=labels,
        noise=settings["noise"],
        caption=settings["caption"],
        tap_channels=settings.get("tap_channels", []),
        clip=clip or "",
        clip_fingerprint=settings["clip"][clip] if clip else "",
        **{name: settings[name] for name in _RECORDED},
    )
    torch.manual_seed(recipe.seed)
    head = build_head(config)
    if recipe.init == "kaiming":
        kaiming_init(head)
    set_statistics(head, sources["train"], targets["train"], recipe)
    return head, targets


def kaiming_init(head: Head) -> None:
    """Draw all weights but the zero-initialised ones by He et al. 2015; zero biases."""
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not name.startswith("film"):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)


def set_statistics(head: Head, train: FeatureSource, target: Tensor, recipe: HeadRecipe) -> None:
    """Set the feature (and, for regression, output) mean and deviation from evenly spaced training rows."""
    if recipe.standardize:
        rows = np.linspace(0, len(train) - 1, min(len(train), _STATISTICS_ROWS)).astype(np.int64)
        parts = [train.read(rows[i : i + 256])[0].float().cpu() for i in range(0, len(rows), 256)]
        mean = torch.stack([p.mean((0, 2, 3)) * len(p) for p in parts]).sum(0) / len(rows)
        square = torch.stack([(p - mean[:, None, None]).square().mean((0, 2, 3)) * len(p) for p in parts])
        head.feature_mean.copy_(mean)
        head.feature_std.copy_((square.sum(0) / len(rows)).sqrt().clamp(min=1e-4))
    if get_task(head.config.task).standardized:
        head.output_mean.copy_(target.mean(0))
        head.output_std.copy_(target.std(0).clamp(min=1e-6))
