"""Layouts of the parts of classifier-free guidance in one denoiser batch, by pipeline class."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from guidance.models.types import Pipeline
from guidance.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Parts:
    """Parts of classifier-free guidance in one denoiser batch.

    Attributes:
        number: Number of parts; 1 without classifier-free guidance.
        conditional: Index of the fully conditional part.
    """

    number: int
    conditional: int

    @classmethod
    def of(cls, number: int) -> Parts:
        """Return Stable Diffusion's layout [uncond, cond], or InstructPix2Pix's [text and image, image, uncond]."""
        return cls(number, 0 if number == 3 else number - 1)


ONE = Parts.of(1)

#: ``f(pipe, sample, other arguments of the denoiser call) -> Parts`` of its batch.
Layout = Callable[[Pipeline, Tensor, Mapping[str, Any]], Parts]


# ---- layouts ------------------------------------------------------------------------------------------------------
def by_property(pipe: Pipeline, x: Tensor, arguments: Mapping[str, Any]) -> Parts:
    """Return the layout of pipelines with ``do_classifier_free_guidance``: [uncond, cond]."""
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        raise UserError(
            f"Expected {type(pipe).__name__} with pag_scale=0: perturbed-attention guidance works on the "
            "parts of a batch together, guides on each by itself; set pag_scale=0, or leave the guides out."
        )
    if arguments.get("skip_layers") is not None:
        raise UserError(
            f"Expected {type(pipe).__name__} without skip_guidance_layers, whose third prediction would be guided "
            "apart from the others; leave skip_guidance_layers out, or the guides."
        )
    return Parts.of(2 if _is_classifier_free(pipe) else 1)


def _is_classifier_free(pipe: Pipeline) -> bool:
    """Ask the pipeline whose call is running."""
    if not hasattr(pipe, "do_classifier_free_guidance"):
        raise UserError(
            f"Expected a pipeline that says whether its batch has two parts, got {type(pipe).__name__} without "
            "do_classifier_free_guidance; say it: apply_guidance(pipe, guides, parts=2), or parts=1."
        )
    return bool(pipe.do_classifier_free_guidance)


def _three(pipe: Pipeline, x: Tensor, arguments: Mapping[str, Any]) -> Parts:
    return Parts.of(3 if _is_classifier_free(pipe) else 1)


def _three_by_value(pipe: Pipeline, x: Tensor, arguments: Mapping[str, Any]) -> Parts:
    """Recognise the three parts of SDXL's InstructPix2Pix: the last two share a prompt, all three their latents."""
    latents = x[:, : int(pipe.unet.config.out_channels)]
    same_prompt = _chunks_equal(arguments["encoder_hidden_states"], 3, 1)
    return Parts.of(3 if same_prompt and _chunks_equal(latents, 3, 0) else 1)


