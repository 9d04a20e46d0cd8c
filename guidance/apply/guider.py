"""Guides in modular pipelines of diffusers, whose *guiders* call the denoiser once per part.

The shift is that of :func:`guidance.apply_guidance`: its gradient is taken in the first call, which is the conditional
one in every guider, and the shift is added to the guider's combination of all parts.  Tested with diffusers 0.42.1 on
Stable Diffusion XL; guiders are marked experimental there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self

from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from guidance.apply.guided import GuidedDenoiser, add_shift, advised
from guidance.apply.values import Call, Group, GuidanceHandle
from guidance.guides.base import Guide
from guidance.models.types import Denoiser, Pipeline
from guidance.taps.hooks import PulledBack, replaced
from guidance.utils.errors import UserError


class _Part(NamedTuple):
    """The call of the conditional part, and what was found in it."""

    call: Call
    due: dict[Group, bool]
    gradients: dict[Group, PulledBack]
    features: dict[str, Tensor]


class GuidedPart(GuidedDenoiser):
    """Stands in for a denoiser's forward in the call of the conditional part; the shift is added after the others."""

    def __init__(self, pipe: Pipeline, guides: Sequence[Guide], handle: GuidanceHandle, **options: Any) -> None:
        super().__init__(pipe, guides, handle, **options | {"parts": 1})
        self._conditional_call: _Part | None = None
        self._in_place = ExitStack()

    def before(self, number: int) -> None:
        """Stand in for the denoiser's forward in the first call of a step, that of the conditional part."""
        self.after()
        if number == 1:
            self._conditional_call = None
            self._in_place.enter_context(self.standing_in())

    def after(self) -> None:
        """Restore the denoiser's forward."""
        self._in_place.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            call = self.read(args, kwargs)
            due = self.plan(call)
            if not due and not self.observers:
                return self._in_its_place(self.forward, *args, **kwargs)
            with advised():
                _, output, gradients, features = self.denoise(call, due)
            self._conditional_call = _Part(call, due, gradients, features)
            return output
        finally:
            self.after()  # also after an error, where a guider does not clean up

    def shifted(self, output: Any, pred_cond: Tensor, pred_uncond: Tensor | None) -> Any:
        """Add the shift to a guider's output."""
        part, self._conditional_call = self._conditional_call, None
        if part is None:
            return output
        predictions = [p for p in (pred_cond, pred_uncond) if p is not None]
        shift = self.shift(part.call, predictions, part.due, part.gradients, part.features)
        if shift is not None:
            output["pred"] = add_shift(output["pred"], shift)  # a dict, not a dataclass
        return output

    @contextmanager
    def in_guider(self, guider: Any) -> Iterator[None]:
        """Guide through any guider of diffusers."""
        prepare, cleanup, forward = guider.prepare_models, guider.cleanup_models, guider.forward

        def prepare_models(denoiser: Denoiser) -> None:
            prepare(denoiser)
            self.before(guider._count_prepared)

        def cleanup_models(denoiser: Denoiser) -> None:
            self.after()
            cleanup(denoiser)

        @functools.wraps(forward)
        def guided(pred_cond: Tensor, pred_uncond: Tensor | None = None, **others: Any) -> Any:
            output = forward(pred_cond=pred_cond, pred_uncond=pred_uncond, **others)
            return self.shifted(output, pred_cond, pred_uncond)

        methods: dict[str, Callable[..., Any]] = {
            "prepare_models": prepare_models,
            "cleanup_models": cleanup_models,
            "forward": guided,
        }
        with self.moving, ExitStack() as stack:
            stack.callback(self.after)
            for name, method in methods.items():
                stack.enter_context(replaced(guider, name, method))
            yield


class GuidesGuider(ClassifierFreeGuidance):
    """Classifier-free guidance combined with guides, as a component of a modular pipeline.

    ``guidance_scale`` and the other options of the constructor are those of classifier-free guidance.  To combine
    guides with another guider, give the pipeline that guider and use ``with apply_guidance(pipe, guides)``.

    Example::

        guider = GuidesGuider(guidance_scale=5.0).attach(pipe, [MidBlockGuide(head, 1.0)])
        pipe.update_components(guider=guider)
        image = pipe(prompt="a red balloon over the sea at dusk", output="images")[0]
    """

    _guides: tuple[Any, ...] = ()  # of Pipeline and guides
    _placed: ExitStack | None = None

    def attach(self, pipe: Pipeline, guides: Sequence[Guide]) -> GuidesGuider:
        """Set the guides, replacing earlier ones.

        Args:
            pipe: The pipeline, with its denoiser and scheduler loaded; they are not copied.
            guides: As in :func:`guidance.apply_guidance`, except those with ``space="x"``.

        Raises:
            UserError: If a guide does not fit the pipeline, or moves the latents between steps.
        """
        if any(g.space == "x" for g in guides):
            raise UserError(
                "Expected guides with space='eps' in a guider, which sees no latents between steps, got space='x'; "
                "use apply_guidance(pipe, guides)."
            )
        for guide in guides:
            guide.prepare(pipe)
        if self._placed is not None:
            self._placed.close()
        self.handle, self._guides, self._placed = GuidanceHandle(), (pipe, guides), ExitStack()
        part = GuidedPart(pipe, guides, self.handle)
        if part.groups:
            self._placed.enter_context(part.in_guider(self))
        return self

    def new(self, **kwargs: Any) -> GuidesGuider:
        """Copy with other options of classifier-free guidance and the same guides."""
        other: Self = super().new(**kwargs)
        return other.attach(*self._guides) if self._guides else other


def is_guided(guider: Any) -> bool:
    """Tell whether a guider is guided already, by its own guides or by :func:`guidance.apply_guidance`."""
    return guider is not None and "forward" in vars(guider)
