"""One guided denoiser call: split the batch, score at the tap, shift every part by the same amount."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from guidance.errors import UserError
from guidance.guides.base import is_direct, rms, unit_rms
from guidance.lockstep import lockstep, plain, split_parts
from guidance.pipelines import latent_channels
from guidance.taps import forward_with_gradient, prediction_of

#: On a CPU, models with more weights than this per number of their input run all parts in step
#: (:mod:`guidance.lockstep`): reading weights once is then worth more than the copies it takes.  Stable Diffusion at
#: 512 px: up to 5 images at once; the testbed: never (1.32 unguided steps part by part, 1.55 in step, at batch 64).
IN_STEP_WEIGHTS = 10_000


@dataclasses.dataclass
class StepRecord:
    """What guidance did in one denoiser call.

    Attributes:
        t: Timestep.
        scores: Guide name -> score of each sample, (b,), float32 on the CPU.
        grad_norm: L2 norm of each sample's pulled-back gradient, scales included, (b,); of the first group of
            guides when there are several.
        shift_rms: RMS of each sample's shift in eps units, (b,).
        skipped: Samples whose gradient was not finite and that were left unguided in this step.
    """

    t: float
    scores: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    grad_norm: Tensor | None = None
    shift_rms: Tensor | None = None
    skipped: int = 0


@dataclasses.dataclass
class Group:
    """Guides that share one backward pass, or that all need none: same normalisation, space and interval."""

    guides: list[Any]  # of Guide
    direction: Tensor | None = None  # kept for `every`: the last shift (raw) or direction (normalised)
    size: Tensor | float = 1.0

    @property
    def direct(self) -> bool:
        """Whether its guides give directions of the latents by themselves, without a gradient."""
        return is_direct(self.guides[0])


@dataclasses.dataclass
class GuidedStep:
    """One guided denoiser call."""

    owner: Any  # the wrapper in guidance.apply: unet, pipe, original forward, handle
    groups: list[Group]
    sample: Tensor
    timestep: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int
    parts: int

    def run(self) -> Any:
        batch = self.sample.shape[0]
        if batch % self.parts:
            raise UserError(
                f"Expected a batch of {self.parts} guidance parts, got {batch} samples; check the pipeline."
            )
        due = [g for g in self.groups if g.direction is None or self.index % g.guides[0].strength.every == 0]
        record = StepRecord(self.owner.last_t)
        if due:
            self.owner.handle.records.append(record)
        predictions, gradients, output = self._denoise([g for g in due if not g.direct], record)
        t = torch.as_tensor(self.timestep, device=self.sample.device).reshape(-1)[0]
        _, sigma = self.owner.schedule.alpha_sigma(t)
        reference = self._reference(predictions, t)
        shift: Tensor | float = 0.0
        for group in self.groups:
            if group in due:
                push = self._direct(group, predictions) if group.direct else gradients.pop(0)
                self._renew(group, push, record)
            shift = shift + self._shift(group, reference, sigma)
        if isinstance(shift, Tensor):
            record.shift_rms = rms(shift).flatten().cpu()
            shift = shift * self.owner.schedule.shift_factor(t).to(shift.dtype)
            predictions = [_add(p, shift) for p in predictions]
        whole = torch.cat(predictions)
        return (whole,) if isinstance(output, tuple) else dataclasses.replace(output, sample=whole)

    # ---- parts of the batch -----------------------------------------------------------------------------------
    @property
    def _conditional(self) -> int:
        """Index of the fully conditional part: last of [uncond, cond], first of InstructPix2Pix's three."""
        return 0 if self.parts == 3 else self.parts - 1

    @functools.cached_property
    def _calls(self) -> list[tuple[Tensor, Any, tuple[Any, ...], dict[str, Any]]]:
        """Each part's own sample, timestep, args and kwargs."""
        whole = self.sample, self.timestep, self.args, self.kwargs
        return [_cut(whole, p, self.parts, self.sample.shape[0]) for p in range(self.parts)]

    @property
    def _x(self) -> Float[Tensor, "b c y x"]:
        """The conditional part's samples."""
        return self._calls[self._conditional][0]

    @functools.cached_property
    def _times(self) -> Float[Tensor, " b"]:
        """Timesteps of the conditional part's samples."""
        t = torch.as_tensor(self._calls[self._conditional][1], device=self._x.device)
        return t.reshape(-1).float().expand(self._x.shape[0])

    def _unconditional(self) -> list[int]:
        return [p for p in range(self.parts) if p != self._conditional]

    def _denoise(self, due: list[Group], record: StepRecord) -> tuple[list[Tensor], list[Tensor], Any]:
        """The prediction of every part, one gradient a group that is due, and the denoiser's own output."""
        call, c = self.owner.original, self._conditional
        if not due:
            output = call(self.sample, self.timestep, *self.args, **self.kwargs)
            return list(prediction_of(output).chunk(self.parts)), [], output
        calls, x = self._calls, self._x
        targets = [_target(group, self._times, record) for group in due]
        taps = list(dict.fromkeys(g.tap for group in due for g in group.guides))
        in_step = x.device.type == "cpu" and self.owner.num_weights > IN_STEP_WEIGHTS * x.numel()

        def forward(leaf: Tensor) -> Any:
            own = (leaf, *calls[c][1:])
            x, t, args, kwargs = lockstep([*calls[:c], own, *calls[c + 1 :]], c) if in_step else own
            return call(x, t, *args, **kwargs)

        unet = self.owner.unet
        output, gradients = forward_with_gradient(forward, unet, x, taps, targets, self._predict_x0)
        predictions = split_parts(prediction_of(output), c)
        for p in self._unconditional() if len(predictions) < self.parts else ():
            x, t, args, kwargs = calls[p]
            with torch.no_grad():
                predictions.insert(p, prediction_of(call(x, t, *args, **kwargs)))
        return predictions, gradients, output

    def _predict_x0(self, output: Any, x: Tensor, through: bool) -> Tensor:
        """x0 of the conditional part; not ``through``: with eps held fixed, so that dx0/dx = 1/alpha."""
        schedule, t = self.owner.schedule, self._times
        x, prediction = (_precise(v[:, : self._channels]) for v in (x, plain(prediction_of(output))))
        if through:
            return schedule.to_x0(prediction, x, t)
        alpha, sigma = (rearrange(v.to(x.dtype), "b -> b 1 1 1") for v in schedule.alpha_sigma(t))
        eps = schedule.to_eps(prediction.detach(), x.detach(), t)
        return (x - sigma * eps) / alpha.clamp(min=1e-3)

    @property
    def _channels(self) -> int:
        return latent_channels(self.owner.unet)

    def _reference(self, predictions: list[Tensor], t: Tensor) -> Tensor:
        """Per-sample RMS of what classifier-free guidance works with, in eps units."""
        schedule, cond = self.owner.schedule, _precise(predictions[self._conditional])
        others = self._unconditional()
        if others:
            difference = cond - _precise(predictions[others[-1]])
            return rms(difference) / schedule.shift_factor(t).abs().to(difference.dtype)
        return rms(schedule.to_eps(cond, _precise(self._x[:, : cond.shape[1]]), t))

    def _direct(self, group: Group, predictions: list[Tensor]) -> Tensor:
        """The weighted sum of the directions that guides give without a gradient."""
        schedule, t = self.owner.schedule, self._times
        x, prediction = (_precise(v[:, : self._channels]) for v in (self._x, predictions[self._conditional]))
        seen = x, schedule.to_eps(prediction, x, t), schedule.to_x0(prediction, x, t), t
        with torch.no_grad():
            pushes = [g.strength.guidance_scale * unit_rms(g.direction(*seen)) for g in group.guides]
        total = torch.stack(pushes).sum(0)
        group.size = rms(total)
        return total

    # ---- the shift --------------------------------------------------------------------------------------------
    def _renew(self, group: Group, gradient: Tensor, record: StepRecord) -> None:
        gradient = gradient[:, : self._channels]
        finite = gradient.flatten(1).isfinite().all(1)
        if not finite.all():
            record.skipped = int((~finite).sum())
            self.owner.handle.skipped += record.skipped
            keep = rearrange(finite, "b -> b 1 1 1")
            gradient = torch.where(keep, gradient, 0.0)
            group.size = torch.where(keep, group.size, 0.0)
        if record.grad_norm is None:
            record.grad_norm = gradient.flatten(1).norm(dim=1).float().cpu()
        group.direction = unit_rms(gradient) if group.guides[0].strength.normalize else gradient

    def _shift(self, group: Group, reference: Tensor, sigma: Tensor) -> Tensor | float:
        """The group's shift of eps (to be added), or 0 when it moves the latents instead."""
        assert group.direction is not None
        if group.guides[0].strength.space == "x":
            owner = self.owner
            owner.x_shift = group.direction if owner.x_shift is None else owner.x_shift + group.direction
            owner.x_input = self._x[:, : group.direction.shape[1]].detach()
            return 0.0
        if group.guides[0].strength.normalize:
            return -group.size * reference * group.direction
        return -sigma.to(group.direction.dtype) * group.direction


