"""``apply_guidance``: one wrapper around the denoiser call that guides any sampling loop.

The wrapper sees the call's input ``x``, timestep and output, and returns a shifted output.  It therefore guides our
loop and any unmodified diffusers pipeline alike.  For guides with scores ``log p_i(y | x)``::

    eps~ = eps - sigma_t * sum_i s_i grad_x log p_i          (normalize=None)
    eps~ = eps - kappa * RMS(eps_cond - eps_uncond) * d      (normalize="cfg"; d: the gradient's direction, RMS 1)

in the model's own parameterisation (:meth:`NoiseSchedule.shift_factor`).  With classifier-free guidance in one batch
the same shift is subtracted from every part, so any combination whose weights sum to one is shifted by exactly it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from guidance.errors import UserError
from guidance.guided_step import Group, GuidedStep, StepRecord
from guidance.guides.base import Guide, is_direct
from guidance.schedule import NoiseSchedule, step_position

#: Number of classifier-free guidance parts in one denoiser batch, set by our own loop; None: ask the pipeline.
cfg_parts: ContextVar[int | None] = ContextVar("cfg_parts", default=None)


class GuidanceHandle:
    """What ``with apply_guidance(...) as handle`` yields: the records of the run so far.

    Attributes:
        records: One :class:`StepRecord` per guided denoiser call; cleared when a new run starts.
        skipped: Samples x steps left unguided because their gradient was not finite, in all runs.
    """

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.skipped = 0


@contextmanager
def apply_guidance(pipe: Any, guides: Sequence[Guide]) -> Iterator[GuidanceHandle]:
    """Guide every denoiser call of a pipeline inside the ``with`` block; leave nothing behind.

    Args:
        pipe: Any diffusers pipeline with a ``unet`` and a ``scheduler``, or our own loop over one.
        guides: One or more guides; scales add.  Guides whose scale is 0 cost nothing and change no bit.

    Yields:
        A handle with per-step scores and gradient norms.

    Raises:
        UserError: If a guide does not fit the pipeline, or guidance is applied twice to it.

    Example::

        with apply_guidance(pipe, [MidBlockGuide(head, guidance_scale=1.0)]):
            image = pipe("a red balloon over the sea at dusk").images[0]
    """
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise UserError(f"Expected a pipeline with a unet, got {type(pipe).__name__}, which has none.")
    if "forward" in vars(unet) and isinstance(vars(unet)["forward"], _GuidedForward):
        raise UserError(
            "Expected an unguided pipeline, but guidance is applied to it already; pass all guides at once."
        )
    for guide in guides:
        guide.prepare(pipe)
    handle = GuidanceHandle()
    guided = _GuidedForward(pipe, [g for g in guides if g.strength.guidance_scale != 0], handle)
    trainable = [p for p in unet.parameters() if p.requires_grad]
    had_forward = vars(unet).get("forward")
    had_step = vars(pipe.scheduler).get("step")
    scheduler = pipe.scheduler
    try:
        for p in trainable:  # frozen weights keep fewer activations for the backward pass
            p.requires_grad_(False)
        if guided.guides:
            unet.forward = guided
        if any(g.strength.space == "x" for g in guided.guides):
            scheduler.step = guided.wrap_step(scheduler)
        yield handle
    finally:
        _restore(unet, "forward", had_forward)
        _restore(scheduler, "step", had_step)
        for p in trainable:
            p.requires_grad_(True)


def _restore(owner: Any, name: str, value: Any) -> None:
    vars(owner).pop(name, None)
    if value is not None:
        setattr(owner, name, value)


class _GuidedForward:
    """Replacement of ``unet.forward`` while guidance is applied."""

    def __init__(self, pipe: Any, guides: Sequence[Guide], handle: GuidanceHandle) -> None:
        self.pipe, self.unet, self.handle = pipe, pipe.unet, handle
        self.original: Callable[..., Any] = pipe.unet.forward
        self.guides = list(guides)
        by_kind = itertools.groupby(sorted(self.guides, key=_kind), _kind)
        self.groups = [Group(list(alike)) for _, alike in by_kind]
        functools.update_wrapper(self, self.original, updated=())  # keeps the signature
        self.last_t = -math.inf
        self.x_shift: Tensor | None = None
        self.x_input: Tensor | None = None

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        """The scheduler's noise schedule, read at the first guided call."""
        return NoiseSchedule.from_scheduler(self.pipe.scheduler)

    @functools.cached_property
    def num_weights(self) -> int:
        """Parameters of the denoiser."""
        return sum(p.numel() for p in self.unet.parameters())

    # ---- the denoiser call ------------------------------------------------------------------------------------
    def __call__(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        index, total, t = step_position(self.pipe.scheduler, timestep)
        if index == 0 or t > self.last_t:  # img2img and inpainting start behind index 0
            self.handle.records.clear()
            for group in self.groups:
                group.direction = None
        self.last_t = t
        active = [g for g in self.groups if g.guides[0].strength.active(index / total)]
        if not active:
            return self.original(sample, timestep, *args, **kwargs)
        if getattr(self.pipe, "do_perturbed_attention_guidance", False):
            raise UserError(
                f"Expected {type(self.pipe).__name__} with pag_scale=0: perturbed-attention guidance works on the "
                "parts of a batch together, guides on each by itself; set pag_scale=0, or leave the guides out."
            )
        parts = cfg_parts.get() or (2 if getattr(self.pipe, "do_classifier_free_guidance", False) else 1)
        return GuidedStep(self, active, sample, timestep, args, kwargs, index, parts).run()

    # ---- x-space ----------------------------------------------------------------------------------------------
    def wrap_step(self, scheduler: Any) -> Callable[..., Any]:
        """A ``scheduler.step`` that moves the latents by the pending x-space shift first."""
        step = scheduler.step

        @functools.wraps(step)  # pipelines inspect its signature to see whether it takes a generator
        def guided_step(
            model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            if self.x_shift is not None and self.x_input is not None:
                # sigma-scaled schedulers feed sample / sqrt(1 + sigma^2): undo that one number
                x = self.x_input.double()
                factor = (sample.double() * x).sum() / (x * x).sum()
                sample = sample + (factor * self.x_shift).to(sample.dtype)
                self.x_shift = self.x_input = None
            return step(model_output, timestep, sample, *args, **kwargs)

        return guided_step


def _kind(guide: Guide) -> tuple[bool, str, str, float, float, int]:
    """What the guides of one :class:`Group` have in common."""
    s = guide.strength
    return is_direct(guide), str(s.normalize), s.space, s.start, s.stop, s.every
