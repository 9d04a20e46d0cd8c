"""Our loop on SDXL: its added conditions and zeros for no negative prompt equal the pipeline's, guided or not."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from test_diffusers_pipelines import PROMPTS, SIZE, PatternGuide

from guidance.apply import apply_guidance
from guidance.models.conditions import encode_prompts, last
from guidance.sampling import sample_latents
from guidance.sampling.start import FromImage
from guidance.utils.errors import UserError


@pytest.fixture
def sdxl() -> Any:
    return tiny.build_sdxl()


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(("cfg_scale", "negative"), [(3.0, ""), (3.0, "grey"), (1.0, "")])
def test_our_loop_equals_the_sdxl_pipeline(sdxl: Any, cfg_scale: float, negative: str, zeros: bool) -> None:
    pipe = sdxl
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    for guides in ([], [PatternGuide(guidance_scale=0.7)]):
        ours = sample_latents(
            pipe, PROMPTS, [1, 2], num_steps=2, cfg_scale=cfg_scale, negative_prompt=negative, guides=guides
        )
        with apply_guidance(pipe, guides):
            theirs = pipe(
                PROMPTS,
                height=SIZE,
                width=SIZE,
                num_inference_steps=2,
                guidance_scale=cfg_scale,
                negative_prompt=[negative] * 2 if negative else None,
                generator=generators(),
                output_type="latent",
            ).images
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_our_loop_equals_sdxls_img2img(sdxl: Any) -> None:
    pipe, known = sdxl, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    guides = [PatternGuide(guidance_scale=0.7)]
    ours = sample_latents(pipe, PROMPTS, [1, 2], num_steps=4, cfg_scale=3.0, start=FromImage(known, 0.6), guides=guides)
    other = tiny.with_parts(pipe, StableDiffusionXLImg2ImgPipeline)
    with apply_guidance(other, guides):
        theirs = other(
            PROMPTS,
            image=known,
            strength=0.6,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=generators(),
            output_type="latent",
            original_size=(SIZE, SIZE),
            target_size=(SIZE, SIZE),
        ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_last_takes_the_conditional_part(sdxl: Any) -> None:
    whole = encode_prompts(sdxl, PROMPTS, "grey")
    own = encode_prompts(sdxl, PROMPTS, classifier_free=False)
    assert whole["added_cond_kwargs"]["time_ids"].shape == (4, 6)
    torch.testing.assert_close(last(whole, 2), own)
    assert not torch.allclose(whole["added_cond_kwargs"]["text_embeds"][:2], own["added_cond_kwargs"]["text_embeds"])


def test_a_denoiser_with_other_conditions_gets_a_sentence(sdxl: Any) -> None:
    sdxl.unet.register_to_config(projection_class_embeddings_input_dim=tiny.WIDTH + 5 * 4)  # the refiner's five
    with pytest.raises(UserError, match="SDXL's base model"):
        encode_prompts(sdxl, PROMPTS)
