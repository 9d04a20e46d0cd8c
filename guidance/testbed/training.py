"""Training of the testbed networks: one resumable loop (:func:`fit`) and one loss per network.

Every batch, noise draw and dropout mask is a function of (seed, step) alone, so a run that is killed and started
again goes on to the same weights as one that is not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPModel

from guidance.io import atomic_path

from .optimizer import Optimizer

Loss = Callable[[int, torch.Generator], Tensor]


@dataclasses.dataclass
class Stage:
    """How one network is trained.

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
    """What a training took: optimiser steps, samples seen, seconds, final smoothed loss."""

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

    With several processes of ``torch.distributed`` gradients are averaged; each draws noise of its own.

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
    """Rank of this process and number of processes."""
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
    """The ``step``-th batch of an endless sequence of epochs, each a seeded permutation of ``n`` items."""
    wanted = np.arange(step * batch_size, (step + 1) * batch_size)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(wanted // n):
        here = wanted // n == epoch
        out[here] = _permutation(n, seed, int(epoch))[wanted[here] % n]
    return out


_PERMUTATIONS: dict[tuple[int, int, int], NDArray[np.int64]] = {}


def _permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    key = (n, seed, epoch)
    if key not in _PERMUTATIONS:
        if len(_PERMUTATIONS) > 3:
            _PERMUTATIONS.clear()
        _PERMUTATIONS[key] = np.random.default_rng([seed, epoch]).permutation(n)
    return _PERMUTATIONS[key]


def reconstruction_loss(y: Float[Tensor, "b 3 h w"], x: Float[Tensor, "b 3 h w"]) -> Tensor:
    """L1 + L2 + L1 of image gradients, which keeps edges."""
    error = y - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def jitter(x: Float[Tensor, "b 3 h w"], g: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Mild augmentation for classifiers and CLIPs: shifts up to 3 pixels, noise, and blur of half of the images."""
    dx, dy = (int(torch.randint(-3, 4, (), generator=g, device=g.device)) for _ in range(2))
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")[..., 3 + dy : 67 + dy, 3 + dx : 67 + dx]
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = torch.rand(len(x), 1, 1, 1, generator=g, device=x.device).mul(2).sub(1).clamp(min=0)
    noise = 0.06 * torch.rand(len(x), 1, 1, 1, generator=g, device=x.device)
    return x + mix * (soft - x) + noise * torch.randn(x.shape, generator=g, device=x.device)


def clip_loss(clip: CLIPModel, x: Float[Tensor, "b 3 h w"], ids: Int[Tensor, "b n"]) -> Tensor:
    """Symmetric contrastive loss (Radford et al. 2021); equal captions in a batch are all positives."""
    out = clip(input_ids=ids, pixel_values=x)
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(-1, keepdim=True)
    logits = out.logits_per_image
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def denoising_loss(
    unet: nn.Module | UNet2DConditionModel,
    scheduler: DDIMScheduler,
    x0: Float[Tensor, "b c h w"],
    text: Float[Tensor, "b n d"],
    g: torch.Generator,
    snr_cap: float = 5.0,
    emphasis: Float[Tensor, "b h w"] | None = None,
) -> Tensor:
    """v-prediction loss weighted by 1 / (1 + SNR / cap), stratified timesteps.

    The weight is that of P2 (Choi et al. 2022) carried over to v: it takes weight from the nearly clean
    timesteps, where v is mostly noise nobody can predict, and leaves the noisy ones, where content is decided.
    ``emphasis`` adds to the weight of places (1 counts a place twice), in full where abar > 1/4 and not at all in
    pure noise, where the place is still unknown.
    """
    b, device = len(x0), x0.device
    u = (torch.arange(b, device=device) + torch.rand(b, generator=g, device=device)) / b
    t = (u * len(scheduler.alphas_cumprod)).long()
    noise = torch.randn(x0.shape, generator=g, device=device)
    x_t = scheduler.add_noise(x0, noise, t)
    v = scheduler.get_velocity(x0, noise, t)
    abar = scheduler.alphas_cumprod.to(device)[t]
    weight = (1 / (1 + abar / (1 - abar) / snr_cap))[:, None, None]
    if emphasis is not None:
        weight = weight * (1 + emphasis * (4 * abar).clamp(max=1)[:, None, None])
    prediction = unet(x_t, t, text, return_dict=False)[0]
    error = (prediction.float() - v).square().mean(1)
    return (weight * error).sum() / weight.expand_as(error).sum()
