"""Amortised guidance: an adapter predicts the direction of mid-u guidance, and no gradient is taken at all.

:class:`AmortisedGuide` is the guide; :class:`PairRecorder` writes down what its teacher does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from guidance.adapter import Adapter, check_adapter_fits
from guidance.denoiser import denoiser_of, device_of, fingerprint_of
from guidance.errors import UserError, nearest
from guidance.guides.base import Guide, Strength, unit_rms
from guidance.guides.midblock import MidBlockGuide
from guidance.heads import load_head
from guidance.objectives import Target
from guidance.pipelines import fingerprint
from guidance.schedule import NoiseSchedule

_FLOAT16 = 6e4  # pairs are kept in half precision


class AmortisedGuide:
    """Push samples along the direction an adapter predicts; costs one forward of a tiny network per step.

    ``eps~ = eps - s RMS(eps_cond - eps_uncond) f(x_t, eps, x0, t)``, where f has RMS 1 and points where the teacher's
    score rises.  A positive scale follows the teacher (its heads and their signs are in ``adapter.config.teacher``).

    Args:
        adapter: A trained adapter, see :func:`guidance.adapter.load_adapter`.
        guidance_scale: RMS of the shift in units of the difference that classifier-free guidance works with;
            negative pushes away.
        start, stop: Fractions of the steps; None takes the range in which the teacher guides.
        every: Predict a direction each ``every``-th step and reuse it between.
        normalize: "cfg"; an adapter knows directions only, so there is no raw scale.

    Raises:
        UserError: If an option is out of range.

    Reference:
        Teacher: J. Whitaker, "Mid-U Guidance: Fast Classifier Guidance for Latent Diffusion Models", 2023.
    """

    tap = "direct"

    def __init__(
        self,
        adapter: Adapter,
        guidance_scale: float = 1.0,
        *,
        start: float | None = None,
        stop: float | None = None,
        every: int = 1,
        normalize: str | None = "cfg",
    ) -> None:
        if normalize != "cfg":
            raise UserError(
                f"Expected normalize='cfg' for amortised guidance, got {normalize!r}: an adapter predicts "
                "directions without a size; use MidBlockGuide for raw gradients."
            )
        config = adapter.config
        self.adapter = adapter.eval().requires_grad_(False)
        heads = "+".join(str(part.get("predicts", "head")) for part in config.teacher) or "adapter"
        self.name = f"amortised:{heads}"
        self.strength = Strength.within(
            (config.start, config.stop),
            start=start,
            stop=stop,
            guidance_scale=guidance_scale,
            normalize=normalize,
            every=every,
        )

    def prepare(self, pipe: Any) -> None:
        """Refuse a pipeline that the adapter does not fit; move the adapter to the pipeline's device."""
        schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        check_adapter_fits(self.adapter, denoiser_of(pipe), schedule, fingerprint_of(pipe))
        self.adapter.to(device_of(pipe))

    @torch.no_grad()
    def direction(
        self,
        x_t: Float[Tensor, "b c y x"],
        eps: Float[Tensor, "b c y x"],
        x0: Float[Tensor, "b c y x"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c y x"]:
        """The direction in which the teacher's score rises, with respect to the model input.

        Args:
            x_t: The denoiser's input; any dtype.
            eps: Conditional prediction as noise.
            x0: Clean latents it implies.
            t: Timesteps.

        Returns:
            float32, RMS 1 per sample; without a graph.
        """
        return unit_rms(self.adapter(x_t, eps, x0, t))


class PairRecorder:
    """A guide that pushes nowhere and writes down what the denoiser sees and where its companions push.

    Each sample then moves on by its own multiple of the teacher's shift, 0 and negative ones included, so that the
    recorded states are those an adapter will meet at any scale.

    Args:
        scales: Multiple of the shift for each sample, (b,).
        calls: Which denoiser calls to keep; None for all.
    """

    name, tap, strength = "record", "direct", Strength()

    def __init__(self, scales: Sequence[float], calls: Collection[int] | None = None) -> None:
        self.scales = rearrange(torch.tensor(scales, dtype=torch.float32), "b -> b 1 1 1")
        self.kept, self.calls = calls, 0
        self.pairs: list[Tensor] = []
        self.times: list[Tensor] = []

    def prepare(self, pipe: Any) -> None:
        """Read the noise schedule."""
        self.schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        self.scales = self.scales.to(device_of(pipe))

    def direction(self, x_t: Tensor, eps: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Remember what an adapter would be given; push nowhere."""
        self.seen = x_t, eps, x0, t
        return torch.zeros_like(x_t)

    def wrap(self, guided: Callable[..., Any]) -> Callable[..., Any]:
        """Record the shift of each call of a guided denoiser, and rescale it per sample."""

        @functools.wraps(guided)
        def forward(sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            whole = guided(sample, timestep, *args, **kwargs)[0]
            x_t, eps, x0, t = self.seen
            channels, parts = x_t.shape[1], len(whole) // len(x_t)
            shifted = self.schedule.to_eps(whole[-len(x_t) :, :channels].to(x_t.dtype), x_t, t)
            shift = shifted - eps  # the conditional part is the last, and all are shifted alike
            if self.kept is None or self.calls in self.kept:
                self._keep(torch.cat([x_t, eps, x0, unit_rms(-shift)], 1), t)
            self.calls += 1
            factor = rearrange(self.schedule.shift_factor(t).to(shift.dtype), "b -> b 1 1 1")
            whole = whole.clone()
            whole[:, :channels] += ((self.scales - 1) * factor * shift).repeat(parts, 1, 1, 1).to(whole.dtype)
            return (whole,)

        return forward

    def _keep(self, rows: Tensor, t: Tensor) -> None:
        if not rows.isfinite().all():
            raise UserError(
                f"Expected finite predictions, got others at timestep {float(t[0]):g}; run the model in float32, or "
                "check its weights."
            )
        self.pairs.append(rows.clamp(-_FLOAT16, _FLOAT16).to("cpu", torch.float16))
        self.times.append(t.float().cpu())


def guided_steps(teacher: Sequence[Guide], num_steps: int) -> list[int]:
    """Indices of the sampling steps in which any of the teacher's guides pushes."""
    return [i for i in range(num_steps) if any(g.strength.active(i / num_steps) for g in teacher)]


@dataclasses.dataclass(frozen=True)
class TeacherHead:
    """One term of the teacher's sum: arguments of :class:`MidBlockGuide`, the head by its folder."""

    head: str
    guidance_scale: float = 1.0
    objective: str | None = None
    target: Target = None

    def guide(self) -> MidBlockGuide:
        """Build the guide of this term."""
        head = load_head(self.head)
        return MidBlockGuide(head, self.guidance_scale, objective=self.objective, target=self.target)


def describe_teacher(teacher: Sequence[TeacherHead], guides: Sequence[MidBlockGuide]) -> list[dict[str, Any]]:
    """Return what the config of an adapter says about its teacher."""
    facts = [{"predicts": g.head.config.target, "fingerprint": fingerprint(g.head)} for g in guides]
    return [dataclasses.asdict(part) | fact for part, fact in zip(teacher, facts, strict=True)]


def read_teacher(terms: Sequence[Mapping[str, Any]]) -> list[TeacherHead]:
    """Read the terms of a teacher from plain dicts.

    Raises:
        UserError: If a term has an unknown key or no head, or none of them pushes.
    """
    known = [field.name for field in dataclasses.fields(TeacherHead)]
    for term in terms:
        unknown = [key for key in term if key not in known]
        if unknown:
            hint = nearest(str(unknown[0]), known)
            raise UserError(f"Expected options of a head in 'teacher', got '{unknown[0]}'.{hint}")
        if "head" not in term:
            raise UserError(f"Expected a head in each term of 'teacher', got {dict(term)}; add head: FOLDER.")
    heads = [TeacherHead(**term) for term in terms]
    if not any(head.guidance_scale for head in heads):
        raise UserError("Expected a teacher with a guidance_scale other than 0, got none; add a head.")
    return heads
