"""One guided denoiser call: split the batch, score at the tap, shift every part by the same amount."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from guidance.guides.base import Strength, is_direct, rms, scale_for, unit_rms
from guidance.models.denoiser import latent_channels
from guidance.models.layouts import Parts
from guidance.taps.hooks import forward_with_gradient, prediction_of, whole_blocks
from guidance.taps.lockstep import NotInStepError, lockstep, plain, split_parts
from guidance.utils.errors import UserError

#: On a CPU, models with more weights than this per input value run all parts in step (:mod:`guidance.taps.lockstep`):
#: reading the weights once then saves more than the copies cost.  Stable Diffusion at 512 px: up to 5 images at once;
#: the testbed: never (1.32 unguided steps part by part, 1.55 in step, at batch 64).
IN_STEP_WEIGHTS = 10_000


@dataclasses.dataclass
class StepRecord:
    """Scores, gradients and shifts of one denoiser call.

    Attributes:
        t: Timestep.
        scores: Guide name -> score of each sample, (b,), float32 on the CPU.
        grad_norm: L2 norm of each sample's gradient with respect to the input, scales included, (b,); of the first
            group of guides if there are several.
        shift_rms: RMS of each sample's shift in eps units, (b,).
        skipped: Number of samples left unguided in this step because their gradient was not finite.
    """

    t: float
    scores: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    grad_norm: Tensor | None = None
    shift_rms: Tensor | None = None
    skipped: int = 0


@dataclasses.dataclass
class Group:
    """Guides that share one backward pass, or need none: same normalisation, space and interval."""

    guides: list[Any]  # of Guide
    direction: Tensor | None = None  # reused between gradients: the last shift (raw) or direction (normalised)
    size: Tensor | float = 1.0

    @property
    def strength(self) -> Strength:
        """Strength of the first guide; those of the others differ in the scale only."""
        return self.guides[0].strength

    @property
    def direct(self) -> bool:
        """Tell whether the guides return directions of the latents without a gradient."""
        return is_direct(self.guides[0])


class DenoiserCall(NamedTuple):
    """Arguments of one denoiser call."""

    sample: Float[Tensor, "pb c y x"]
    timestep: Any
    others: dict[str, Any]


@dataclasses.dataclass
class GuidedStep:
    """One guided denoiser call: :meth:`denoise`, then :meth:`shift` what it predicts, or both by :meth:`run`."""

    forward: Any  # guidance.apply.forward.GuidedForward: denoiser, schedule, call, handle
    groups: list[Group]
    call: DenoiserCall
    index: int
    layout: Parts

    def __post_init__(self) -> None:
        batch, number = len(self.call.sample), self.layout.number
        if batch % number or self.call.sample.ndim != 4:
            raise UserError(
                f"Expected samples (b, c, y, x) in {number} guidance parts, got {tuple(self.call.sample.shape)}; "
                "check the pipeline."
            )
        self.record = StepRecord(self.forward.last_t)
        self.fresh = [g for g in self.groups if g.direction is None or self.index % g.strength.every == 0]
        self.gradients: list[Tensor] = []

    def run(self) -> Any:
        """Return the denoiser's output with every part shifted by the same amount."""
        predictions, output = self.denoise()
        shift = self.shift(predictions)
        if shift is not None:
            predictions = [add_shift(p, shift) for p in predictions]
        prediction = torch.cat(predictions)
        return (prediction,) if isinstance(output, tuple) else dataclasses.replace(output, sample=prediction)

    def shift(self, predictions: Sequence[Tensor]) -> Float[Tensor, "b c y x"] | None:
        """Return the shift of every part's prediction, in the model's own parameterisation.

        Args:
            predictions: Predictions of the parts, the conditional one at its place in ``layout``; a guider, which knows
                the unconditional one only after :meth:`denoise`, puts it last.

        Returns:
            None if the latents are moved instead.
        """
        t = torch.as_tensor(self.call.timestep, device=self.call.sample.device).reshape(-1)[0]
        _, sigma = self.forward.schedule.alpha_sigma(t)
        reference = self._reference(predictions, t)
        shift: Tensor | float = 0.0
        for group in self.groups:
            if group in self.fresh:
                direct = group.direct
                self._renew(group, self._direct(group, predictions) if direct else self.gradients.pop(0))
            shift = shift + self._shift(group, reference, sigma)
        if not isinstance(shift, Tensor):
            return None
        self.record.shift_rms = rms(shift).flatten().cpu()
        return shift * self.forward.schedule.shift_factor(t).to(shift.dtype)

    # ---- parts of the batch -----------------------------------------------------------------------------------
    @functools.cached_property
    def _calls(self) -> list[DenoiserCall]:
        """Arguments of each part."""
        number, batch = self.layout.number, len(self.call.sample)
        return [DenoiserCall(*_cut(tuple(self.call), p, number, batch)) for p in range(number)]

    @property
    def _x(self) -> Float[Tensor, "b c y x"]:
        """Samples of the conditional part."""
        return self._calls[self.layout.conditional].sample

    @functools.cached_property
    def _times(self) -> Float[Tensor, " b"]:
        """Timesteps of the conditional part's samples."""
        t = torch.as_tensor(self._calls[self.layout.conditional].timestep, device=self._x.device)
        return t.reshape(-1).float().expand(self._x.shape[0])

    def denoise(self) -> tuple[list[Tensor], Any]:
        """Return the prediction of every part and the denoiser's own output; take new gradients where needed."""
        if self.fresh:
            self.forward.handle.records.append(self.record)
        groups = [g for g in self.fresh if not g.direct]
        if not groups:
            output = self.forward.call(self.call)
            return list(prediction_of(output).chunk(self.layout.number)), output
        on_cpu = self._x.device.type == "cpu"
        memory_bound = on_cpu and self.forward.num_weights > IN_STEP_WEIGHTS * self._x.numel()
        if memory_bound and not self.forward.part_by_part:
            with contextlib.suppress(NotInStepError):
                return self._with_gradients(groups, in_step=True)
            self.forward.part_by_part = True
        return self._with_gradients(groups, in_step=False)

    def move(self) -> None:
        """Set the pending x-space shift, with a forward pass of the encoder half only."""
        if self.fresh:
            self.forward.handle.records.append(self.record)
            self._pull_back(self.fresh, in_step=False, whole=False)
        for group in self.groups:
            if group in self.fresh:
                self._renew(group, self.gradients.pop(0))
            self._move(group)

    def _with_gradients(self, groups: list[Group], in_step: bool) -> tuple[list[Tensor], Any]:
        calls, c = self._calls, self.layout.conditional
        output = self._pull_back(groups, in_step)
        predictions = split_parts(prediction_of(output), c)
        if len(predictions) < self.layout.number:
            with torch.no_grad():
                rest = [prediction_of(self.forward.call(part)) for i, part in enumerate(calls) if i != c]
            predictions = [*rest[:c], *predictions, *rest[c:]]
        return predictions, output

    def _pull_back(self, groups: list[Group], in_step: bool, whole: bool = True) -> Any:
        """Take the gradients of groups in one forward pass, and return its output."""
        run, calls, c = self.forward.call_tapped, self._calls, self.layout.conditional
        targets = [functools.partial(_tap_gradients, group, self._times, self.record) for group in groups]
        taps = list(dict.fromkeys(g.tap for group in groups for g in group.guides))

        def forward(x: Tensor) -> Any:
            conditional = calls[c]._replace(sample=x)
            if not in_step:
                return run(conditional)
            parts = [tuple(part) for part in (*calls[:c], conditional, *calls[c + 1 :])]
            with whole_blocks(self.forward.denoiser):
                return run(DenoiserCall(*lockstep(parts, c)))

        output, self.gradients = forward_with_gradient(
            forward, self.forward.denoiser, self._x, taps, targets, self._predict_x0, whole=whole
        )
        return output

    def _predict_x0(self, output: Any, x: Tensor, through: bool) -> Tensor:
        """Predict x0 of the conditional part; if not ``through``, with eps held fixed, so that dx0/dx = 1/alpha."""
        schedule, t = self.forward.schedule, self._times
        x, prediction = (_precise(v[:, : self._channels]) for v in (x, plain(prediction_of(output))))
        if through:
            return schedule.to_x0(prediction, x, t)
        alpha, sigma = (rearrange(v.to(x.dtype), "b -> b 1 1 1") for v in schedule.alpha_sigma(t))
        eps = schedule.to_eps(prediction.detach(), x.detach(), t)
        return (x - sigma * eps) / alpha.clamp(min=1e-3)

    @property
    def _channels(self) -> int:
        return latent_channels(self.forward.denoiser)

    def _reference(self, predictions: Sequence[Tensor], t: Tensor) -> Tensor:
        """Return the RMS per sample of the difference that classifier-free guidance extrapolates, in eps units."""
        schedule, c = self.forward.schedule, self.layout.conditional
        latents = [_precise(p[:, : self._channels]) for p in predictions]  # without learned variances
        others = [p for i, p in enumerate(latents) if i != c]
        if others:
            difference = latents[c] - others[-1]
            return rms(difference) / schedule.shift_factor(t).abs().to(difference.dtype)
        return rms(schedule.to_eps(latents[c], _precise(self._x[:, : self._channels]), t))

    def _direct(self, group: Group, predictions: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum of the directions of guides without a gradient."""
        schedule, t, conditional = self.forward.schedule, self._times, predictions[self.layout.conditional]
        x, prediction = (_precise(v[:, : self._channels]) for v in (self._x, conditional))
        inputs = x, schedule.to_eps(prediction, x, t), schedule.to_x0(prediction, x, t), t
        with torch.no_grad():
            directions = [scale_for(g, x) * unit_rms(g.direction(*inputs)) for g in group.guides]
        total = torch.stack(directions).sum(0)
        group.size = rms(total)
        return total

    # ---- the shift --------------------------------------------------------------------------------------------
    def _renew(self, group: Group, gradient: Tensor) -> None:
        record = self.record
        gradient = gradient[:, : self._channels]
        finite = gradient.flatten(1).isfinite().all(1)
        if not finite.all():
            record.skipped = int((~finite).sum())
            self.forward.handle.skipped += record.skipped
            keep = rearrange(finite, "b -> b 1 1 1")
            gradient = torch.where(keep, gradient, 0.0)
            group.size = torch.where(keep, group.size, 0.0)
        if record.grad_norm is None:
            record.grad_norm = gradient.flatten(1).norm(dim=1).float().cpu()
        group.direction = unit_rms(gradient) if group.strength.normalize else gradient

    def _shift(self, group: Group, reference: Tensor, sigma: Tensor) -> Tensor | float:
        """Return the group's shift of eps, or 0 if it moves the latents instead."""
        assert group.direction is not None
        if group.strength.space == "x":
            self._move(group)
            return 0.0
        if group.strength.normalize:
            return -group.size * reference * group.direction
        return -sigma.to(group.direction.dtype) * group.direction

    def _move(self, group: Group) -> None:
        """Add the group's shift of the latents to the pending one."""
        assert group.direction is not None
        forward = self.forward
        forward.x_shift = group.direction if forward.x_shift is None else forward.x_shift + group.direction
        forward.x_input = self._x[:, : group.direction.shape[1]].detach()


def _cut(value: Any, part: int, parts: int, batch: int) -> Any:
    """Cut one part out of all tensors that run along the batch."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
        return value.chunk(parts)[part]
    if isinstance(value, dict):
        return {k: _cut(v, part, parts, batch) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cut(v, part, parts, batch) for v in value)
    return value


def _precise(x: Tensor) -> Tensor:
    """Convert to float32, unless the tensor is float64."""
    return x if x.dtype == torch.float64 else x.float()


def add_shift(prediction: Tensor, shift: Float[Tensor, "b c y x"]) -> Tensor:
    """Add a shift to the first channels of a prediction (the others are learned variances)."""
    out = prediction.clone()
    channels = shift.shape[1]
    out[:, :channels] += shift.to(prediction.dtype)
    return out


def _tap_gradients(group: Group, times: Tensor, record: StepRecord, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weighted sum of the score gradients of a group's guides at their taps.

    With a portable scale each guide's gradient has RMS 1 *at its tap*, so that two guides that agree add up and two
    that oppose each other cancel; ``group.size`` is the RMS of the sum, which for one guide is its scale.
    """
    total: dict[str, Tensor] = {}
    for guide in group.guides:
        h = _precise(features[guide.tap].detach()).requires_grad_(True)
        with torch.enable_grad():
            score = guide.score(h, times)
            (g,) = torch.autograd.grad(score.sum(), h)
        record.scores[guide.name] = score.detach().float().cpu()
        g = scale_for(guide, g) * (unit_rms(g) if guide.strength.normalize else g)
        total[guide.tap] = total[guide.tap] + g if guide.tap in total else g
    sizes = [rearrange(rms(g).square(), "b ... -> b (...)") for g in total.values()]
    group.size = rearrange(torch.stack(sizes).sum(0).sqrt(), "b 1 -> b 1 1 1")
    return total
