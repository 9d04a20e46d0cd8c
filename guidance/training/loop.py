"""One resumable training loop (:class:`Loop`), its optimisers and its learning rates."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm

from guidance.training.recipes import Stage
from guidance.utils.errors import UserError
from guidance.utils.io import atomic_path

Loss = Callable[[int, torch.Generator], Tensor]
Slots = Mapping[str, tuple[torch.optim.Optimizer, Tensor]]


@dataclasses.dataclass
class Progress:
    """Optimiser steps done and training time in seconds; subclasses add what else a checkpoint keeps."""

    step: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class Loop:
    """Train a network step by step; a killed training goes on from its checkpoint to the same weights.

    Subclasses define :meth:`unfinished`, :meth:`take_step` and :meth:`after_step`.

    Attributes:
        name: Name in the progress bar.
        network: Trained in place.
        slots: Its parameters by name, each with its optimiser and the tensor that this knows it by.
        path: File of the checkpoint.
        state: Plain values for the checkpoint.
        total: Largest number of steps.
        kept: Further tensors for the checkpoint.
        identity: Identifies the training: a checkpoint of another one is refused.
        checkpoint_every: Seconds between checkpoints; one is also written where :meth:`after_step` asks for it.
        main: Whether this process shows the bar and writes checkpoints.
        scaler: Scaler of the gradients in half precision, if there is one.
    """

    name: str
    network: nn.Module
    slots: Slots
    path: Path
    state: Any
    total: int
    kept: dict[str, Tensor]
    identity: str = ""
    checkpoint_every: float = 60.0
    main: bool = True
    scaler: Any = None

    def unfinished(self) -> bool:
        """Tell whether there is a further step."""
        raise NotImplementedError

    def take_step(self, step: int) -> Tensor:
        """Take a step of the optimiser and return the loss."""
        raise NotImplementedError

    def after_step(self, loss: Tensor, bar: tqdm) -> bool:
        """Note a loss, and tell whether a checkpoint is due."""
        raise NotImplementedError

    def run(self) -> None:
        """Train to the end, from the checkpoint if there is one."""
        self._resume()
        state, started = self.state, time.monotonic()
        saved, before = started, state.seconds
        options: dict[str, Any] = {"mininterval": 2.0, "dynamic_ncols": True, "disable": not self.main}
        with tqdm(total=self.total, initial=state.step, desc=f"train {self.name}", unit="step", **options) as bar:
            while self.unfinished():
                loss = self.take_step(state.step)
                state.step += 1
                bar.update()
                state.seconds = before + time.monotonic() - started
                if self.after_step(loss, bar) or time.monotonic() - saved > self.checkpoint_every:
                    self._save()
                    saved = time.monotonic()
            bar.total = state.step  # a training that ends early leaves no half bar
        self._save()

    def _save(self) -> None:
        """Write the state of the training atomically, from the main process."""
        if not self.main:
            return
        tensors = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"kept.{k}": v for k, v in self.kept.items()}
        for name, (optimizer, parameter) in self.slots.items():
            tensors |= {f"optimizer.{k}.{name}": v for k, v in optimizer.state[parameter].items()}
        meta = {"state": json.dumps(dataclasses.asdict(self.state)), "training": self.identity}
        if self.scaler is not None:
            meta["scaler"] = json.dumps(self.scaler.state_dict())
        with atomic_path(self.path) as temporary:
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, temporary, meta)

    def _resume(self) -> None:
        """Restore the checkpoint, if there is one of this training."""
        if not self.path.exists():
            return
        with safe_open(self.path, "pt") as file:
            meta = file.metadata()
        if meta.get("training") != self.identity:
            raise UserError(
                f"Expected a checkpoint of this training in '{self.path}', found one of another config; "
                "delete it, or choose another output."
            )
        if self.scaler is not None:
            self.scaler.load_state_dict(json.loads(meta["scaler"]))
        device = next(self.network.parameters()).device
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "kept": {}, "optimizer": {}}
        for key, value in load_file(self.path).items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self.state = type(self.state)(**json.loads(meta["state"]))
        self.network.load_state_dict(parts["model"])
        self.kept = {name: value.to(device) for name, value in parts["kept"].items()}
        for key, value in parts["optimizer"].items():
            kind, _, name = key.partition(".")
            optimizer, parameter = self.slots[name]
            optimizer.state[parameter][kind] = value if kind == "step" else value.to(parameter.device)


@dataclasses.dataclass
class _Smoothed(Progress):
    loss: float = 0.0


def fit(
    name: str,
    model: nn.Module,
    loss_fn: Loss,
    stage: Stage,
    folder: Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint_every: float = 120.0,
) -> dict[str, Any]:
    """Train ``model`` in place; resume from ``folder/name.safetensors`` if it is there.

    With several processes of ``torch.distributed`` gradients are averaged; each process draws its own noise.

    Args:
        name: Name of the checkpoint and of the progress bar.
        model: Parameters that require gradients are trained; with ``stage.ema`` the averaged weights are left
            in the model at the end.
        loss_fn: ``loss_fn(step, generator) -> scalar loss``; the generator, on ``device``, is seeded by (seed, step).
        stage, folder, seed, device, checkpoint_every: As their names say; seconds between checkpoints.

    Returns:
        Optimiser steps, samples seen, seconds, and the final smoothed loss.
    """
    loop = _StageLoop(name, model, loss_fn, stage, folder, seed, device, checkpoint_every)
    loop.run()
    with torch.no_grad():
        for n, value in loop.kept.items():
            loop.params[n].copy_(value)
    state = loop.state
    samples = state.step * stage.batch_size
    return {"steps": state.step, "samples": samples, "seconds": state.seconds, "loss": state.loss}


class _StageLoop(Loop):
    """The loop of :func:`fit`; ``kept`` are the averaged weights."""

    def __init__(self, name, model, loss_fn, stage, folder, seed, device, checkpoint_every) -> None:
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = Optimizer(self.params, stage.optimizer, stage.lr, stage.weight_decay)
        path, slots = folder / f"{name}.safetensors", self.optimizer.slots
        averages = {n: p.detach().clone() for n, p in self.params.items()} if stage.ema else {}
        options = {"checkpoint_every": checkpoint_every, "main": world()[0] == 0}
        super().__init__(name, model, slots, path, _Smoothed(), stage.steps, averages, **options)
        self.loss_fn, self.stage, self.seed, self.generator = loss_fn, stage, seed, torch.Generator(device)

    def unfinished(self) -> bool:
        limit = self.stage.minutes * 60
        by_time = self.state.seconds / limit if limit else 0.0
        done = torch.tensor(max(by_time, self.state.step / self.stage.steps), device=self.generator.device)
        if world()[1] > 1:  # all processes go by the clock of the first
            dist.broadcast(done, 0)
        self.done = float(done)
        return self.done < 1

    def take_step(self, step: int) -> Tensor:
        stage, (rank, size) = self.stage, world()
        lr = stage.lr * min(1.0, (step + 1) / stage.warmup) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * self.done)))
        loss = self.loss_fn(step, self.generator.manual_seed((self.seed + 1009 * rank) * 1_000_003 + step))
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        if size > 1:
            gradients = [p.grad for p in self.params.values() if p.grad is not None]
            average = parameters_to_vector(gradients)
            dist.all_reduce(average)
            vector_to_parameters(average / size, gradients)
        nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        self.optimizer.step(float(lr))
        return loss

    def after_step(self, loss: Tensor, bar: tqdm) -> bool:
        state = self.state
        if self.kept:
            decay = min(self.stage.ema, (1 + state.step) / (10 + state.step))
            averages = [self.kept[n] for n in self.params]
            torch._foreach_lerp_(averages, [p.detach() for p in self.params.values()], 1 - decay)
        if state.step % 10 == 0:
            state.loss = loss.item() if state.step == 10 else 0.95 * state.loss + 0.05 * loss.item()
            bar.set_postfix(loss=f"{state.loss:.4f}", refresh=False)
        return False


def world() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> NDArray[np.int64]:
    """Return the ``step``-th batch of an endless sequence of epochs, each a seeded permutation of ``n`` items."""
    wanted = np.arange(step * batch_size, (step + 1) * batch_size)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(wanted // n):
        here = wanted // n == epoch
        out[here] = permutation(n, seed, int(epoch))[wanted[here] % n]
    return out


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of the items in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class Optimizer:
    """AdamW on all parameters, or Muon (Jordan et al. 2024) on the hidden matrices and AdamW on the rest.

    The memory of the parameters must stay where it is.  Muon's update is scaled to AdamW's size, so ``lr`` serves both.
    ``slots`` holds each parameter's optimiser, and the tensor that this knows it by.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], kind: str, lr: float, weight_decay: float) -> None:
        def is_hidden(name: str, p: nn.Parameter) -> bool:
            ends = name.startswith(("conv_in", "conv_out"))
            return kind == "muon" and p.ndim >= 2 and not ends and min(p.flatten(1).shape) >= 16

        # torch's Muon takes matrices only: each is a view of the parameter's own memory
        self._matrices = {p: nn.Parameter(p.detach().view(len(p), -1)) for n, p in params.items() if is_hidden(n, p)}
        rest = [p for p in params.values() if p not in self._matrices]
        adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if self._matrices:
            flat = list(self._matrices.values())
            self.parts.append(torch.optim.Muon(flat, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        self.slots = {n: (self.parts[p in self._matrices], self._matrices.get(p, p)) for n, p in params.items()}

    def step(self, lr: float) -> None:
        """Take a step at this learning rate, with the gradients of the model's parameters."""
        for p, matrix in self._matrices.items():
            matrix.grad = None if p.grad is None else p.grad.view(matrix.shape)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()


def learning_rate(schedule: str, step: int, total: int, peak: float) -> tuple[float, float]:
    """Return (learning rate, momentum beta1) of a step.

    "one-cycle" (Smith and Topin 2018) equals torch's ``OneCycleLR``: up from peak / 25 over 30% of the steps,
    down to peak / 250,000, along cosines, with momentum 0.95 -> 0.85 -> 0.95.  "cosine" falls to 0.
    """
    if schedule == "constant":
        return peak, 0.9
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * step / total)), 0.9
    turn = max(0.3 * total - 1, 1e-9)
    if step <= turn:
        share, rates, momenta = step / turn, (peak / 25, peak), (0.95, 0.85)
    else:
        share = (step - turn) / max(total - 1 - turn, 1e-9)
        rates, momenta = (peak, peak / 25e4), (0.85, 0.95)
    return _cosine(*rates, share), _cosine(*momenta, share)


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) / 2 * (math.cos(math.pi * share) + 1)
