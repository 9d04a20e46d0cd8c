"""The x-space mode as callback_on_step_end: against a graph by hand, and against apply_guidance."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import EulerDiscreteScheduler
from test_diffusers_pipelines import CASES, PatternGuide
from torch import Tensor

from guidance.apply import apply_guidance
from guidance.apply.callback import MoveLatents
from guidance.utils.errors import UserError

STRENGTH: dict[str, Any] = {"guidance_scale": 40.0, "normalize": None, "space": "x"}


def run(pipe: Any, name: str, **options: Any) -> Tensor:
    own = CASES[name].options | {"guidance_scale": 3.0, "num_inference_steps": 4} | options
    prompted = {"prompt": ["a red balloon", "a tower"]} if CASES[name].prompted else {}
    own |= {"image": torch.cat([own["image"]] * 2)} if "image" in own else {}
    own |= {"mask_image": torch.cat([own["mask_image"]] * 2)} if "mask_image" in own else {}
    generator = torch.Generator().manual_seed(0)
    return pipe(**prompted, **own, output_type="latent", generator=generator).images


@pytest.mark.parametrize("name", ["sd-img2img", "sd-inpaint-9", "sd-pix2pix", "sdxl", "sd3"])
def test_it_equals_apply_guidance_where_the_prediction_does_not_depend_on_the_latents(name: str) -> None:
    """Then it is no matter whether the prediction sees moved latents; and apply_guidance starts a step later."""
    pipe = CASES[name].build()
    last = pipe.transformer.proj_out if hasattr(pipe, "transformer") else pipe.unet.conv_out
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.normal_(last.bias)
    tap = CASES[name].tap
    callback = MoveLatents(pipe, [PatternGuide(tap, **STRENGTH)])
    got = run(pipe, name, callback_on_step_end=callback)
    steps = len(callback.handle.records) + 1
    with apply_guidance(pipe, [PatternGuide(tap, start=(4.5 - steps) / 4, **STRENGTH)]) as handle:
        wanted = run(pipe, name)
    assert len(handle.records) == steps - 1 >= 1
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, run(pipe, name), atol=1e-2)


@pytest.mark.parametrize("euler", [False, True])
def test_it_moves_the_latents_by_the_gradient_of_the_whole_graph(euler: bool) -> None:
    pipe = tiny.build_sd()
    if euler:
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    guide, pushes = PatternGuide(**STRENGTH), []

    def by_hand(pipe: Any, i: int, t: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if i == 3:
            return given
        t, x = pipe.scheduler.timesteps[i + 1], given["latents"]
        found: list[Tensor] = []
        hook = pipe.unet.mid_block.register_forward_hook(lambda m, a, output: found.append(output))
        leaf = pipe.scheduler.scale_model_input(x, t).clone().requires_grad_(True)
        with torch.enable_grad():
            pipe.unet(leaf, t, encoder_hidden_states=given["prompt_embeds"].chunk(2)[1])
            (g,) = torch.autograd.grad(guide.score(found[0], t).sum(), leaf)
        hook.remove()
        pushes.append(i)
        return {"latents": x + 40.0 * (x / leaf.detach()).mean() * g}

    got = run(pipe, "sd", callback_on_step_end=MoveLatents(pipe, [guide]))
    wanted = run(
        pipe, "sd", callback_on_step_end=by_hand, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]
    )
    assert pushes == [0, 1, 2]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_interval_every_no_cfg_and_scale_zero() -> None:
    pipe = tiny.build_sd()
    plain = run(pipe, "sd", guidance_scale=1.0)
    nothing = MoveLatents(pipe, [PatternGuide(**STRENGTH | {"guidance_scale": 0.0})])
    assert torch.equal(run(pipe, "sd", guidance_scale=1.0, callback_on_step_end=nothing), plain)
    callback = MoveLatents(pipe, [PatternGuide(start=0.2, stop=0.7, every=3, **STRENGTH)])
    got = run(pipe, "sd", guidance_scale=1.0, callback_on_step_end=callback)
    assert not torch.allclose(got, plain, atol=1e-2)
    assert [r.t for r in callback.handle.records] == pipe.scheduler.timesteps[1:2].tolist()


def test_bad_input_gets_a_sentence() -> None:
    with pytest.raises(UserError, match="hands its callbacks all"):
        MoveLatents(CASES["sd-controlnet"].build(), [PatternGuide(**STRENGTH)])
    with pytest.raises(UserError, match="space='x'"):
        MoveLatents(tiny.build_sd(), [PatternGuide()])
