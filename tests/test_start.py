"""Starts: agreement with diffusers' img2img and inpaint pipelines, the limits of strength and mask, bad pictures."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_head
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, UNet2DConditionModel
from PIL import Image

from guidance.apply import apply_guidance
from guidance.guides import MidBlockGuide
from guidance.sampling import sample_images, sample_latents, using_scheduler
from guidance.sampling.start import FromImage, FromMask, encode_images, encode_masks
from guidance.utils.errors import UserError

PROMPTS = ["a red balloon over the sea at dusk", "a white tower in the hills at noon"]
OPTIONS = {"num_steps": 5, "cfg_scale": 3.0}


@pytest.fixture(scope="module")
def guide(tiny_pipe):
    return MidBlockGuide(make_head(tiny_pipe), 1.0, start=0, stop=1)


@pytest.fixture(scope="module")
def painting_pipe(tiny_pipe):
    """The pipeline with an inpainting denoiser: 9 input channels."""
    torch.manual_seed(1)
    pipe = copy.copy(tiny_pipe)
    pipe.unet = UNet2DConditionModel.from_config(tiny_pipe.unet.config, in_channels=9).eval()
    return pipe.unet.requires_grad_(False) and pipe


def known(b=2):
    return torch.randn(b, 4, 16, 16, generator=torch.Generator().manual_seed(7))


def square(b=2):
    mask = torch.zeros(b, 1, 16, 16)
    mask[:, :, 4:12, 4:12] = 1
    return mask


def theirs(kind, pipe, scheduler, guides, **extra):
    """An unmodified diffusers pipeline with one generator per sample."""
    other = kind(**{**pipe.components, "unet": pipe.unet}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    with using_scheduler(other, scheduler), apply_guidance(other, guides):
        return other(
            PROMPTS, num_inference_steps=5, guidance_scale=3.0, generator=generators, output_type="latent", **extra
        ).images


@pytest.mark.parametrize(("scheduler", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("euler", 0.0), ("dpm++", 0.0)])
def test_from_image_equals_img2img(tiny_pipe, guide, scheduler, eta):
    for guides in ([], [guide]):
        start = FromImage(known(), 0.6)
        got = sample_latents(
            tiny_pipe, PROMPTS, [1, 2], scheduler=scheduler, eta=eta, start=start, guides=guides, **OPTIONS
        )
        extra = {"image": known(), "strength": 0.6, "eta": eta}
        want = theirs(StableDiffusionImg2ImgPipeline, tiny_pipe, scheduler, guides, **extra)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize("channels", [4, 9])
def test_from_mask_equals_inpainting(tiny_pipe, painting_pipe, guide, scheduler, strength, channels):
    pipe = tiny_pipe if channels == 4 else painting_pipe
    masked = known() * (1 - square())
    extra = {
        "image": known(),
        "strength": strength,
        "mask_image": square().repeat_interleave(4, 2).repeat_interleave(4, 3),
        "masked_image_latents": masked,
        "height": 64,
        "width": 64,
    }
    for guides in ([], [guide]):
        start = FromMask(known(), square(), strength, masked)
        got = sample_latents(pipe, PROMPTS, [1, 2], scheduler=scheduler, start=start, guides=guides, **OPTIONS)
        want = theirs(StableDiffusionInpaintPipeline, pipe, scheduler, guides, **extra)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_eta_equals_the_diffusers_pipeline(tiny_pipe):
    got = sample_latents(tiny_pipe, PROMPTS, [1, 2], eta=1.0, **OPTIONS)
    plain = sample_latents(tiny_pipe, PROMPTS, [1, 2], **OPTIONS)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    want = tiny_pipe(
        PROMPTS, num_inference_steps=5, guidance_scale=3.0, eta=1.0, generator=generators, output_type="latent"
    ).images
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-2)


def test_the_known_part_is_kept_exactly_and_the_rest_is_not(tiny_pipe):
    start = FromMask(known(), square())
    got = sample_latents(tiny_pipe, PROMPTS, [1, 2], eta=1.0, start=start, **OPTIONS)
    kept = square().expand_as(got) == 0
    assert torch.equal(got[kept], known()[kept])
    assert (got - known())[~kept].abs().min() > 0


def test_the_limits_of_mask_and_strength(tiny_pipe):
    plain = sample_latents(tiny_pipe, PROMPTS, [1, 2], **OPTIONS)
    run = lambda start: sample_latents(tiny_pipe, PROMPTS, [1, 2], start=start, **OPTIONS)  # noqa: E731
    assert torch.equal(run(FromMask(known(), torch.ones(2, 1, 16, 16))), plain)
    assert torch.equal(run(FromMask(known(), torch.zeros(2, 1, 16, 16))), known())
    assert torch.equal(run(FromImage(known(), 0.0)), known())
    assert torch.equal(run(FromMask(known(), square(), 0.0)), known())
    far = [(run(FromImage(known(), s)) - known()).norm() for s in (0.2, 0.6, 1.0)]
    assert far[0] < far[1] < far[2]


def test_a_start_does_not_depend_on_the_batch(tiny_pipe):
    for start in (FromImage(known(), 0.6), FromMask(known(), square(), 0.8), FromMask(known(1), square(1))):
        options = {"start": start, "eta": 0.5, **OPTIONS}
        whole = sample_images(tiny_pipe, PROMPTS, [1, 2], batch_size=2, **options)
        single = sample_images(tiny_pipe, PROMPTS, [1, 2], batch_size=1, **options)
        assert abs(whole.astype(int) - single.astype(int)).max() <= 1
        assert abs(whole[0].astype(int) - whole[1].astype(int)).max() > 1


def test_the_callback_may_replace_the_latents(tiny_pipe):
    seen = []

    def forget(step, x, record):
        seen.append(x)
        return torch.zeros_like(x) if step == 4 else None

    got = sample_latents(tiny_pipe, PROMPTS, [1, 2], callback=forget, **OPTIONS)
    assert torch.equal(got, torch.zeros_like(got)) and seen[4].abs().max() > 0
    swap = lambda step, x, record: x.flip(0) if step == 4 else None  # noqa: E731
    swapped = sample_latents(tiny_pipe, PROMPTS, [1, 2], callback=swap, **OPTIONS)
    assert torch.equal(swapped, seen[4].flip(0))


def test_pictures_become_latents(tiny_pipe, painting_pipe):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    pictures = [Image.fromarray(p) for p in pixels]
    latents = encode_images(tiny_pipe, pictures)
    assert torch.equal(latents, encode_images(tiny_pipe, pixels))
    want = tiny_pipe.vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(latents, want * tiny_pipe.vae.config.scaling_factor)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    assert torch.equal(encode_masks(tiny_pipe, [mask]), square(1))
    assert torch.equal(encode_masks(tiny_pipe, [mask.convert("1")]), square(1))
    start = FromMask.from_images(tiny_pipe, pictures, [mask, mask], 0.5)
    assert torch.equal(start.latents, latents) and start.masked_latents is None
    grey = FromMask.from_images(painting_pipe, pictures, [mask, mask]).masked_latents
    assert grey is not None and not torch.equal(grey, latents)


def test_bad_pictures_get_a_sentence(tiny_pipe):
    for picture, text in [
        (Image.new("RGBA", (64, 64)), "got RGBA"),
        (np.zeros((64, 64, 3), np.float32), "of 8 bits, got float32"),
        (Image.new("L", (64, 64)), r"got L; use image.convert\('RGB'\)"),
        (Image.new("RGB", (32, 64)), "64x64 pixels, got 32x64"),
    ]:
        with pytest.raises(UserError, match=text):
            encode_images(tiny_pipe, [picture])
    with pytest.raises(UserError, match=r"got RGB; use image.convert\('L'\)"):
        encode_masks(tiny_pipe, [Image.new("RGB", (64, 64))])


def test_bad_starts_get_a_sentence(tiny_pipe, painting_pipe):
    def run(pipe=tiny_pipe, **options):
        return sample_latents(pipe, PROMPTS, [1, 2], **{**OPTIONS, **options})

    for make, text in [
        (lambda: FromImage(known(), 1.5), "strength in 0..1, got 1.5"),
        (lambda: FromMask(known(), square() * 255), r"mask in 0..1, got 0..255"),
        (lambda: run(start=FromImage(known(), 0.1)), "at least 1, got 0.1"),
        (lambda: run(start=FromImage(known(3))), r"latents of shape \(2, 4, 16, 16\)"),
        (lambda: run(painting_pipe), r"needs start=FromMask"),
        (lambda: run(painting_pipe, start=FromMask(known(), square())), "masked_latents"),
        (lambda: run(eta=0.5, scheduler="euler"), "eta=0 with EulerDiscreteScheduler"),
        (lambda: run(eta=1.5), "eta in 0..1"),
    ]:
        with pytest.raises(UserError, match=text):
            make()