def _cut(value: Any, part: int, parts: int, batch: int) -> Any:
    """Cut one part out of everything that runs along the batch."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
        return value.chunk(parts)[part]
    if isinstance(value, dict):
        return {k: _cut(v, part, parts, batch) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cut(v, part, parts, batch) for v in value)
    return value


def _precise(x: Tensor) -> Tensor:
    """At least single precision: the pipeline's own if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _add(prediction: Tensor, shift: Float[Tensor, "b c y x"]) -> Tensor:
    """Add a shift to the first channels of a prediction (others: learned variances)."""
    out = prediction.clone()
    channels = shift.shape[1]
    out[:, :channels] += shift.to(prediction.dtype)
    return out


def _target(
    group: Group, times: Tensor, record: StepRecord
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """What to pull back for a group: the weighted sum of its guides' score gradients at their taps.

    With a portable scale each guide's gradient counts with RMS 1 *at its tap*, so two guides that agree add up and
    two that oppose cancel; ``group.size`` is the RMS of the sum, for one guide its scale.
    """

    def gradient(features: dict[str, Tensor]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        sizes: dict[str, Tensor] = {}
        for guide in group.guides:
            leaf = features[guide.tap].detach()
            leaf = _precise(leaf).requires_grad_(True)
            with torch.enable_grad():
                score = guide.score(leaf, times)
                (g,) = torch.autograd.grad(score.sum(), leaf)
            record.scores[guide.name] = score.detach().float().cpu()
            g = guide.strength.guidance_scale * (unit_rms(g) if guide.strength.normalize else g)
            total[guide.tap] = total[guide.tap] + g if guide.tap in total else g
        sizes = {tap: rms(g).square() for tap, g in total.items()}
        group.size = torch.stack([rearrange(s, "b ... -> b (...)") for s in sizes.values()]).sum(0).sqrt()
        group.size = rearrange(group.size, "b 1 -> b 1 1 1")
        return total

    return gradient
