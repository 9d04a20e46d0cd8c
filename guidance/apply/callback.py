"""The x-space mode as a ``callback_on_step_end`` of diffusers pipelines, without wrapping the pipeline.

After each step the callback moves the latents that the next call will see, along the guides' gradients at these
latents::

    x <- x + sum_i s_i grad_x log p_i(y | h(x, t_next))

:func:`guidance.apply_guidance` with ``space="x"`` takes the gradient in the step's own denoiser call, and moves the
latents after its prediction.  There are two differences: here the next prediction is made from the moved latents (as in
the mid-u report), and the latents are not moved before the first step.  The cost is a forward pass of the encoder half
per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from guidance.apply.guided import GuidedDenoiser, advised
from guidance.apply.values import NO_RUN, GuidanceHandle
from guidance.guides.base import DirectGuide, Guide
from guidance.models.denoiser import denoiser_of
from guidance.models.layouts import Parts
from guidance.models.types import Denoiser, Pipeline
from guidance.schedule import StepPlan
from guidance.utils.errors import UserError

#: Tensor that a pipeline passes to callbacks -> argument of its denoiser.
_ARGUMENTS = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}

_ADDED = {"add_text_embeds": "text_embeds", "add_time_ids": "time_ids"}

#: Channels of the denoiser's input besides the latents, of InstructPix2Pix and of inpainting.
_CHANNELS = ("image_latents", "mask", "masked_image_latents")


class MoveLatents(PipelineCallback):
    """Move the latents between steps along the gradients of guides.

    Args:
        pipe: A pipeline with ``callback_on_step_end`` whose denoiser sees only latents and text: Stable Diffusion 1, 2
            and 3, SDXL, and their img2img, inpainting and InstructPix2Pix variants.
        guides: Guides with ``space="x"``.

    Attributes:
        handle: Records of the run so far, as from :func:`guidance.apply_guidance`.

    Raises:
        UserError: If the pipeline takes no such callback, its denoiser has other inputs, or a guide does not fit.

    Example::

        guide = MidBlockGuide(head, 30.0, normalize=None, space="x")
        image = pipe("a red balloon over the sea", callback_on_step_end=MoveLatents(pipe, [guide])).images[0]
    """

    def __init__(self, pipe: Pipeline, guides: Sequence[Guide]) -> None:
        super().__init__()
        self._inputs = _required_inputs(pipe)
        wrong = [g.name for g in guides if g.space != "x" or isinstance(g, DirectGuide)]
        if wrong:
            raise UserError(
                f"Expected guides with space='x' and a score, got {', '.join(wrong)}; use apply_guidance(pipe, guides)."
            )
        for guide in guides:
            guide.prepare(pipe)
        self.handle = GuidanceHandle()
        self._guided = GuidedDenoiser(pipe, guides, self.handle, parts=1)
        self._plan, self._index = NO_RUN.plan, -1

    @property
    def tensor_inputs(self) -> list[str]:
        """Names of the tensors that the pipeline passes to the callback."""
        return self._inputs

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Move the latents, if a solver step starts from them: not after the last one, nor inside one."""
        scheduler, guided = pipeline.scheduler, self._guided
        if step_index == 0 or self._plan.timesteps is not scheduler.timesteps:
            self._plan = StepPlan.of(scheduler)
            self._index = self._plan.begin(timestep, getattr(pipeline, "num_timesteps", None))
        else:
            self._index += 1
        if self._index + 1 >= len(self._plan.times) or not guided.groups:
            return callback_kwargs
        x, t = callback_kwargs["latents"], scheduler.timesteps[self._index + 1]
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        model_input, others = _conditional(callback_kwargs, scaled, guided.denoiser)
        with guided.tapped(), advised():
            push = guided.push((), {guided.first: model_input, "timestep": t.expand(len(x)), **others})
        return callback_kwargs | ({} if push is None else {"latents": x + push.to(x)})


def _required_inputs(pipe: Pipeline) -> list[str]:
    """List the tensors that the denoiser sees, and check that the pipeline passes them to callbacks."""
    offered = getattr(pipe, "_callback_tensor_inputs", [])
    config = denoiser_of(pipe).config
    needed = ["latents", "prompt_embeds"]
    needed += list(_ADDED) if config.get("addition_embed_type") == "text_time" else []
    needed += [name for name in _ARGUMENTS if hasattr(pipe, "transformer") and name not in needed]
    if hasattr(pipe, "controlnet") or hasattr(pipe, "adapter") or not set(needed) <= set(offered):
        raise UserError(
            "Expected a pipeline that hands its callbacks all inputs of its denoiser, got "
            f"{type(pipe).__name__}; use apply_guidance(pipe, guides) with space='x'."
        )
    more_channels = config.in_channels > config.out_channels
    return needed + [name for name in _CHANNELS if more_channels and name in offered]


def _conditional(given: dict[str, Tensor], x: Tensor, denoiser: Denoiser) -> tuple[Tensor, dict[str, Any]]:
    """Return the denoiser's input and its other arguments, of the conditional part."""
    layout = Parts.of(len(given["prompt_embeds"]) // len(x))
    part = {name: v.chunk(layout.number)[layout.conditional] for name, v in given.items() if name != "latents"}
    model_input = torch.cat([x, *(part[name].to(x.dtype) for name in _CHANNELS if name in part)], dim=1)
    if model_input.shape[1] != denoiser.config.in_channels:
        raise UserError(
            f"Expected {denoiser.config.in_channels} channels of the denoiser's input from the pipeline, got "
            f"{model_input.shape[1]}; use apply_guidance(pipe, guides) with space='x'."
        )
    others: dict[str, Any] = {_ARGUMENTS[name]: v for name, v in part.items() if name in _ARGUMENTS}
    added = {_ADDED[name]: v for name, v in part.items() if name in _ADDED}
    return model_input, others | ({"added_cond_kwargs": added} if added else {})
