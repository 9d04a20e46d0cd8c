"""One resumable training loop (:func:`fit`), its optimisers and its learning rates."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from guidance.utils.io import atomic_path

Loss = Callable[[int, torch.Generator], Tensor]


@dataclasses.dataclass
class Stage:
    """Length, batch size and optimiser of the training of one network.

    Attributes:
        steps: Optimiser steps.
        batch_size: Samples per step, all processes together.
        lr: Peak learning rate of AdamW; linear warm-up over ``warmup`` steps, then cosine to 2%.
        ema: Decay of the exponential moving average of the weights, reached gradually; 0 for none.
        minutes: Stop after this much training time even if steps are left (0: no limit).  The schedule then runs
            on time instead of steps, so it always ends at its lowest learning rate.
        optimizer: "adamw", or "muon" (Jordan et al. 2024) for the hidden weight matrices, a convolution's seen as
            (out, in * k * k), and AdamW for the rest; its update has AdamW's size, so ``lr`` is the same.
    """

    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 100
    ema: float = 0.0
    minutes: float = 0.0
    optimizer: str = "adamw"


@dataclasses.dataclass
class FitResult:
    """Length and result of a training: optimiser steps, samples seen, seconds, final smoothed loss."""

    steps: int
    samples: int
    seconds: float
    loss: float


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
) -> FitResult:
    """Train ``model`` in place; resume from ``folder/name.safetensors`` if it is there.

    With several processes of ``torch.distributed`` gradients are averaged; each process draws its own noise.

    Args:
        name: Name of the checkpoint and of the progress bar.
        model: Parameters that require gradients are trained; with ``stage.ema`` the averaged weights are left
            in the model at the end.
        loss_fn: ``loss_fn(step, generator) -> scalar loss``; the generator is seeded by (seed, step).
        stage: Steps, batch and learning rate.
        folder: Where the checkpoint lives.
        seed: Seed of data order and noise.
        device: Where the generator (and the model) lives.
        checkpoint_every: Seconds between checkpoints.
    """
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = Optimizer(params, stage.optimizer, stage.lr, stage.weight_decay)
    ema = {n: p.detach().clone() for n, p in params.items()} if stage.ema else {}
    path = folder / f"{name}.safetensors"
    step, spent, smooth = _resume(path, model, params, optimizer, ema)
    generator = torch.Generator(device)
    bar = tqdm(
        total=stage.steps,
        initial=step,
        desc=f"train {name}",
        unit="step",
        mininterval=2.0,
        dynamic_ncols=True,
        disable=world()[0] != 0,
    )
    started = saved = time.monotonic()
    limit = stage.minutes * 60

    rank, size = world()

    def progress() -> float:
        by_time = (spent + time.monotonic() - started) / limit if limit else 0.0
        value = torch.tensor(max(by_time, step / stage.steps), device=device)
        if size > 1:  # all processes go by the clock of the first
            dist.broadcast(value, 0)
        return float(value)

    while (done := progress()) < 1:
        lr = stage.lr * min(1.0, (step + 1) / stage.warmup) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * done)))
        loss = loss_fn(step, generator.manual_seed((seed + 1009 * rank) * 1_000_003 + step))
        model.zero_grad(set_to_none=True)
        loss.backward()
        if size > 1:
            _average([p.grad for p in params.values() if p.grad is not None])
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step(float(lr))
        step += 1
        if ema:
            decay = min(stage.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()], 1 - decay)
        if step % 10 == 0:
            smooth = loss.item() if step == 10 else 0.95 * smooth + 0.05 * loss.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        bar.update()
        if rank == 0 and time.monotonic() - saved > checkpoint_every:
            saved = time.monotonic()
            _checkpoint(path, model, optimizer, ema, step, spent + saved - started, smooth)
    if rank == 0:
        _checkpoint(path, model, optimizer, ema, step, spent + time.monotonic() - started, smooth)
    bar.close()
    with torch.no_grad():
        for n, value in ema.items():
            params[n].copy_(value)
    return FitResult(step, step * stage.batch_size, spent + time.monotonic() - started, smooth)


def world() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _average(tensors: list[Tensor]) -> None:
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


def _checkpoint(path, model, optimizer, ema, step, seconds, smooth) -> None:
    tensors = {f"model.{n}": t for n, t in model.state_dict().items()}
    tensors |= {f"ema.{n}": t for n, t in ema.items()} | optimizer.tensors()
    meta = {"step": str(step), "seconds": str(seconds), "loss": str(smooth)}
    with atomic_path(path) as temporary:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary, meta)


def _resume(path: Path, model, params, optimizer, ema) -> tuple[int, float, float]:
    if not path.exists():
        return 0, 0.0, 0.0
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        meta = f.metadata()
    tensors = load_file(path)
    step = int(meta["step"])
    model.load_state_dict({k[6:]: t for k, t in tensors.items() if k.startswith("model.")})
    optimizer.load(tensors, step)
    for n in params:
        if ema:
            ema[n].copy_(tensors[f"ema.{n}"])
    return step, float(meta["seconds"]), float(meta["loss"])


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> NDArray[np.int64]:
    """Return the ``step``-th batch of an endless sequence of epochs, each a seeded permutation of ``n`` items."""
    wanted = np.arange(step * batch_size, (step + 1) * batch_size)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(wanted // n):
        here = wanted // n == epoch
        out[here] = _permutation(n, seed, int(epoch))[wanted[here] % n]
    return out


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(n)


class Optimizer:
    """AdamW on all parameters, or Muon (Jordan et al. 2024) on the hidden matrices and AdamW on the rest.

    Args:
        params: The trained parameters by name; their memory must stay where it is.
        kind: "adamw" or "muon".
        lr: Learning rate; Muon's update is scaled to AdamW's size, so it serves both.
        weight_decay: Decoupled weight decay.
    """

    def __init__(self, params: dict[str, nn.Parameter], kind: str, lr: float, weight_decay: float) -> None:
        def is_hidden(name: str, p: nn.Parameter) -> bool:
            ends = name.startswith(("conv_in", "conv_out"))
            return kind == "muon" and p.ndim >= 2 and not ends and min(p.flatten(1).shape) >= 16

        # torch's Muon takes matrices only: each is a view of the parameter's own memory
        self._matrices = {
            n: (p, nn.Parameter(p.detach().view(len(p), -1))) for n, p in params.items() if is_hidden(n, p)
        }
        self.state_of = {n: self._matrices[n][1] if n in self._matrices else p for n, p in params.items()}
        rest = [p for n, p in params.items() if n not in self._matrices]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
        ]
        if self._matrices:
            flat = [m for _, m in self._matrices.values()]
            self.parts.append(torch.optim.Muon(flat, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))

    def step(self, lr: float) -> None:
        """Take a step at this learning rate, with the gradients of the model's parameters."""
        for p, matrix in self._matrices.values():
            matrix.grad = None if p.grad is None else p.grad.view(matrix.shape)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state as ``{"KEY.parameter": tensor}``, step counts left out."""
        states = {n: next(o.state[p] for o in self.parts if p in o.state) for n, p in self.state_of.items()}
        return {f"optimizer.{k}.{n}": v for n, s in states.items() for k, v in s.items() if k != "step"}

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Restore what :meth:`tensors` returned after ``step`` steps."""
        for n, p in self.state_of.items():
            part = self.parts[1 if n in self._matrices else 0]
            keys = ("momentum_buffer",) if n in self._matrices else ("exp_avg", "exp_avg_sq")
            state = {k: tensors[f"optimizer.{k}.{n}"].to(p.device) for k in keys}
            part.state[p] = state if n in self._matrices else {"step": torch.tensor(float(step)), **state}


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
