"""Replacement of a denoiser's forward while guidance is applied, which makes every call a guided step."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from guidance.apply.step import DenoiserCall, Group, GuidedStep, StepRecord
from guidance.guides.base import Guide, ScoringGuide, is_direct
from guidance.models.denoiser import called_denoiser, denoiser_of, frozen, signature_of
from guidance.models.layouts import Layout, Parts
from guidance.models.types import Denoiser, Pipeline
from guidance.schedule import NoiseSchedule, step_position
from guidance.taps.hooks import X0, X0_THROUGH_UNET, runs_compiled, uncompiled
from guidance.utils.errors import UserError, is_out_of_memory

#: Number of classifier-free guidance parts in one denoiser batch, set by our sampling loop; None: ask the pipeline.
cfg_parts: ContextVar[int | None] = ContextVar("cfg_parts", default=None)


class GuidanceHandle:
    """Records of the run so far, as yielded by :func:`guidance.apply_guidance`.

    Attributes:
        records: One :class:`StepRecord` per guided denoiser call; cleared when a new run starts.
        skipped: Samples x steps left unguided because their gradient was not finite, in all runs.
    """

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.skipped = 0


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Temporarily override an instance attribute."""
    previous = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        vars(owner).pop(name, None)
        if previous is not None:
            setattr(owner, name, previous)


class GuidedForward:
    """Replacement of a denoiser's forward while guidance is applied.

    Args:
        pipe: The pipeline, with its scheduler.
        guides: Guides; those with scale 0 are left out.
        layout: Layout of the parts of classifier-free guidance in the batch.
        handle: Receives the records.
    """

    def __init__(self, pipe: Pipeline, guides: Sequence[Guide], layout: Layout, handle: GuidanceHandle) -> None:
        self.pipe, self.layout, self.handle = pipe, layout, handle
        self.called, self.denoiser = called_denoiser(pipe), denoiser_of(pipe)
        self.original: Callable[..., Any] = self.called.forward
        self.guides = [g for g in guides if g.strength.guidance_scale != 0]
        by_kind = itertools.groupby(sorted(self.guides, key=_kind), _kind)
        self.groups = [Group(list(same_kind)) for _, same_kind in by_kind]
        functools.update_wrapper(self, self.original, updated=())  # keeps the signature
        self.last_t = -math.inf
        self.x_shift: Tensor | None = None
        self.x_input: Tensor | None = None

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        """Noise schedule of the scheduler, read at the first guided call."""
        return NoiseSchedule.from_scheduler(self.pipe.scheduler)

    @functools.cached_property
    def num_weights(self) -> int:
        """Number of parameters of the denoiser."""
        return sum(p.numel() for p in self.denoiser.parameters())

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Prepare the denoiser for taps: freeze it, and run it uncompiled where the taps are."""
        self.original = self.called.forward
        self.signature, self.first = signature_of(self.denoiser)
        self.part_by_part = runs_compiled(self.denoiser) or _recomputes(self.denoiser)
        taps = {g.tap for g in self.guides if isinstance(g, ScoringGuide)} - {X0, X0_THROUGH_UNET}
        with frozen(self.denoiser), uncompiled(self.denoiser, taps):
            yield

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the denoiser's forward."""
        with self.tapped(), replaced(self.called, "forward", self):
            yield

    # ---- the denoiser call ------------------------------------------------------------------------------------
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.begin(args, kwargs)
        if step is None:
            return self.original(*args, **kwargs)
        with advised():
            return step.run()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GuidedStep | None:
        """Return the guided step of a denoiser call, or None if no guide is active; the first step starts a new run."""
        bound = self.signature.bind(None, *args, **kwargs).arguments
        others = {name: value for name, value in bound.items() if name not in ("self", self.first, "timestep")}
        others |= others.pop("kwargs", {})
        call = DenoiserCall(bound[self.first], bound["timestep"], others)
        index, total, t = step_position(self.pipe.scheduler, call.timestep)
        if index == 0 or t > self.last_t:  # img2img and inpainting start after index 0
            self.handle.records.clear()
            for group in self.groups:
                group.direction = None
        self.last_t = t
        active = [g for g in self.groups if g.guides[0].strength.active(index / total)]
        return GuidedStep(self, active, call, index, self.parts(call)) if active else None

    def parts(self, call: DenoiserCall) -> Parts:
        """Return the parts of classifier-free guidance in a denoiser batch."""
        number = cfg_parts.get()
        return Parts.of(number) if number else self.layout(self.pipe, call.sample, call.others)

    def call(self, call: DenoiserCall) -> Any:
        """Run the denoiser as the pipeline does."""
        return self._run(self.original, call)

    def call_tapped(self, call: DenoiserCall) -> Any:
        """Run the denoiser uncompiled, so that hooks see its modules."""
        return self._run(self.original if self.called is self.denoiser else self.denoiser, call)

    def _run(self, function: Callable[..., Any], call: DenoiserCall) -> Any:
        return function(**{self.first: call.sample, "timestep": call.timestep}, **call.others)

    # ---- x-space ----------------------------------------------------------------------------------------------
    def moved(self, x: Tensor) -> Tensor:
        """Move latents by the pending x-space shift, and clear it."""
        if self.x_shift is None or self.x_input is None:
            return x
        # sigma-scaled schedulers feed x / sqrt(1 + sigma^2): recover that factor
        x_input = self.x_input.double()
        factor = (x.double() * x_input).sum() / (x_input * x_input).sum()
        moved = x + (factor * self.x_shift).to(x.dtype)
        self.x_shift = self.x_input = None
        return moved

    def wrap_step(self, scheduler: Any) -> Callable[..., Any]:
        """Wrap ``scheduler.step`` to move the latents by the pending x-space shift first."""
        step = scheduler.step

        @functools.wraps(step)  # pipelines inspect its signature to see whether it takes a generator
        def guided_step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            return step(model_output, timestep, self.moved(sample), *args, **kwargs)

        return guided_step


def _kind(guide: Guide) -> tuple[bool, str, str, float, float, int]:
    """Key of the guides that share a :class:`Group`."""
    s = guide.strength
    return is_direct(guide), str(s.normalize), s.space, s.start, s.stop, s.every


def _recomputes(denoiser: Denoiser) -> bool:
    """Tell whether gradient checkpointing runs blocks a second time, outside of the forward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in denoiser.modules())


@contextmanager
def advised() -> Iterator[None]:
    """Explain what to change when a guided step does not fit in memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "Expected a guided step to fit in memory, but it ran out; make the batch smaller, load the pipeline in "
            "bfloat16, or call pipe.enable_attention_slicing() or the denoiser's enable_gradient_checkpointing() "
            "(every=... saves time, not memory)."
        ) from error
