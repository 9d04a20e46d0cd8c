"""Train a head on features, resumably and on any number of processes.

The order of the rows is a function of (seed, epoch) and a checkpoint holds all other state, so a killed and resumed run
ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from guidance.data.cache import FeatureSource
from guidance.data.features import clip_name
from guidance.heads.config import HeadConfig
from guidance.heads.networks import Head, build_head
from guidance.heads.tasks import get_task
from guidance.training.loop import Loop, Progress, learning_rate, permutation
from guidance.training.recipes import HeadRecipe
from guidance.utils.errors import UserError

CHECKPOINT = "checkpoint.safetensors"
EPOCH_LOSS = "epoch loss"  # beside the best weights in what a checkpoint keeps
_LOG_EVERY = 20

Log = Callable[[dict[str, float], int], None]


@dataclasses.dataclass
class FitState(Progress):
    """Progress of a training, kept in its checkpoint.

    Attributes:
        best_loss, best_epoch: The best validation loss so far, and the number of epochs that led to it.
        history: Per epoch its number, training loss and validation loss.
        stopped: Whether early stopping has ended the training.
    """

    best_loss: float = math.inf
    best_epoch: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    stopped: bool = False


class HeadTrainer(Loop):
    """Train a head with accelerate: any number of processes, mixed precision, resumable.

    Args:
        head: Built and initialised; changed in place.
        sources, targets: "train" and "validation" features, and their encoded targets.
        recipe: How to train.
        accelerator: An ``accelerate.Accelerator``.
        work: Folder of the checkpoint.
        **options: ``identity`` and ``checkpoint_every`` of :class:`~guidance.training.loop.Loop`.
    """

    def __init__(
        self,
        head: Head,
        sources: Mapping[str, FeatureSource],
        targets: Mapping[str, Tensor],
        recipe: HeadRecipe,
        accelerator: Any,
        work: Path,
        **options: Any,
    ) -> None:
        self.head, self.sources, self.targets, self.recipe = head, sources, targets, recipe
        self.accelerator, world = accelerator, accelerator.num_processes
        self.rows = len(sources["train"])
        self.batch_size = min(recipe.batch_size, self.rows // world * world)
        if self.batch_size % world or not self.batch_size:
            raise UserError(
                f"Expected a batch_size (now {recipe.batch_size}) and training rows (now {self.rows}) that "
                f"{world} processes can share equally; change batch_size."
            )
        self.steps_per_epoch = self.rows // self.batch_size
        self.task = get_task(head.config.task)
        self.scale = self.task.scale(targets["train"])
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        optimizer = kinds[recipe.optimizer](head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.model, self.optimizer = accelerator.prepare(head, optimizer)
        slots = {name: (self.optimizer, parameter) for name, parameter in head.named_parameters()}
        options |= {"main": accelerator.is_main_process, "scaler": accelerator.scaler}
        kept = {EPOCH_LOSS: torch.zeros((), device=accelerator.device)}
        total = self.steps_per_epoch * recipe.epochs
        super().__init__("head", head, slots, work / CHECKPOINT, FitState(), total, kept, **options)

    def fit(self, log: Log = lambda values, step: None) -> FitState:
        """Train to the end; leaves the chosen weights in the head, in eval mode."""
        self.log = log
        self.run()
        best = {name: value for name, value in self.kept.items() if name != EPOCH_LOSS}
        if best:
            self.head.load_state_dict(best)
        self.head.eval()
        return self.state

    def unfinished(self) -> bool:
        return self.state.step < self.total and not self.state.stopped

    def take_step(self, step: int) -> Tensor:
        """Take one optimiser step; every process has an equal, interleaved part of the batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        rows = permutation(self.rows, self.recipe.seed, epoch)[position * self.batch_size :][: self.batch_size]
        rows = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        device = self.accelerator.device
        h, t = (x.to(device) for x in self.sources["train"].read(rows, epoch))
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

    def after_step(self, loss: Tensor, bar: tqdm) -> bool:
        """Note the loss; at the end of an epoch measure the head on the validation rows and keep the best."""
        state = self.state
        self.kept[EPOCH_LOSS] += loss  # sum over the steps of this epoch
        if state.step % _LOG_EVERY == 0:
            average = self._average(loss)
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            self.log({"train/loss": average, "train/lr": self.optimizer.param_groups[0]["lr"]}, state.step)
        if state.step % self.steps_per_epoch:
            return False
        train_loss = self._average(self.kept[EPOCH_LOSS] / self.steps_per_epoch)
        self.kept[EPOCH_LOSS].zero_()
        outputs, _ = predict(self.head, self.sources["validation"], self.accelerator, self.batch_size)
        validation_loss = float(self.task.loss(outputs, self.targets["validation"], self.recipe, self.scale))
        epoch = state.step // self.steps_per_epoch
        state.history.append({"epoch": epoch, "train_loss": train_loss, "validation_loss": validation_loss})
        self.log({"validation/loss": validation_loss}, state.step)
        if self.recipe.patience is not None:
            if validation_loss < state.best_loss:
                state.best_loss, state.best_epoch = validation_loss, epoch
                self.kept |= {k: v.detach().clone() for k, v in self.head.state_dict().items()}
            state.stopped = epoch - state.best_epoch >= self.recipe.patience
        return True

    def _average(self, loss_here: Tensor) -> float:
        loss = float(self.accelerator.reduce(loss_here, "mean"))
        if not math.isfinite(loss):
            raise UserError(f"Expected a finite loss, got {loss} at step {self.state.step}; lower the lr.")
        return loss


@torch.no_grad()
def predict(
    head: Head, source: FeatureSource, accelerator: Any, batch_size: int = 256, *, progress: str | None = None
) -> tuple[Float[Tensor, "n outputs"], Float[Tensor, " n"]]:
    """Run a head, which is on the accelerator's device, over all rows, shared among the processes.

    Returns outputs and timesteps in the order of the rows, float32, on the CPU of every process.  ``progress`` is the
    label of a progress bar.
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

    ``settings`` are those of the features, see :func:`guidance.data.features.describe_features`.
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
