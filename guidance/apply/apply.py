"""Guide any sampling loop by wrapping its denoiser: ``apply_guidance``.

The wrapper sees the input ``x``, timestep and output of a denoiser call, and returns a shifted output, in our own loop
as in any unmodified diffusers pipeline.  For guides with scores ``log p_i(y | x)``::

    eps~ = eps - sigma_t * sum_i s_i grad_x log p_i          (normalize=None)
    eps~ = eps - kappa * RMS(eps_cond - eps_uncond) * d      (normalize="cfg"; d: the gradient's direction, RMS 1)

in the model's own parameterisation (:meth:`NoiseSchedule.shift_factor`).  With classifier-free guidance in one batch,
every part gets the same shift, so that a combination whose weights sum to one is shifted by exactly that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from guidance.apply.forward import GuidanceHandle, GuidedForward, replaced
from guidance.apply.guider import GuidedPart, is_guided
from guidance.guides.base import Guide
from guidance.models.denoiser import called_denoiser
from guidance.models.layouts import layout_of
from guidance.models.types import Pipeline
from guidance.utils.errors import UserError


@contextmanager
def apply_guidance(pipe: Pipeline, guides: Sequence[Guide]) -> Iterator[GuidanceHandle]:
    """Guide every denoiser call of a pipeline inside the ``with`` block, and restore the pipeline afterwards.

    A denoiser that was compiled as a whole by ``torch.compile`` runs uncompiled where gradients are taken at a module
    (see :func:`guidance.taps.hooks.uncompiled`); blocks without a tap stay compiled
    (``pipe.unet.compile_repeated_blocks()``).

    Args:
        pipe: A diffusers pipeline of one of the families in :data:`guidance.models.layouts.SUPPORTED`.
        guides: One or more guides; scales add.  Guides with scale 0 cost nothing and change no bit.

    Yields:
        A handle with the scores and gradient norms of each step.

    Raises:
        UserError: If the pipeline is not supported, a guide does not fit it, or guidance is applied to it twice.

    Example::

        with apply_guidance(pipe, [MidBlockGuide(head, guidance_scale=1.0)]):
            image = pipe("a red balloon over the sea at dusk").images[0]
    """
    called, scheduler, guider = called_denoiser(pipe), pipe.scheduler, getattr(pipe, "guider", None)
    if isinstance(vars(called).get("forward"), GuidedForward) or is_guided(guider):
        raise UserError(
            "Expected an unguided pipeline, but guidance is applied to it already; pass all guides at once."
        )
    handle = GuidanceHandle()
    guided: GuidedForward
    if guider is None:
        guided = GuidedForward(pipe, guides, layout_of(pipe), handle)
        placed = guided.in_place()
    else:
        guided = GuidedPart(pipe, guides, handle)
        placed = guided.in_guider(guider)
    for guide in guides:
        guide.prepare(pipe)
    with ExitStack() as stack:
        if guided.guides:
            stack.enter_context(placed)
        if any(g.strength.space == "x" for g in guided.guides):
            stack.enter_context(replaced(scheduler, "step", guided.wrap_step(scheduler)))
        yield handle
