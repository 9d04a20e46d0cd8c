"""apply_guidance in unmodified pipelines of diffusers, against a full graph written out by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import (
    DDIMPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from torch import Tensor

from guidance.apply import apply_guidance
from guidance.apply.guided import rms, unit_rms
from guidance.guides import ScoringGuide
from guidance.models.denoiser import denoiser_of
from guidance.schedule import NoiseSchedule
from guidance.taps.hooks import patch_grid, read_output

PROMPTS = ["a red balloon over the sea at dusk", "a white tower in the hills at noon"]
SIZE = 2 * tiny.LATENTS


@dataclasses.dataclass(eq=False)
class PatternGuide(ScoringGuide):
    """Scores features by a fixed pattern, squared: smooth, another gradient at every place."""

    tap: str = "mid_block"
    guidance_scale: float = 1.0

    def score(self, h: Tensor, t: Tensor) -> Tensor:
        pattern = torch.sin(torch.arange(h[0].numel(), dtype=torch.float32)).view_as(h[0]).to(h)
        return ((h + pattern) ** 2).mean((1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline and a call of it.

    Attributes:
        build: Makes the pipeline.
        options: Arguments of every call.
        parts, conditional: Layout of its batch with classifier-free guidance.
        prompted: Whether it takes prompts.
    """

    build: Callable[[], Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: int = 2
    conditional: int = 1
    tap: str = "mid_block"
    prompted: bool = True

    def run(self, pipe: Any, variant: str = "plain") -> Tensor:
        own = dict(self.options)
        if variant == "no cfg":
            own |= {"guidance_scale": 1.0} if self.parts > 1 else {}
        elif self.parts > 1:
            own |= {"guidance_scale": 3.0}
        if self.prompted:
            own |= {"prompt": PROMPTS[0]}
            if variant == "many":
                own |= {"prompt": PROMPTS, "negative_prompt": ["grey", "blurred"], "num_images_per_prompt": 2}
                own |= {name: [own[name]] * 2 for name in ("image", "control_image") if name in own}
                own |= {"mask_image": torch.cat([own["mask_image"]] * 2)} if "mask_image" in own else {}
        own.setdefault("num_inference_steps", 2)
        own.setdefault("output_type", "latent")
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(**own, generator=generator).images)


def picture(seed: int = 0) -> Tensor:
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    m = torch.zeros(1, 1, SIZE, SIZE)
    m[..., 4:12, 4:12] = 1
    return m


def sd(kind: type | None = None, in_channels: int = 4, **parts: Any) -> Any:
    pipe = tiny.build_sd(unet=tiny.unet(in_channels))
    if kind is StableDiffusionControlNetPipeline:
        parts["controlnet"] = tiny.build_controlnet(pipe.unet)
    return pipe if kind is None else tiny.with_parts(pipe, kind, **parts)


def sdxl(kind: type | None = None, in_channels: int = 4) -> Any:
    pipe = tiny.build_sdxl(in_channels)
    controlled = kind is StableDiffusionXLControlNetPipeline
    parts = {"controlnet": tiny.build_controlnet(pipe.unet)} if controlled else {}
    return pipe if kind is None else tiny.with_parts(pipe, kind, **parts)


def ddim() -> Any:
    pipe = tiny.build_ddpm()
    return tiny.ready(DDIMPipeline(unet=pipe.unet, scheduler=pipe.scheduler))


