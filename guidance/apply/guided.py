"""The guided denoiser: one ordinary prediction, shifted by what the guides want.

:class:`GuidedDenoiser` stands in for the denoiser's forward; it is the only thing that does.  A call is read (which
parts of the batch, which solver step: given, or asked of the pipeline whose call is running), planned (which guides
take a gradient, which reuse their last one), predicted with gradients taken on the way, and shifted.  Values are
returned from one to the next; what outlives a call is in a :class:`~guidance.apply.values.Run`, which ends with the
sampling run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from guidance.apply.check import check_gradient, recomputes, swaps_weights
from guidance.apply.values import (
    NO_RUN,
    Arguments,
    Call,
    Gradient,
    Group,
    GuidanceHandle,
    Observation,
    Observer,
    Run,
    StepRecord,
)
from guidance.guides.base import DirectGuide, Guide
from guidance.models.denoiser import called_denoiser, denoiser_of, frozen, latent_channels, signature_of
from guidance.models.layouts import Parts, parts_of, running_pipeline
from guidance.models.types import Pipeline
from guidance.schedule import NoiseSchedule, SolverStep, StepPlan
from guidance.taps.hooks import (
    X0,
    X0_THROUGH_UNET,
    PulledBack,
    capture,
    forward_with_gradient,
    prediction_of,
    replaced,
    runs_compiled,
    uncompiled,
    whole_blocks,
)
from guidance.taps.lockstep import NotInStepError, lockstep, plain, split_parts
from guidance.utils.errors import UserError, is_out_of_memory

#: On a CPU, models with more weights than this per input value run all parts in step (:mod:`guidance.taps.lockstep`):
#: reading the weights once then saves more than the copies cost.  Stable Diffusion at 512 px: up to 5 images at once;
#: the testbed: never (1.32 unguided steps part by part, 1.55 in step, at batch 64).
IN_STEP_WEIGHTS = 10_000


# ---- the mechanism ------------------------------------------------------------------------------------------------
class GuidedDenoiser:
    """Stands in for a denoiser's forward while guidance is applied.

    Args:
        pipe: The pipeline; another one that is running with the same denoiser is asked instead.
        guides: Guides; those with scale 0 are left out.
        handle: Receives what happens.
        parts: Parts of classifier-free guidance in each batch; None asks the running pipeline.
        prompts: Prompt of each sample of the conditional part, for guides that follow it.
        factors: Factor of all shifts for each sample; None: 1.
        observers: See :class:`Observer`.
    """

    def __init__(
        self,
        pipe: Pipeline,
        guides: Sequence[Guide],
        handle: GuidanceHandle,
        *,
        parts: int | None = None,
        prompts: Sequence[str] | None = None,
        factors: Sequence[float] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.pipe, self.handle, self.observers = pipe, handle, observers
        self.given = None if parts is None else Parts.of(parts)
        self.prompts, self.factors = None if prompts is None else tuple(prompts), factors
        self.module: Any = called_denoiser(pipe)
        self.denoiser = denoiser_of(pipe)
        self.groups = group_guides([g for g in guides if g.guidance_scale != 0])
        require_moving(self.groups, pipe.scheduler)
        self.channels = latent_channels(self.denoiser)
        self.num_weights = sum(p.numel() for p in self.denoiser.parameters())
        self.forward: Callable[..., Any] = self.module.forward
        functools.update_wrapper(self, self.forward, updated=())  # keeps the signature
        self.run: Run = NO_RUN
        self._checked = False
        self.moving = contextlib.ExitStack()  # the scheduler's step, replaced

    @contextlib.contextmanager
    def tapped(self) -> Iterator[None]:
        """Prepare the denoiser for taps: freeze it, and run it uncompiled where the taps are."""
        self.forward, self.thread = self.module.forward, threading.get_ident()
        self.signature, self.first = signature_of(self.denoiser)
        self.part_by_part = runs_compiled(self.denoiser) or recomputes(self.denoiser)
        self.swaps_weights = swaps_weights(self.denoiser)
        scored = {tap for group in self.groups for tap in group.taps if tap}
        if self.swaps_weights and scored - {X0} and recomputes(self.denoiser):
            raise UserError(
                "Expected gradient checkpointing, or layers that swap their weights after a forward (group offloading, "
                "layerwise casting), got both, so that the backward would compute with other weights; call the "
                "denoiser's disable_gradient_checkpointing()."
            )
        taps = (scored | {tap for observer in self.observers for tap in observer.taps}) - {X0, X0_THROUGH_UNET}
        with frozen(self.denoiser), uncompiled(self.denoiser, taps):
            yield

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Stand in for the denoiser's forward."""
        with self.tapped():
            first, was_replaced = self.forward, "forward" in vars(self.module)
            self.module.forward = self
            try:
                yield
            finally:
                vars(self.module).pop("forward", None)
                if was_replaced or self.forward is not first:
                    self.module.forward = self.forward

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Stand in for the denoiser's forward, and move latents in the scheduler's step where a guide does."""
        with self.moving, self.standing_in():
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:  # torch.compile(pipe.unet) in the context: leave this to the interpreter
            return torch.compiler.disable(self.guide)(*args, **kwargs)
        return self.guide(*args, **kwargs)

    __call__._torchdynamo_disable = True  # type: ignore[attr-defined]

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """Predict, shifted by what the guides want; arguments and output are the denoiser's."""
        call = self.read(args, kwargs)
        fresh = self.plan(call)
        if not fresh and not self.observers:
            return self._in_its_place(self.forward, *args, **kwargs)
        with advised():
            predictions, output, gradients, features = self.denoise(call, fresh)
            shift = self.shift(call, predictions, fresh, gradients, features)
        prediction = torch.cat(predictions if shift is None else [add_shift(p, shift) for p in predictions])
        return (prediction,) if isinstance(output, tuple) else dataclasses.replace(output, sample=prediction)

    # ---- reading and planning ---------------------------------------------------------------------------------
    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Read a denoiser call: its arguments, its parts, its place in the run."""
        if threading.get_ident() != self.thread:
            raise UserError(
                "Expected calls of the guided denoiser in the thread that applied guidance, got one in another; give "
                "each thread a pipeline with a denoiser of its own, or wait until guidance is off."
            )
        bound = self.signature.bind(None, *args, **kwargs).arguments
        others = {name: value for name, value in bound.items() if name not in ("self", self.first, "timestep")}
        others |= others.pop("kwargs", {})
        x_t, t = bound[self.first], bound["timestep"]
        running = running_pipeline(self.denoiser)
        parts = self.given or parts_of(self.pipe, running, x_t, others)
        run = self._begin((running or self.pipe).scheduler)
        step = run.plan.locate(run.scheduler, t)
        if step.position < run.last.position:  # a loop of the user's own that begins anew with the same timesteps
            run.held.clear()
            self.handle.begin()
        self.handle.steps += int(step.first and step.number != run.last.number)
        run.last, run.push = step, None
        number = parts.number
        if x_t.ndim != 4 or len(x_t) % number:
            raise UserError(
                f"Expected samples (b, c, y, x) in {number} guidance parts, got {tuple(x_t.shape)}; check the "
                "pipeline, or give apply_guidance the right parts."
            )
        whole = Arguments(x_t, t, others)
        each = tuple(cut_part(whole, i, number) for i in range(number)) if number > 1 else (whole,)
        x_t = each[parts.conditional].x_t
        times = torch.as_tensor(each[parts.conditional].t, device=x_t.device).reshape(-1).float().expand(len(x_t))
        sigma, factor = (
            rearrange(v, "b -> b 1 1 1") for v in (run.schedule.alpha_sigma(times)[1], run.schedule.shift_factor(times))
        )
        return Call(whole, each, parts, x_t, times, step, run.schedule, sigma, factor)

    def _begin(self, scheduler: Any) -> Run:
        """Return the state of the run, a new one if the scheduler's timesteps have been set since the last call."""
        run = self.run
        if run.scheduler is not scheduler or run.plan.timesteps is not scheduler.timesteps:
            self.run = run = Run(scheduler, NoiseSchedule.from_scheduler(scheduler), StepPlan.of(scheduler))
            self.handle.begin()
            if any(group.space == "x" for group in self.groups):
                self._move_in(scheduler)
        return run

    def plan(self, call: Call) -> dict[Group, bool]:
        """Return the groups that push in this call, and whether each takes a new gradient.

        Both calls of a second-order step are alike; latents are moved at the first one, from which the step starts.
        """
        due, step = {}, call.step
        fraction = step.number / step.total
        for group in self.groups:
            if group.start <= fraction < group.stop and (step.first or group.space == "eps"):
                held = self.run.held.get(group)
                due[group] = held is None or step.number % group.every == 0 or held.step == step.number
        return due

    # ---- predicting -------------------------------------------------------------------------------------------
    def denoise(
        self, call: Call, due: Mapping[Group, bool]
    ) -> tuple[list[Tensor], Any, dict[Group, PulledBack], dict[str, Tensor]]:
        """Predict, and take the gradients that are due.

        Returns:
            Predictions of the parts, the denoiser's own output, the new gradients, and the features for observers.
        """
        groups = [group for group, fresh in due.items() if fresh and not group.direct]
        taps = [tap for observer in self.observers for tap in observer.taps]
        reading: contextlib.AbstractContextManager[dict[str, Tensor]] = (
            capture(self.denoiser, taps, first=True) if taps else contextlib.nullcontext({})
        )
        with reading as found:
            predictions, output, gradients = self._predict(call, groups)
        return predictions, output, gradients, {tap: self._conditional(call, h) for tap, h in found.items()}

    def _predict(self, call: Call, groups: list[Group]) -> tuple[list[Tensor], Any, dict[Group, PulledBack]]:
        if not groups:
            output = self.call(call.whole, tapped=any(observer.taps for observer in self.observers))
            return list(prediction_of(output).chunk(call.parts.number)), output, {}
        memory_bound = call.x_t.device.type == "cpu" and self.num_weights > IN_STEP_WEIGHTS * call.x_t.numel()
        if memory_bound and not self.part_by_part and len(call.each) > 1:
            with contextlib.suppress(NotInStepError):
                return self._in_step(call, groups)
            self.part_by_part = True
        return self._part_by_part(call, groups)

    def _part_by_part(self, call: Call, groups: list[Group]) -> tuple[list[Tensor], Any, dict[Group, PulledBack]]:
        """Predict the conditional part with gradients, then the others without."""
        c = call.parts.conditional
        output, gradients = self.pull_back(call, groups)
        predictions = [prediction_of(output)]
        if len(call.each) > 1:
            with torch.no_grad():
                rest = [prediction_of(self.call(part)) for i, part in enumerate(call.each) if i != c]
            predictions = [*rest[:c], *predictions, *rest[c:]]
        return predictions, output, gradients

    def _in_step(self, call: Call, groups: list[Group]) -> tuple[list[Tensor], Any, dict[Group, PulledBack]]:
        """Predict all parts in one forward, the conditional one with gradients."""
        c = call.parts.conditional

        def forward(x_t: Tensor) -> Any:
            each = [*call.each[:c], call.each[c]._replace(x_t=x_t), *call.each[c + 1 :]]
            with whole_blocks(self.denoiser):
                return self.call(Arguments(*lockstep([tuple(part) for part in each], c)), tapped=True)

        output, gradients = self.pull_back(call, groups, forward)
        return split_parts(prediction_of(output), c), output, gradients

    def pull_back(
        self, call: Call, groups: list[Group], forward: Callable[[Tensor], Any] | None = None, *, whole: bool = True
    ) -> tuple[Any, dict[Group, PulledBack]]:
        """Take the gradients of groups in one forward.

        Args:
            call: The call.
            groups: Groups with gradients.
            forward: Runs the denoiser, as a function of the conditional part's input; None: this part alone.
            whole: False stops behind the last tap.
        """
        conditional = call.each[call.parts.conditional]
        targets = [functools.partial(self._at_tap, group, call.times) for group in groups]
        taps = list(dict.fromkeys(tap for group in groups for tap in group.taps))
        output, found = forward_with_gradient(
            forward or (lambda x_t: self.call(conditional._replace(x_t=x_t), tapped=True)),
            self.denoiser,
            conditional.x_t,
            taps,
            targets,
            functools.partial(_predict_x0, call.schedule, call.times, self.channels),
            whole=whole,
            swaps_weights=self.swaps_weights,
        )
        if not self._checked:
            self._checked = True
            check_gradient(self, call, found[0])
        return output, dict(zip(groups, found, strict=True))

    def one(self, call: Call, sample: int) -> Arguments:
        """Return the arguments of one sample of the conditional part."""
        return cut_part(call.each[call.parts.conditional], sample, len(call.x_t))

    def call(self, given: Arguments, *, tapped: bool = False) -> Any:
        """Run the denoiser as the pipeline does, or uncompiled, so that hooks see its modules."""
        forward = self.forward if self.module is self.denoiser or not tapped else self.denoiser
        others = {k: list(v) if isinstance(v, list) else v for k, v in given.others.items()}  # T2I residuals are popped
        return self._in_its_place(forward, given.x_t, timestep=given.t, **others)

    def _in_its_place(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a forward that may take off hooks of its own, as offloading does, and with them what stood in for it."""
        before = vars(self.module).get("forward")
        output = forward(*args, **kwargs)
        after = vars(self.module).get("forward")
        if before is not None and after is not before:
            self.forward, self.module.forward = self.module.forward, before
        return output

    def _at_tap(
        self, group: Group, times: Tensor, features: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], Tensor]]:
        """Return the weighted sum of the score gradients of a group's guides at their taps; scores, and its RMS.

        With a portable scale each guide's gradient has RMS 1 *at its tap*, so that two guides that agree add up and two
        that oppose each other cancel; the RMS of the sum is for one guide its scale.
        """
        total: dict[str, Tensor] = {}
        scores: dict[str, Tensor] = {}
        for guide, name, tap in zip(group.guides, group.names, group.taps, strict=True):
            h = as_precise(features[tap].detach()).requires_grad_(True)
            with torch.enable_grad(), torch.autocast(h.device.type, enabled=False):
                score = guide.score(h, times, *self._prompts_for(guide, len(h)))
                (g,) = torch.autograd.grad(score.sum(), h)
            scores[name] = score.detach().float().cpu()
            g = guide.guidance_scale * (unit_rms(g) if group.normalized else g)
            total[tap] = total[tap] + g if tap in total else g
        squares = [rearrange(rms(g).square(), "b ... -> b (...)") for g in total.values()]
        return total, (scores, rearrange(torch.stack(squares).sum(0).sqrt(), "b 1 -> b 1 1 1"))

    def _prompts_for(self, guide: Any, batch: int) -> tuple[Any, ...]:
        """Return the further arguments of a guide's score."""
        if not guide.needs_prompts:
            return ()
        if self.prompts is None or len(self.prompts) != batch:
            raise UserError(
                f"Expected the prompts of the {batch} samples, got {len(self.prompts or ())} prompts; pass texts or "
                "images to the guide, or apply_guidance(pipe, guides, prompts=...) with one per sample."
            )
        return (self.prompts,)

    # ---- shifting ---------------------------------------------------------------------------------------------
    def shift(
        self,
        call: Call,
        predictions: Sequence[Tensor],
        due: Mapping[Group, bool],
        gradients: Mapping[Group, PulledBack],
        features: dict[str, Tensor],
    ) -> Float[Tensor, "b c y x"] | None:
        """Return the shift of every part's prediction in the model's own parameterisation; None without one.

        Args:
            call: The call.
            predictions: Predictions of the parts, the conditional one at its place in ``call.parts``; a guider, which
                knows the unconditional one only after :meth:`denoise`, puts it last.
            due, gradients, features: From :meth:`plan` and :meth:`denoise`.
        """
        prediction = predictions[call.parts.conditional]
        mask = _repainted(call.x_t, self.channels)
        for group, fresh in due.items():
            if fresh:
                total, (scores, size) = (
                    self._directions(group, call, prediction)
                    if group.direct
                    else (gradients[group].gradient, gradients[group].notes)
                )
                self.run.held[group] = _gradient(group, total[:, : self.channels], size, scores, call.step, mask)
        pushes = {group: self.run.held[group] for group in due}
        shift, move = self._combine(call, predictions, pushes, mask)
        self._record(call, due, pushes, shift)
        if self.observers:  # they share what is derived from it
            latents = self._latents(call.x_t), self._latents(prediction)
            seen = Observation(call.x_t, call.times, *latents, features, shift, call.step, call.schedule)
            for observer in self.observers:
                observer(seen)
        if move is not None:
            self.run.push = self._factored(move) / _input_scale(self.run.scheduler, call.times[0])
        if shift is None:
            return None
        self.handle.pushes += 1
        return self._factored(shift) * call.factor.to(shift)

    def _combine(
        self, call: Call, predictions: Sequence[Tensor], pushes: Mapping[Group, Gradient], mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the shift of eps and that of the latents, both at factor 1."""
        shift = move = None
        reference = None
        for group, gradient in pushes.items():
            if group.space == "x":
                move = gradient.direction if move is None else move + gradient.direction
                continue
            if group.normalized:
                reference = self._reference(call, predictions, mask) if reference is None else reference
                wanted = -gradient.size * reference * gradient.direction
            else:
                wanted = -call.sigma.to(gradient.direction) * gradient.direction
            shift = wanted if shift is None else shift + wanted
        return shift, move

    def _reference(self, call: Call, predictions: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """Return the RMS per sample of the difference that classifier-free guidance extrapolates, in eps units.

        Without one, or where it is 0 (a prompt equal to the negative prompt), it is the RMS of eps itself.
        """
        c = call.parts.conditional
        cond, *others = (self._latents(p) for p in (predictions[c], *predictions[:c], *predictions[c + 1 :]))
        difference = rms(cond - others[-1], mask) if others else torch.zeros_like(rms(cond))
        same = difference <= 1e-4 * rms(cond, mask)
        if not same.any():
            return difference / call.factor.abs().to(difference)
        if others:
            warnings.warn(
                "The prompt equals the negative prompt, so that normalize='cfg' has no difference to scale by; the "
                "scale refers to the noise prediction itself, as without classifier-free guidance.",
                stacklevel=2,
            )
        eps = rms(call.schedule.to_eps(cond, self._latents(call.x_t), call.times), mask)
        return torch.where(same, eps, difference / call.factor.abs().to(difference))

    def _directions(
        self, group: Group, call: Call, prediction: Tensor
    ) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor]]:
        """Return the weighted sum of the directions of guides without a gradient, no scores, and its RMS."""
        x, p, t = self._latents(call.x_t), self._latents(prediction), call.times
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            inputs = as_precise(call.x_t), call.schedule.to_eps(p, x, t), call.schedule.to_x0(p, x, t), t
            directions = [g.guidance_scale * unit_rms(g.direction(*inputs)[:, : self.channels]) for g in group.guides]
        total = torch.stack(directions).sum(0)
        return total, ({}, rms(total))

    def _latents(self, x: Tensor) -> Tensor:
        """Return the latents of an input or a prediction: without masks and learned variances, float32 or float64."""
        return as_precise(x[:, : self.channels])

    def _factored(self, shift: Tensor) -> Tensor:
        """Return a shift times the factors of the samples."""
        if self.factors is None:
            return shift
        return shift * rearrange(torch.tensor(self.factors).to(shift), "b -> b 1 1 1")

    def _record(
        self, call: Call, due: Mapping[Group, bool], pushes: Mapping[Group, Gradient], shift: Tensor | None
    ) -> None:
        """Record what happened in a call in which a gradient was taken."""
        taken = [pushes[group] for group, fresh in due.items() if fresh]
        if not taken:
            return
        finite = functools.reduce(torch.logical_and, (g.finite for g in taken))
        scores = {name: score for g in taken for name, score in g.scores.items()}
        size = None if shift is None else rms(shift).flatten().float().cpu()
        record = StepRecord(float(call.times[0]), scores, taken[0].norm, size, finite, call.step.number)
        self.handle.records.append(record)
        self.handle.gradients += 1
        self.handle.skipped += int((~finite).sum())

    def _conditional(self, call: Call, h: Tensor) -> Tensor:
        """Return the conditional part of features, in float32: all of them where the part ran by itself or in step."""
        h, number = plain(h), call.parts.number
        whole = number > 1 and len(h) == number * len(call.x_t)
        part = h.chunk(number)[call.parts.conditional] if whole else h
        return as_precise(part.detach()).contiguous()

    # ---- x-space ----------------------------------------------------------------------------------------------
    def push(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the shift of the latents at a denoiser call, of which only the encoder half runs; None without one."""
        with self.moving:  # here the latents are moved by the caller
            call = self.read(args, kwargs)
        due = self.plan(call)
        groups = [group for group, fresh in due.items() if fresh]
        gradients = self.pull_back(call, groups, whole=False)[1] if groups else {}
        self.shift(call, [call.x_t], due, gradients, {})
        push, self.run.push = self.run.push, None
        self.handle.pushes += int(push is not None)
        return push

    def _move_in(self, scheduler: Any) -> None:
        """Let a scheduler's step move the latents first, by the push of the denoiser call before it."""
        require_moving(self.groups, scheduler)
        step = scheduler.step

        @functools.wraps(step)  # pipelines inspect its signature to see whether it takes a generator
        def moving_step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            return step(model_output, timestep, self.moved(sample), *args, **kwargs)

        self.moving.close()
        self.moving.enter_context(replaced(scheduler, "step", moving_step))

    def moved(self, x: Tensor) -> Tensor:
        """Move latents by the push of the last denoiser call, once."""
        if self.run.push is None:
            return x
        moved = x + self.run.push.to(x)
        self.run.push = None
        self.handle.pushes += 1
        return moved


def require_moving(guides: Iterable[Guide | Group], scheduler: Any) -> None:
    """Refuse a scheduler whose corrector would undo what guides with ``space="x"`` do to the latents."""
    if hasattr(scheduler, "last_sample") and any(guide.space == "x" for guide in guides):
        raise UserError(
            f"Expected a scheduler that goes on from the latents it is given, got {type(scheduler).__name__}, whose "
            "corrector starts from its own; use space='eps', or scheduler='dpm++'."
        )


# ---- helpers ------------------------------------------------------------------------------------------------------
def group_guides(guides: Sequence[Guide]) -> list[Group]:
    """Group guides that share a backward pass, in a stable order."""

    def kind(g: Guide) -> tuple[bool, bool, str, float, float, int]:
        return isinstance(g, DirectGuide), g.normalize is not None, g.space, *g.interval, g.every

    groups = []
    for key, found in itertools.groupby(sorted(guides, key=kind), kind):
        alike = tuple(found)
        taps = tuple("" if isinstance(g, DirectGuide) else g.tap for g in alike)  # type: ignore[attr-defined]
        groups.append(Group(*key, alike, tuple(g.name for g in alike), taps))
    return groups


def rms(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Root mean square per sample, of the masked places only, kept broadcastable: (b, ...) -> (b, 1, ...)."""
    axes = tuple(range(1, x.ndim))
    if mask is None:
        return x.square().mean(dim=axes, keepdim=True).sqrt()
    places = mask.expand_as(x).sum(dim=axes, keepdim=True).clamp(min=1)
    return ((x.square() * mask).sum(dim=axes, keepdim=True) / places).sqrt()


def unit_rms(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scale each sample to RMS 1; zeros stay zeros."""
    size = rms(x, mask)
    return x / torch.where(size > 0, size, 1.0)


def as_precise(x: Tensor) -> Tensor:
    """Convert to float32, unless the tensor is float64."""
    return x if x.dtype == torch.float64 else x.float()


def cut_part(given: Arguments, part: int, parts: int) -> Arguments:
    """Return one of equal parts of a denoiser call."""
    return Arguments(*_cut(tuple(given), part, parts, len(given.x_t)))


def _cut(value: Any, part: int, parts: int, batch: int) -> Any:
    """Cut one part out of all tensors that run along the batch."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
        return value.chunk(parts)[part]
    if isinstance(value, dict):
        return {k: _cut(v, part, parts, batch) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cut(v, part, parts, batch) for v in value)
    return value


def add_shift(prediction: Tensor, shift: Float[Tensor, "b c y x"]) -> Tensor:
    """Add a shift to the first channels of a prediction (the others are learned variances)."""
    out = prediction.clone()
    out[:, : shift.shape[1]] += shift.to(prediction.dtype)
    return out


def _gradient(
    group: Group, total: Tensor, size: Tensor, scores: dict[str, Tensor], step: SolverStep, mask: Tensor | None
) -> Gradient:
    """Return a group's gradient: 0 where it is not finite or not repainted, of RMS 1 if the scale is portable."""
    finite = total.flatten(1).isfinite().all(1)
    if not finite.all():
        keep = rearrange(finite, "b -> b 1 1 1")
        total, size = torch.where(keep, total, 0.0), torch.where(keep, size, 0.0)
    total = total if mask is None else total * mask
    norm = total.flatten(1).norm(dim=1).float().cpu()
    return Gradient(unit_rms(total, mask) if group.normalized else total, size, norm, finite.cpu(), scores, step.number)


def _predict_x0(
    schedule: NoiseSchedule, t: Tensor, channels: int, output: Any, x_t: Tensor, through: bool
) -> Float[Tensor, "b c y x"]:
    """Predict x0 of the conditional part; if not ``through``, with eps held fixed, so that dx0/dx = 1/alpha."""
    x, prediction = (as_precise(v[:, :channels]) for v in (x_t, plain(prediction_of(output))))
    if through:
        return schedule.to_x0(prediction, x, t)
    alpha, sigma = (rearrange(v.to(x.dtype), "b -> b 1 1 1") for v in schedule.alpha_sigma(t))
    eps = schedule.to_eps(prediction.detach(), x.detach(), t)
    return (x - sigma * eps) / alpha.clamp(min=1e-3) * schedule.data_scale


def _repainted(x_t: Tensor, channels: int) -> Float[Tensor, "b 1 y x"] | None:
    """Return the mask of an inpainting denoiser's input [latents, mask, masked image]; None for other denoisers."""
    return as_precise(x_t[:, channels : channels + 1]) if x_t.shape[1] == 2 * channels + 1 else None


def _input_scale(scheduler: Any, t: Tensor) -> float | Tensor:
    """Return what the scheduler multiplies latents by before they are the denoiser's input."""
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    return scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t.cpu()).float().item()


@contextlib.contextmanager
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
