"""Our sampling loop: one generator per sample, any diffusers scheduler, guidance by wrapping the denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from guidance.apply.apply import apply_guidance
from guidance.apply.observers import StepScorer
from guidance.apply.values import GuidanceHandle, Observer, StepRecord
from guidance.guides.base import Guide
from guidance.models.conditions import encode_prompts, last
from guidance.models.denoiser import device_of
from guidance.models.types import Pipeline
from guidance.sampling.cfg import ClassifierFree
from guidance.sampling.start import FromNoise, Start
from guidance.schedule import NoiseSchedule, StepPlan
from guidance.utils.errors import UserError, first_line, nearest

#: Short names of schedulers; every scheduler of diffusers is known by its class name too.
SCHEDULERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-singlestep": "DPMSolverSinglestepScheduler",
    "dpm++-sde": "DPMSolverSDEScheduler",
    "deis": "DEISMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-a": "KDPM2AncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "sa": "SASolverScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}

#: ``callback(step, latents, record)``; the record holds scores and gradient norms per sample, None if unguided.
#: Returned latents replace the current ones.
Callback = Callable[[int, Tensor, StepRecord | None], Tensor | None]


def find_scheduler(name: str) -> Any:
    """Return the class of a scheduler by its short or class name."""
    cls_name = SCHEDULERS.get(name, name)
    if not cls_name.endswith("Scheduler") or not hasattr(diffusers, cls_name):
        known = [*SCHEDULERS, *(n for n in dir(diffusers) if n.endswith("Scheduler"))]
        raise UserError(f"Expected a scheduler's name, got '{name}'.{nearest(name, known)}")
    return getattr(diffusers, cls_name)


def build_scheduler(name: str, like: Any) -> Any:
    """Build a scheduler, by short or class name, with the noise schedule of another one; it never clips latents.

    Raises:
        UserError: If there is no scheduler of this name, it needs a package that is not there, or is for other models.
    """
    cls = find_scheduler(name)
    try:
        scheduler = cls.from_config(like.config, clip_sample=False)
    except ImportError as error:
        raise UserError(f"Expected the packages of {cls.__name__}, got none: {first_line(error)}") from error
    wanted, got = (NoiseSchedule.from_scheduler(s) for s in (like, scheduler))
    if (wanted.kind, wanted.prediction_type) != (got.kind, got.prediction_type):
        raise UserError(
            f"Expected a scheduler for a model of kind {wanted.kind} that predicts {wanted.prediction_type}, got "
            f"{cls.__name__} for {got.kind} and {got.prediction_type}; use for example scheduler='dpm++'."
        )
    return scheduler


@contextmanager
def using_scheduler(pipe: Pipeline, name: str | None) -> Iterator[None]:
    """Give a pipeline another scheduler inside the ``with`` block (None: a fresh copy of its own)."""
    original = pipe.scheduler
    fresh = type(original).from_config(original.config) if name is None else build_scheduler(name, original)
    pipe.scheduler = fresh
    try:
        yield
    finally:
        pipe.scheduler = original


@torch.no_grad()
def sample_latents(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int = 25,
    cfg_scale: float | Sequence[float] | ClassifierFree = 4.0,
    negative_prompt: str = "",
    scheduler: str | None = None,
    eta: float = 0.0,
    start: Start | None = None,
    guides: Sequence[Guide] = (),
    guide_prompts: Sequence[str] | None = None,
    guide_factors: Sequence[float] | None = None,
    callback: Callback | None = None,
    observe: Sequence[Observer] = (),
    handle: GuidanceHandle | None = None,
    progress: bool = False,
) -> Float[Tensor, "b c y x"]:
    """Sample latents for prompts, one seed each.

    A (prompt, seed) gives the same latents whatever else is in the batch, up to rounding.

    Args:
        pipe: A pipeline of Stable Diffusion 1, 2 or XL: ``unet``, ``scheduler``, ``encode_prompt``.
        prompts: One prompt per sample.
        seeds: One seed per sample, for its initial and all later noise.
        num_steps: Sampling steps.
        cfg_scale: Classifier-free guidance weight ``w``: ``eps_uncond + w (eps_cond - eps_uncond)``; 1 is off.
            Or one per sample, none of them 1; or a :class:`~guidance.sampling.cfg.ClassifierFree`.
        negative_prompt: Prompt of the unconditional part.
        scheduler: Short or class name, see :data:`SCHEDULERS`; None keeps the pipeline's.
        eta: DDIM's noise (Song et al. 2021, equation 16): 0 is deterministic, 1 draws as much as DDPM.
        start: :class:`~guidance.sampling.start.FromImage` or :class:`~guidance.sampling.start.FromMask`;
            None starts from noise.
        guides: Guides to apply.
        guide_prompts: Prompts for guides that follow each sample's prompt; None: ``prompts``.
        guide_factors: Factors of the guides' scales, one per sample; None: 1.
        callback: Called after every step, see :data:`Callback`.
        observe: Observers of the denoiser's calls, see :func:`guidance.apply_guidance`.
        handle: Receives what happened, see :class:`~guidance.apply.values.GuidanceHandle`.
        progress: Show a progress bar over the steps.

    Returns:
        Final latents as the VAE's decoder expects them times ``scaling_factor``.

    Raises:
        UserError: If the seeds or the start do not fit the prompts, or the scheduler takes no eta and it is not 0.
    """
    if len(prompts) != len(seeds):
        raise UserError(f"Expected one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds.")
    cfg = ClassifierFree.of(cfg_scale)
    guide_prompts = tuple(guide_prompts or prompts)
    parts = 1 if cfg.scale == 1 else 2
    with using_scheduler(pipe, scheduler):
        scorer = None
        if cfg.modulate is not None:
            cfg.modulate.prepare(pipe)
            scorer = StepScorer(cfg.modulate, guide_prompts)
        watching = [*observe, *([] if scorer is None else [scorer])]
        given: dict[str, Any] = {"prompts": guide_prompts, "factors": guide_factors, "observe": watching}
        with apply_guidance(pipe, guides, parts=parts, **given) as own:
            conditions = encode_prompts(pipe, prompts, negative_prompt, classifier_free=parts == 2)
            pipe.scheduler.set_timesteps(num_steps, device=device_of(pipe))
            plan = StepPlan.of(pipe.scheduler)
            generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
            extra = step_options(pipe.scheduler, generators, eta)
            run = (start or FromNoise()).begin(pipe, initial_noise(pipe, generators), num_steps)
            x, steps = run.x, 0
            for i, t in enumerate(tqdm(run.timesteps, disable=not progress, desc="sample", leave=False)):
                scaled = pipe.scheduler.scale_model_input(x, t)
                place = plan.locate(pipe.scheduler, t)
                fraction, steps = place.number / place.total, steps + int(place.first)
                needed = 1 if cfg.weight(fraction) == 1 and not guides and not watching else parts
                x_in = run.model_input(torch.cat([scaled] * needed))
                output = pipe.unet(x_in, t, **last(conditions, needed * len(prompts)), return_dict=False)[0]
                if needed == 2:
                    uncond, cond = output.chunk(2)
                    output = cfg.combine(uncond, cond, fraction, None if scorer is None else scorer.scores)
                x = run.after_step(pipe.scheduler.step(output, t, x, return_dict=False, **extra)[0], i)
                if callback is not None:
                    other = callback(i, x, own.records[-1] if own.records else None)
                    x = x if other is None else other
        if handle is not None:
            vars(handle).update(vars(own) | {"steps": steps})
    return x


def initial_noise(pipe: Pipeline, generators: Sequence[torch.Generator]) -> Float[Tensor, "b c y x"]:
    """Draw unit Gaussian latents, one CPU generator per sample: the same numbers as diffusers."""
    size = pipe.unet.config.sample_size
    shape = (1, pipe.vae.config.latent_channels, size, size)
    noise = [torch.randn(shape, generator=g, dtype=pipe.unet.dtype) for g in generators]
    return torch.cat(noise).to(device_of(pipe))


def takes_eta(scheduler: Any) -> bool:
    """Tell whether a scheduler's step takes DDIM's eta."""
    return "eta" in inspect.signature(type(scheduler).step).parameters


def step_options(scheduler: Any, generators: Sequence[torch.Generator], eta: float) -> dict[str, Any]:
    """Return the arguments of a scheduler's step besides output, timestep and latents."""
    if not 0 <= eta <= 1:
        raise UserError(f"Expected eta in 0..1, got {eta}; 0 is deterministic, 1 draws as much noise as DDPM.")
    if eta and not takes_eta(scheduler):
        raise UserError(
            f"Expected eta=0 with {type(scheduler).__name__}, which has none, got {eta}; use scheduler='ddim'."
        )
    if hasattr(scheduler, "noise_sampler_seed"):  # DPM++ SDE draws from Brownian trees of its own
        scheduler.noise_sampler_seed = [generator.initial_seed() for generator in generators]
    options: dict[str, Any] = {"eta": eta} if eta else {}
    if "generator" in inspect.signature(type(scheduler).step).parameters:
        options["generator"] = list(generators)
    return options