def sd3_states(pipe: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(9)
    names = ("prompt_embeds", "negative_prompt_embeds")
    pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    states = {name: torch.randn(2, 5, tiny.WIDTH, generator=g) for name in names}
    return states | {name: torch.randn(2, tiny.WIDTH, generator=g) for name in pooled}


IMAGE = {"image": picture(), "strength": 0.7, "num_inference_steps": 3}
EDIT = {"image": picture(), "image_guidance_scale": 1.5}
SQUARE = {"height": SIZE, "width": SIZE}
INPAINT = {"image": picture(), "mask_image": mask(), "num_inference_steps": 3} | SQUARE
PIXELS = {"output_type": "np"}

CASES = {
    "sd": Case(sd),
    "sd-img2img": Case(partial(sd, StableDiffusionImg2ImgPipeline), IMAGE),
    "sd-inpaint": Case(partial(sd, StableDiffusionInpaintPipeline), INPAINT),
    "sd-inpaint-9": Case(partial(sd, StableDiffusionInpaintPipeline, 9), INPAINT),
    "sd-pix2pix": Case(partial(sd, StableDiffusionInstructPix2PixPipeline, 8), EDIT, 3, 0),
    "sd-controlnet": Case(partial(sd, StableDiffusionControlNetPipeline), {"image": picture()}),
    "sd-controlnet-guess": Case(
        partial(sd, StableDiffusionControlNetPipeline), {"image": picture(), "guess_mode": True}
    ),
    "sdxl": Case(sdxl, SQUARE),
    "sdxl-img2img": Case(partial(sdxl, StableDiffusionXLImg2ImgPipeline), IMAGE),
    "sdxl-inpaint": Case(partial(sdxl, StableDiffusionXLInpaintPipeline), INPAINT),
    "sdxl-pix2pix": Case(partial(sdxl, StableDiffusionXLInstructPix2PixPipeline, 8), EDIT | SQUARE, 3, 0),
    "sdxl-controlnet": Case(partial(sdxl, StableDiffusionXLControlNetPipeline), {"image": picture()}),
    "dit": Case(
        tiny.build_dit, {"class_labels": [207, 3]} | PIXELS, conditional=0, tap="transformer_blocks.1", prompted=False
    ),
    "ddpm": Case(tiny.build_ddpm, {"batch_size": 2} | PIXELS, 1, 0, prompted=False),
    "ddim": Case(ddim, {"batch_size": 2} | PIXELS, 1, 0, prompted=False),
    "sd3": Case(tiny.build_sd3, sd3_states(None) | SQUARE, tap="transformer_blocks.1", prompted=False),
}


@cache
def built(name: str) -> Any:
    return CASES[name].build()


@contextmanager
def by_hand(case: Case, pipe: Any, scale: float, variant: str) -> Iterator[None]:
    """Guidance with a portable scale from the graph of the whole batch, written out once more."""
    denoiser, guide = denoiser_of(pipe), PatternGuide(case.tap)
    original = denoiser.forward
    parts, c = (case.parts, case.conditional) if variant != "no cfg" else (1, 0)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        others = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "sample")}
        first = "hidden_states" if hasattr(pipe, "transformer") else "sample"
        if len(args) > 1:
            others["timestep"] = args[1]
        found: list[Tensor] = []
        see = lambda module, given, output: found.append(output)  # noqa: E731
        hook = denoiser.get_submodule(case.tap).register_forward_hook(see)
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_(True)
            output = original(**{first: leaf}, **others)
            grid = patch_grid(denoiser.pos_embed, x) if first == "hidden_states" else (0, 0)
            h = read_output(found[0], grid).chunk(parts)[c]
            (g,) = torch.autograd.grad(guide.score(h, torch.zeros(len(h))).sum(), leaf)
        hook.remove()
        prediction = (output[0] if isinstance(output, tuple) else output.sample).detach()
        channels = 16 if x.shape[1] == 16 else min(x.shape[1], 4)
        latents = prediction[:, :channels].chunk(parts)
        t = torch.as_tensor(others["timestep"]).reshape(-1)[0]
        mask = x[:, 4:5].chunk(parts)[c] if x.shape[1] == 9 else None  # only what is repainted is pushed
        if parts > 1:
            size = rms(latents[c] - latents[0 if c else -1], mask)
        else:
            factor = schedule.shift_factor(t).float()
            size = rms(schedule.to_eps(latents[0], x[:, :channels], t), mask) * factor
        direction = g[:, :channels].chunk(parts)[c]
        shift = -scale * size * unit_rms(direction if mask is None else direction * mask, mask)
        prediction[:, :channels] += torch.cat([shift] * parts)
        return (prediction,) if isinstance(output, tuple) else type(output)(sample=prediction)

    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward


@pytest.mark.parametrize("name", CASES)
def test_scale_zero_is_bit_equal_and_nothing_is_left(name: str) -> None:
    case, pipe = CASES[name], built(name)
    plain = case.run(pipe)
    with apply_guidance(pipe, [PatternGuide(case.tap, guidance_scale=0.0)]):
        assert torch.equal(case.run(pipe), plain)
    with apply_guidance(pipe, [PatternGuide(case.tap, guidance_scale=1.0)]) as handle:
        guided = case.run(pipe)
    assert guided.isfinite().all() and not torch.allclose(guided, plain, atol=1e-3)
    assert len(handle.records) >= 2 and handle.skipped == 0
    assert torch.equal(case.run(pipe), plain)
    assert "forward" not in vars(denoiser_of(pipe))


CALLS = [
    *((name, "plain") for name in CASES),
    *((name, "many") for name, case in CASES.items() if case.parts > 1 and case.prompted),
    *((name, "no cfg") for name, case in CASES.items() if case.parts > 1 and case.options.get("strength") is None),
]


@pytest.mark.parametrize(("name", "variant"), CALLS)
def test_guided_pipelines_equal_the_full_graph_by_hand(name: str, variant: str) -> None:
    """Every part of the batch is cut out rightly, the gradient is the conditional part's, and all are shifted alike.

    "many" has a batch of 8, which is also the height, the width and a number of channels.
    """
    case, pipe = CASES[name], built(name)
    with apply_guidance(pipe, [PatternGuide(case.tap, guidance_scale=0.7)]):
        guided = case.run(pipe, variant)
    with by_hand(case, pipe, 0.7, variant):
        wanted = case.run(pipe, variant)
    torch.testing.assert_close(guided, wanted, rtol=1e-3, atol=1e-4)
