"""Guide any sampling loop by standing in for its denoiser's forward: ``apply_guidance``.

For guides with scores ``log p_i(y | x)``::

    eps~ = eps - sigma_t * sum_i s_i grad_x log p_i          (normalize=None)
    eps~ = eps - kappa * RMS(eps_cond - eps_uncond) * d      (normalize="cfg"; d: the gradient's direction, RMS 1)

in the model's own parameterisation (:meth:`NoiseSchedule.shift_factor`).  With classifier-free guidance in one batch,
every part gets the same shift, so that a combination whose weights sum to one is shifted by exactly that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from guidance.apply.guided import GuidedDenoiser
from guidance.apply.guider import GuidedPart, is_guided
from guidance.apply.values import GuidanceHandle, Observer
from guidance.guides.base import Guide, ScoringGuide
from guidance.models.denoiser import called_denoiser, denoiser_of
from guidance.models.layouts import layout_of
from guidance.models.types import Pipeline
from guidance.utils.errors import UserError

_ENTRY = threading.Lock()


@contextmanager
def apply_guidance(
    pipe: Pipeline,
    guides: Sequence[Guide],
    *,
    parts: int | None = None,
    prompts: Sequence[str] | None = None,
    factors: Sequence[float] | None = None,
    observe: Sequence[Observer] = (),
) -> Iterator[GuidanceHandle]:
    """Guide every denoiser call of a pipeline inside the ``with`` block, and restore the pipeline afterwards.

    A denoiser that was compiled as a whole by ``torch.compile`` runs uncompiled where gradients are taken at a module
    (see :func:`guidance.taps.hooks.uncompiled`); blocks without a tap stay compiled
    (``pipe.unet.compile_repeated_blocks()``).

    Args:
        pipe: A diffusers pipeline of one of the families in :data:`guidance.models.layouts.SUPPORTED`; with ``parts``
            any that has a UNet or a transformer with ``timestep``.
        guides: One or more guides; scales add.  Guides with scale 0 cost nothing and change no bit.
        parts: Parts of classifier-free guidance in each batch of the denoiser, in a loop of your own: 2 for
            [unconditional, conditional], 3 for InstructPix2Pix's, 1 without.  None asks the pipeline whose call is
            running.
        prompts: Prompt of each sample, for guides towards each sample's own; None without such guides.
        factors: Factor of all shifts for each sample; None: 1.
        observe: Called with the conditional part of every denoiser call, see
            :class:`~guidance.apply.values.Observer`.

    Yields:
        A handle that says what happened: scores and gradient norms of each step, steps, gradients, pushes.

    Raises:
        UserError: If the pipeline is not supported, a guide does not fit it, guidance is applied to it twice, the
            gradient is not that of the latents, or the denoiser was exchanged.

    Example::

        with apply_guidance(pipe, [MidBlockGuide(head, guidance_scale=1.0)]):
            image = pipe("a red balloon over the sea at dusk").images[0]
    """
    guider, handle = getattr(pipe, "guider", None), GuidanceHandle()
    if parts is None and guider is None:
        layout_of(pipe)
    if not all(isinstance(guide, Guide) for guide in guides):
        other = next(type(guide).__name__ for guide in guides if not isinstance(guide, Guide))
        raise UserError(f"Expected guides (subclasses of ScoringGuide or DirectGuide), got {other}.")
    for guide in guides:
        guide.prepare(pipe)
    following = [g.name for g in guides if isinstance(g, ScoringGuide) and g.guidance_scale and g.needs_prompts]
    if following and prompts is None:
        raise UserError(
            f"Expected the samples' prompts for '{following[0]}', which has no target of its own, got none; pass "
            "texts or images to the guide, or apply_guidance(pipe, guides, prompts=...) with one per sample."
        )
    options: dict[str, Any] = {"parts": parts, "prompts": prompts, "factors": factors, "observers": observe}
    placed: AbstractContextManager[None]
    if guider is None:
        guided = GuidedDenoiser(pipe, guides, handle, **options)
        placed = guided.in_place()
    else:
        part = GuidedPart(pipe, guides, handle, **options)
        guided, placed = part, part.in_guider(guider)
    placed = placed if guided.groups or observe else nullcontext()
    with _ENTRY:
        _refuse_twice(pipe)
        placed.__enter__()
    try:
        yield handle
        if denoiser_of(pipe) is not guided.denoiser:
            raise UserError(
                "Expected the pipeline to keep its denoiser while guidance is applied, but it has another one now, "
                "whose images are unguided; exchange it before apply_guidance."
            )
    finally:
        with _ENTRY:
            placed.__exit__(None, None, None)


def _refuse_twice(pipe: Pipeline) -> None:
    placed = vars(called_denoiser(pipe)).get("forward"), vars(denoiser_of(pipe)).get("forward")
    if any(isinstance(forward, GuidedDenoiser) for forward in placed) or is_guided(getattr(pipe, "guider", None)):
        raise UserError(
            "Expected an unguided denoiser, but guidance is applied to it already (by this pipeline, or in another "
            "thread by one that shares it); pass all guides at once, or give each thread a denoiser of its own."
        )