@torch.no_grad()
def check_resampling(pipe: Pipeline, eta: float) -> None:
    """Refuse a sampler whose latents cannot be copied between steps, by a step on a dummy.

    Schedulers are refused if they remember earlier steps of each sample, or draw no noise (copies stay identical).
    """
    name, ends = type(pipe.scheduler).__name__, []
    x = torch.ones(1, pipe.vae.config.latent_channels, 1, 1)
    output = torch.ones(1, pipe.unet.config.out_channels, 1, 1)
    for seed in (0, 1):
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[0]
        scheduler.scale_model_input(x, t)
        extra = step_options(scheduler, [torch.Generator().manual_seed(seed)], eta)
        ends.append(scheduler.step(output, t, x, return_dict=False, **extra)[0])
    remembered = [v for value in vars(scheduler).values() for v in (value if isinstance(value, list) else [value])]
    if any(isinstance(v, Tensor) and v.ndim == x.ndim for v in remembered):
        raise UserError(
            f"Expected a scheduler without a memory of each sample, got {name}, whose earlier outputs would stay "
            "behind when latents are copied; use scheduler='ddim' or 'ddpm'."
        )
    if torch.equal(*ends):
        hint = "eta=1" if takes_eta(pipe.scheduler) else "scheduler='ddim' with eta=1, or 'ddpm'"
        raise UserError(f"Expected a sampler that draws noise, got {name} with eta={eta:g}; use {hint}.")


@torch.no_grad()
def decode_latents(pipe: Pipeline, latents: Float[Tensor, "b c y x"]) -> NDArray[np.uint8]:
    """Decode to RGB images, uint8, (b, h, w, 3), by rounding to the nearest level."""
    z = latents / pipe.vae.config.scaling_factor + (getattr(pipe.vae.config, "shift_factor", None) or 0.0)
    images = pipe.vae.decode(z.to(pipe.vae.dtype), return_dict=False)[0].float()
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sample_images(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 32,
    start: Start | None = None,
    progress: bool = False,
    **options: Any,
) -> NDArray[np.uint8]:
    """Sample and decode in batches; arguments as in :func:`sample_latents`.

    Returns:
        Images, uint8, shape (n, h, w, 3); at most one grey level apart between batch sizes.
    """
    images = []
    with tqdm(total=len(prompts), disable=not progress, unit="image", desc="sample") as bar:
        for i in range(0, len(prompts), batch_size):
            part = slice(i, i + batch_size)
            options["start"] = None if start is None else start.at(part)
            images.append(decode_latents(pipe, sample_latents(pipe, prompts[part], seeds[part], **options)))
            bar.update(len(images[-1]))
    return np.concatenate(images)