def _class_labels(pipe: Pipeline, x: Tensor, arguments: Mapping[str, Any]) -> Parts:
    """Recognise DiT's [cond, uncond]: the second half has the same latents and no class (1000)."""
    labels = torch.as_tensor(arguments["class_labels"])
    null = len(labels) % 2 == 0 and bool((labels[len(labels) // 2 :] == 1000).all())
    return Parts(2, 0) if null and _chunks_equal(x, 2, 0) else ONE


def one_part(pipe: Pipeline, x: Tensor, arguments: Mapping[str, Any]) -> Parts:
    """Return the layout of pipelines that call their denoiser once per part, or have a single part."""
    return ONE


def _chunks_equal(x: Tensor, number: int, first: int) -> bool:
    """Tell whether the chunks of a batch from ``first`` on are equal."""
    if len(x) % number:
        return False
    chunks = x.chunk(number)[first:]
    return all(torch.equal(chunks[0], c) for c in chunks[1:])


# ---- pipelines ----------------------------------------------------------------------------------------------------
#: Layouts of families of pipelines: ``NAMEPipeline``, and with a task between, such as ``NAMEImg2ImgPipeline``.
#: Subclasses follow.  Guidance supports a further class of diffusers by an entry here.
FAMILIES: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "StableDiffusion": (by_property, ("", "Img2Img", "Inpaint", "Depth2Img", "Adapter")),
    "StableDiffusionPAG": (by_property, ("", "Img2Img", "Inpaint")),
    "StableDiffusionControlNet": (by_property, ("", "Img2Img", "Inpaint", "PAG", "PAGInpaint")),
    "StableDiffusionXL": (by_property, ("", "Img2Img", "Inpaint", "Adapter")),
    "StableDiffusionXLPAG": (by_property, ("", "Img2Img", "Inpaint")),
    "StableDiffusionXLControlNet": (by_property, ("", "Img2Img", "Inpaint", "PAG", "PAGImg2Img")),
    "StableDiffusionXLControlNetUnion": (by_property, ("", "Img2Img", "Inpaint")),
    "StableDiffusion3": (by_property, ("", "Img2Img", "Inpaint")),
    "LatentConsistencyModel": (by_property, ("", "Img2Img")),
    "StableDiffusionInstructPix2Pix": (_three, ("",)),
    "StableDiffusionXLInstructPix2Pix": (_three_by_value, ("",)),
    "DiT": (_class_labels, ("",)),
    "DDPM": (one_part, ("",)),
    "DDIM": (one_part, ("",)),
    "ConsistencyModel": (one_part, ("",)),
}

SUPPORTED = (*(f"{family}*Pipeline" for family in FAMILIES), "ModularPipeline with a guider")


def layout_of(pipe: Pipeline) -> Layout:
    """Find the batch layout of a pipeline.

    A class of diffusers is known by its name, a class of your own by ``do_classifier_free_guidance``.

    Raises:
        UserError: If it is a class of diffusers whose layout is not known.
    """
    return _layout_of_class(type(pipe))


@functools.cache
def _layout_of_class(cls: type) -> Layout:
    layouts = {f"{name}{task}Pipeline": layout for name, (layout, tasks) in FAMILIES.items() for task in tasks}
    for base in cls.__mro__:
        if base.__name__ in layouts:
            return layouts[base.__name__]
    if cls.__module__.startswith("diffusers."):
        raise UserError(
            f"Expected a pipeline whose batches are known, got {cls.__name__}; supported are {', '.join(SUPPORTED)}, "
            "and in loops of your own apply_guidance(pipe, guides, parts=...)."
        )
    return by_property


def parts_of(pipe: Pipeline, running: Pipeline | None, x: Tensor, arguments: Mapping[str, Any]) -> Parts:
    """Return the parts of a batch of the denoiser.

    Args:
        pipe: The pipeline that is guided.
        running: The pipeline whose call is running, which may be another one with the same denoiser; None in a loop of
            one's own.
        x, arguments: The denoiser's input, and its other arguments.

    Raises:
        UserError: If only a running pipeline could tell.
    """
    layout = layout_of(running or pipe)
    if running is None and layout in (by_property, _three):
        raise UserError(
            "Expected the parts of the denoiser's batch in a loop of your own, got none; say apply_guidance(pipe, "
            "guides, parts=2) for batches [unconditional, conditional], or parts=1 without classifier-free guidance."
        )
    return layout(running or pipe, x, arguments)


def running_pipeline(denoiser: Any) -> Pipeline | None:
    """Return the innermost pipeline with this denoiser whose ``__call__`` runs in this thread, None without one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if getattr(owner, "scheduler", None) is not None and _has_denoiser(owner, denoiser):
                return owner
        frame = frame.f_back
    return None


def _has_denoiser(owner: Any, denoiser: Any) -> bool:
    parts = (getattr(owner, name, None) for name in ("unet", "transformer"))
    return any(part is denoiser or getattr(part, "_orig_mod", None) is denoiser for part in parts)
