"""One guided denoiser call: split the batch, score at the tap, shift every part by the same amount."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from guidance.guides.base import is_direct, rms, scale_for, unit_rms
from guidance.models.denoiser import latent_channels
from guidance.models.layouts import Parts
from guidance.taps.hooks import forward_with_gradient, prediction_of, whole_blocks
from guidance.taps.lockstep import NotInStepError, lockstep, plain, split_parts
from guidance.utils.errors import UserError

#: On a CPU, models with more weights than this per number of their input run all parts in step
#: (:mod:`guidance.taps.lockstep`): reading weights once is then worth more than the copies it takes.  Stable Diffusion
#: at 512 px: up to 5 images at once; the testbed: never (1.32 unguided steps part by part, 1.55 in step, at batch 64).
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


class DenoiserCall(NamedTuple):
    """Arguments of one denoiser call."""

    sample: Float[Tensor, "pb c y x"]
    timestep: Any
    others: dict[str, Any]


@dataclasses.dataclass
class GuidedStep:
    """One guided denoiser call: :meth:`denoise`, then :meth:`shift` what it predicts, or both by :meth:`run`."""

    owner: Any  # guidance.apply.forward.GuidedForward: denoiser, schedule, call, handle
    groups: list[Group]
    whole: DenoiserCall
    index: int
    layout: Parts

    def __post_init__(self) -> None:
        batch, number = len(self.whole.sample), self.layout.number
        if batch % number or self.whole.sample.ndim != 4:
            raise UserError(
                f"Expected samples (b, c, y, x) in {number} guidance parts, got {tuple(self.whole.sample.shape)}; "
                "check the pipeline."
            )
        self.record = StepRecord(self.owner.last_t)
        self.due = [
            g for g in self.groups if g.direction is None or self.index % g.guides[0].strength.every == 0
        ]
        self.gradients: list[Tensor] = []

    def run(self) -> Any:
        """The denoiser's output with every part shifted by the same amount."""
        predictions, output = self.denoise()
        shift = self.shift(predictions)
        if shift is not None:
            predictions = [add_shift(p, shift) for p in predictions]
        whole = torch.cat(predictions)
        return (whole,) if isinstance(output, tuple) else dataclasses.replace(output, sample=whole)

    def shift(self, predictions: Sequence[Tensor]) -> Float[Tensor, "b c y x"] | None:
        """What to add to every part's prediction, in the model's own parameterisation.

        Args:
            predictions: Of the parts, the conditional one where ``layout`` says; a guider knows the unconditional one
                only after :meth:`denoise`, and then puts it last.

        Returns:
            None if latents are moved instead.
        """
        t = torch.as_tensor(self.whole.timestep, device=self.whole.sample.device).reshape(-1)[0]
        _, sigma = self.owner.schedule.alpha_sigma(t)
        reference = self._reference(predictions, t)
        shift: Tensor | float = 0.0
        for group in self.groups:
            if group in self.due:
                push = self._direct(group, predictions) if group.direct else self.gradients.pop(0)
                self._renew(group, push)
            shift = shift + self._shift(group, reference, sigma)
        if not isinstance(shift, Tensor):
            return None
        self.record.shift_rms = rms(shift).flatten().cpu()
        return shift * self.owner.schedule.shift_factor(t).to(shift.dtype)

    # ---- parts of the batch -----------------------------------------------------------------------------------
    @functools.cached_property
    def _calls(self) -> list[DenoiserCall]:
        """Each part's own arguments."""
        number, batch = self.layout.number, len(self.whole.sample)
        return [DenoiserCall(*_cut(tuple(self.whole), p, number, batch)) for p in range(number)]

    @property
    def _x(self) -> Float[Tensor, "b c y x"]:
        """The conditional part's samples."""
        return self._calls[self.layout.conditional].sample

    @functools.cached_property
    def _times(self) -> Float[Tensor, " b"]:
        """Timesteps of the conditional part's samples."""
        t = torch.as_tensor(self._calls[self.layout.conditional].timestep, device=self._x.device)
        return t.reshape(-1).float().expand(self._x.shape[0])

    def denoise(self) -> tuple[list[Tensor], Any]:
        """The prediction of every part, and the denoiser's own output; takes the gradients that are due."""
        if self.due:
            self.owner.handle.records.append(self.record)
        due = [g for g in self.due if not g.direct]
        if not due:
            output = self.owner.call(self.whole)
            return list(prediction_of(output).chunk(self.layout.number)), output
        few = self._x.device.type == "cpu" and self.owner.num_weights > IN_STEP_WEIGHTS * self._x.numel()
        if few and not self.owner.part_by_part:
            with contextlib.suppress(NotInStepError):
                return self._with_gradients(due, in_step=True)
            self.owner.part_by_part = True
        return self._with_gradients(due, in_step=False)

    def move(self) -> None:
        """Leave an x-space shift with the owner, by the encoder half of the denoiser alone."""
        if self.due:
            self.owner.handle.records.append(self.record)
            self._pull_back(self.due, in_step=False, whole=False)
        for group in self.groups:
            if group in self.due:
                self._renew(group, self.gradients.pop(0))
            self._move(group)

    def _with_gradients(self, due: list[Group], in_step: bool) -> tuple[list[Tensor], Any]:
        calls, c = self._calls, self.layout.conditional
        output = self._pull_back(due, in_step)
        predictions = split_parts(prediction_of(output), c)
        if len(predictions) < self.layout.number:
            with torch.no_grad():
                rest = [prediction_of(self.owner.call(part)) for i, part in enumerate(calls) if i != c]
            predictions = [*rest[:c], *predictions, *rest[c:]]
        return predictions, output

    def _pull_back(self, due: list[Group], in_step: bool, whole: bool = True) -> Any:
        """Take the gradients that are due in one forward, and return its output."""
        call, calls, c = self.owner.call_tapped, self._calls, self.layout.conditional
        targets = [_target(group, self._times, self.record) for group in due]
        taps = list(dict.fromkeys(g.tap for group in due for g in group.guides))

        def forward(leaf: Tensor) -> Any:
            own = calls[c]._replace(sample=leaf)
            if not in_step:
                return call(own)
            parts = [tuple(part) for part in (*calls[:c], own, *calls[c + 1 :])]
            with whole_blocks(self.owner.denoiser):
                return call(DenoiserCall(*lockstep(parts, c)))

        output, self.gradients = forward_with_gradient(
            forward, self.owner.denoiser, self._x, taps, targets, self._predict_x0, whole=whole
        )
        return output

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
        return latent_channels(self.owner.denoiser)

    def _reference(self, predictions: Sequence[Tensor], t: Tensor) -> Tensor:
        """Per-sample RMS of what classifier-free guidance works with, in eps units."""
        schedule, c = self.owner.schedule, self.layout.conditional
        latents = [_precise(p[:, : self._channels]) for p in predictions]  # without learned variances
        others = [p for i, p in enumerate(latents) if i != c]
        if others:
            difference = latents[c] - others[-1]
            return rms(difference) / schedule.shift_factor(t).abs().to(difference.dtype)
        return rms(schedule.to_eps(latents[c], _precise(self._x[:, : self._channels]), t))

    def _direct(self, group: Group, predictions: Sequence[Tensor]) -> Tensor:
        """The weighted sum of the directions that guides give without a gradient."""
        schedule, t, own = self.owner.schedule, self._times, predictions[self.layout.conditional]
        x, prediction = (_precise(v[:, : self._channels]) for v in (self._x, own))
        seen = x, schedule.to_eps(prediction, x, t), schedule.to_x0(prediction, x, t), t
        with torch.no_grad():
            pushes = [scale_for(g, x) * unit_rms(g.direction(*seen)) for g in group.guides]
        total = torch.stack(pushes).sum(0)
        group.size = rms(total)
        return total

    # ---- the shift --------------------------------------------------------------------------------------------
    def _renew(self, group: Group, gradient: Tensor) -> None:
        record = self.record
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
            self._move(group)
            return 0.0
        if group.guides[0].strength.normalize:
            return -group.size * reference * group.direction
        return -sigma.to(group.direction.dtype) * group.direction

    def _move(self, group: Group) -> None:
        """Leave the group's shift of the latents with the owner."""
        assert group.direction is not None
        owner = self.owner
        owner.x_shift = group.direction if owner.x_shift is None else owner.x_shift + group.direction
        owner.x_input = self._x[:, : group.direction.shape[1]].detach()


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


def add_shift(prediction: Tensor, shift: Float[Tensor, "b c y x"]) -> Tensor:
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
            g = scale_for(guide, g) * (unit_rms(g) if guide.strength.normalize else g)
            total[guide.tap] = total[guide.tap] + g if guide.tap in total else g
        sizes = {tap: rms(g).square() for tap, g in total.items()}
        group.size = torch.stack([rearrange(s, "b ... -> b (...)") for s in sizes.values()]).sum(0).sqrt()
        group.size = rearrange(group.size, "b 1 -> b 1 1 1")
        return total

    return gradient
