"""Guides in modular pipelines: the guider equals apply_guidance on the classic pipeline; other guiders; bad input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import ControlNetModel, ModularPipeline
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks
from test_diffusers_pipelines import PROMPTS, SIZE, PatternGuide, picture
from torch import Tensor

from guidance.apply import apply_guidance
from guidance.apply.guided import rms
from guidance.apply.guider import GuidesGuider
from guidance.guides.base import Guide
from guidance.utils.errors import UserError

NEGATIVE = ["grey", "blurred"]


@cache
def classic() -> Any:
    return tiny.build_sdxl()


@cache
def controlnet() -> ControlNetModel:
    return tiny.build_controlnet(classic().unet)


def modular(guider: BaseGuidance | None = None, scale: float = 3.0) -> ModularPipeline:
    """SDXL's modular pipeline with the classic one's parts."""
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    absent = ("feature_extractor", "image_encoder")
    parts = {name: part for name, part in classic().components.items() if name not in absent}
    guider = guider or ClassifierFreeGuidance(guidance_scale=scale)
    pipe.update_components(**parts, controlnet=controlnet(), guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, **options: Any) -> Tensor:
    options = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "output_type": "latent"} | options
    options |= {"height": SIZE, "width": SIZE, "num_inference_steps": 3}
    generator = torch.Generator().manual_seed(0)
    if isinstance(pipe, ModularPipeline):
        return pipe(**options, generator=generator, output="images")
    return pipe(**options, generator=generator, guidance_scale=3.0).images


def guided_classic(guides: Sequence[Guide]) -> Tensor:
    with apply_guidance(classic(), guides):
        return run(classic())


@pytest.mark.parametrize(
    "strength", [{"guidance_scale": 0.7}, {"guidance_scale": 30.0, "normalize": None, "start": 0.3, "every": 2}]
)
def test_the_guider_equals_apply_guidance_on_the_classic_pipeline(strength: dict[str, Any]) -> None:
    guides = [PatternGuide(**strength)]
    pipe = modular(GuidesGuider(guidance_scale=3.0))
    plain = run(pipe)
    torch.testing.assert_close(plain, run(classic()), rtol=1e-4, atol=1e-4)
    pipe.guider.attach(pipe, guides)
    guided = run(pipe)
    torch.testing.assert_close(guided, guided_classic(guides), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(guided, plain, atol=1e-2)
    assert pipe.guider.handle.records[-1].shift_rms.shape == (2,)


def test_scale_zero_is_bit_equal_and_options_are_those_of_classifier_free_guidance() -> None:
    pipe = modular(ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5))
    plain = run(pipe)
    guider = GuidesGuider(guidance_scale=3.0, stop=0.5)
    pipe.update_components(guider=guider.attach(pipe, [PatternGuide(guidance_scale=0.0)]))
    assert torch.equal(run(pipe), plain)
    guider = GuidesGuider(guidance_scale=3.0, stop=0.5)  # a stopped one asks for no negative prompt in the next run
    pipe.update_components(guider=guider.attach(pipe, [PatternGuide(guidance_scale=1.0)]))
    assert not torch.allclose(run(pipe), plain, atol=1e-2)
    assert "forward" not in vars(pipe.unet)


def test_a_new_guider_keeps_its_guides_and_saves_its_options(tmp_path) -> None:
    pipe = modular(GuidesGuider(guidance_scale=3.0))
    pipe.guider.attach(pipe, [PatternGuide(guidance_scale=0.7)])
    guided = run(pipe)
    pipe.update_components(guider=pipe.guider.new(guidance_rescale=0.0))
    assert torch.equal(run(pipe), guided)
    pipe.guider.save_pretrained(tmp_path)
    loaded = GuidesGuider.from_pretrained(tmp_path)
    assert loaded.config.guidance_scale == 3.0
    pipe.update_components(guider=loaded.attach(pipe, [PatternGuide(guidance_scale=0.7)]))
    assert torch.equal(run(pipe), guided)


@pytest.mark.parametrize("space", ["eps", "x"])
def test_apply_guidance_guides_through_the_pipelines_own_guider(space: str) -> None:
    pipe = modular()
    plain = run(pipe)
    options: dict[str, Any] = {"guidance_scale": 0.7}
    if space == "x":
        options = {"guidance_scale": 50.0, "normalize": None, "space": "x"}
    guides = [PatternGuide(**options)]
    with apply_guidance(pipe, guides) as handle:
        guided = run(pipe)
    assert len(handle.records) == 3
    torch.testing.assert_close(guided, guided_classic(guides), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(guided, plain, atol=1e-2)
    assert torch.equal(run(pipe), plain)


SKIPPED = LayerSkipConfig(
    indices=[0], fqn="mid_block.attentions.0.transformer_blocks", skip_attention_scores=True, skip_ff=False
)
OTHERS = {
    "APG": lambda: AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5),
    "PAG": lambda: PerturbedAttentionGuidance(
        guidance_scale=3.0, perturbed_guidance_config=SKIPPED, perturbed_guidance_start=0.0
    ),
    "autoguidance": lambda: AutoGuidance(guidance_scale=3.0, auto_guidance_config=SKIPPED, dropout=None),
    "off": lambda: ClassifierFreeGuidance(guidance_scale=1.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_shift_of_known_size_is_added_to_what_any_guider_makes(name: str, monkeypatch) -> None:
    """At the first step inputs agree with the unguided run's, so the guider's output may differ by the shift only."""
    pipe = modular(OTHERS[name]())
    outputs: dict[str, list[Tensor]] = {"plain": [], "guided": []}

    def recorded(key: str) -> None:
        step = pipe.scheduler.step

        def seen(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            outputs[key].append(model_output.clone())
            return step(model_output, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(pipe.scheduler, "step", seen)
            run(pipe)

    recorded("plain")
    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.5)]) as handle:
        recorded("guided")
    moved = rms(outputs["guided"][0] - outputs["plain"][0]).flatten()
    torch.testing.assert_close(moved, handle.records[0].shift_rms, rtol=1e-3, atol=1e-5)
    assert moved.min() > 1e-3 and len(handle.records) == 3


def test_controlnet_and_an_error_leave_nothing_behind() -> None:
    pipe = modular()
    image = torch.cat([picture()] * 2)
    plain = run(pipe, control_image=image)

    class Broken(PatternGuide):
        def score(self, h: Tensor, t: Tensor) -> Tensor:
            raise RuntimeError("broken guide")

    with pytest.raises(RuntimeError, match="broken guide"), apply_guidance(pipe, [Broken()]):
        run(pipe, control_image=image)
    assert not {"forward"} & vars(pipe.unet).keys() and not {"forward", "prepare_models"} & vars(pipe.guider).keys()
    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.5)]):
        assert not torch.allclose(run(pipe, control_image=image), plain, atol=1e-2)
    assert torch.equal(run(pipe, control_image=image), plain)
    guider = GuidesGuider(guidance_scale=3.0)
    pipe.update_components(guider=guider.attach(pipe, [Broken()]))
    with pytest.raises(RuntimeError, match="broken guide"):
        run(pipe)
    assert "forward" not in vars(pipe.unet)


def test_bad_input_gets_a_sentence() -> None:
    pipe = modular(GuidesGuider(guidance_scale=3.0))
    with pytest.raises(UserError, match="use apply_guidance"):
        pipe.guider.attach(pipe, [PatternGuide(normalize=None, space="x")])
    pipe.guider.attach(pipe, [PatternGuide()])
    with pytest.raises(UserError, match="applied to it already"), apply_guidance(pipe, [PatternGuide()]):
        pass
