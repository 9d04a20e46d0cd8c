"""The CLIP adapter, cutouts and the CLIP guide: agreement with the models' own processors, gradients, refusals."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from guidance.apply import apply_guidance
from guidance.guides import clip as clip_guide
from guidance.guides.base import ScoringGuide
from guidance.guides.clip import ClipGuide, cutouts, spherical_distance
from guidance.models.clip import Clip, Preprocess, load_clip, resize
from guidance.models.denoiser import fingerprint
from guidance.sampling import sample_latents
from guidance.testbed import models
from guidance.testbed.scenes import scenes
from guidance.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
RED, BLUE = "a red balloon over the sea at dusk", "a blue tree in the desert at night"
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)  # unequal, so that a swapped channel shows


def tokenizer():
    return models.build_tokenizer([s.caption for s in scenes("train", 200)])


def save_clip(folder, *, safe=True):
    """A tiny random CLIP with its own image processor and tokenizer; image size 32."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    words = tokenizer()
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(1)
    model = CLIPModel(
        CLIPConfig(
            text_config=common | text | {"pad_token_id": 1},
            vision_config=common | {"image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side, image_mean=MEAN, image_std=STD).save_pretrained(
        folder
    )
    if not safe:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def save_siglip(folder):
    """A tiny random SigLIP; squeezes images into a square of 32 and pads texts."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    words = tokenizer()
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(2)
    model = SiglipModel(
        SiglipConfig(
            text_config=common | text | {"pad_token_id": 1, "projection_size": 32},
            vision_config=common | {"image_size": 32, "patch_size": 8},
        )
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    return {"clip": save_clip(root / "clip"), "siglip": save_siglip(root / "siglip")}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def both(request, folders):
    """(adapter, the model's own image processor)."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    folder = folders[request.param]
    kind = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[request.param]
    return load_clip(folder, device="cpu"), kind.from_pretrained(folder)


@pytest.fixture(scope="module")
def tiny(folders):
    return load_clip(folders["clip"], device="cpu")


@pytest.fixture(scope="module")
def tiny64(folders):
    return load_clip(folders["clip"], device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def pipe64(tiny_pipe):
    """The same pipeline with a VAE in float64, for finite differences."""
    return copy.copy(tiny_pipe).__class__(
        **{**tiny_pipe.components, "vae": copy.deepcopy(tiny_pipe.vae).double()}, requires_safety_checker=False
    )


def pictures(number, height, width, seed=0):
    """Smooth random RGB images with some sharp edges."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(number):
        small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        image = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
        image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
        out.append(Image.fromarray(image))
    return out


def as_tensor(images):
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 127.5 - 1 for i in images])


def own_path(clip, processor, images):
    pixels = torch.cat([torch.as_tensor(processor(i, return_tensors="pt").pixel_values) for i in images])
    with torch.no_grad():
        output = clip.model.get_image_features(pixel_values=pixels)
    return F.normalize(getattr(output, "pooler_output", output), dim=-1)


def latents(number, seed=0, dtype=torch.float32):
    return torch.randn(number, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def prepared(pipe, clip, **options):
    guide = ClipGuide(clip, **{"texts": RED, **options})
    guide.prepare(pipe)
    return guide


def score(guide, x0, t=500.0, *prompts):
    with torch.no_grad():
        return guide.score(x0, torch.full((len(x0),), t), *prompts)


# ---- the adapter ----------------------------------------------------------------------------------------------
def test_images_of_the_models_size_agree_with_its_own_processor(both):
    clip, processor = both
    images = pictures(4, 32, 32)
    expected = own_path(clip, processor, images)
    torch.testing.assert_close(clip.embed_images(as_tensor(images)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.embed_pil(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (96, 50), (41, 77), (20, 24)])
def test_resized_images_agree_with_its_own_processor(both, size):
    clip, processor = both
    images = pictures(4, *size)
    expected = own_path(clip, processor, images)
    cosine = (clip.embed_images(as_tensor(images)) * expected).sum(-1)
    assert cosine.min() > 0.999
    torch.testing.assert_close(clip.embed_pil(images), expected, atol=1e-5, rtol=0)
    swapped = (clip.embed_images(as_tensor(images).flip(-1)) * expected).sum(-1)
    assert swapped.max() < cosine.min()  # the tolerance is tight enough to see another image


def test_embeddings_are_unit_float32_and_do_not_depend_on_the_batch(both):
    clip, _ = both
    images = pictures(3, 40, 32) + pictures(2, 32, 32)
    u, v = clip.embed_pil(images), clip.embed_texts([RED, BLUE])
    assert u.dtype == v.dtype == torch.float32
    torch.testing.assert_close(torch.cat([u, v]).norm(dim=-1), torch.ones(7))
    torch.testing.assert_close(clip.embed_pil(images, batch_size=2), u)
    torch.testing.assert_close(clip.embed_texts([BLUE], batch_size=1), v[1:])
    torch.testing.assert_close(clip.embed_pil([np.array(images[0])]), u[:1])


def test_texts_agree_with_the_model(both):
    clip, _ = both
    length = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer([RED, BLUE], padding="max_length", max_length=length, return_tensors="pt")
    output = clip.model.get_text_features(input_ids=tokens.input_ids)
    expected = F.normalize(getattr(output, "pooler_output", output), dim=-1)
    torch.testing.assert_close(clip.embed_texts([RED, BLUE]), expected)


def test_siglip_reads_its_padding_and_clip_does_not(folders):
    for name, reads in (("clip", False), ("siglip", True)):
        clip = load_clip(folders[name], device="cpu")
        full = clip.embed_texts(["red"])
        clip.max_tokens = 6
        assert torch.allclose(clip.embed_texts(["red"]), full, atol=1e-5) is not reads


def test_long_texts_are_cut_and_said_to_be(tiny):
    long = " ".join(["balloon"] * 60)
    assert tiny.truncated([RED, long]) == [False, True]
    torch.testing.assert_close(tiny.embed_texts([long]), tiny.embed_texts([long + " tree"]))


def test_the_testbed_is_the_default_and_sees_its_world(tiny):
    clip = load_clip(device="cpu")
    assert clip.name == "testbed" and clip.image_size == 64 and clip.dtype == torch.float32
    assert clip.logit_scale == pytest.approx(math.exp(clip.model.logit_scale.item()), rel=1e-6)
    assert clip.fingerprint == fingerprint(clip.model) != tiny.fingerprint
    from guidance.testbed.render import render

    some = list(scenes("test", 16))
    u, v = clip.embed_pil([render(s) for s in some]), clip.embed_texts([s.caption for s in some])
    assert ((u * v).sum(-1) > (u * v.roll(7, 0)).sum(-1)).float().mean() > 0.9


def test_half_precision_is_for_grading_only(folders, tiny):
    half = load_clip(folders["clip"], device="cpu", dtype=torch.bfloat16)
    u = half.embed_pil(pictures(2, 32, 32))
    assert u.dtype == torch.float32
    torch.testing.assert_close(u, tiny.embed_pil(pictures(2, 32, 32)), atol=0.05, rtol=0)
    assert half.fingerprint != "" and len(half.fingerprint) == len(tiny.fingerprint) == 12
    with pytest.raises(UserError, match=r"in float32, got torch\.bfloat16"):
        ClipGuide(half, texts=RED)


@pytest.mark.parametrize("config", ["numbers", "nested"])
def test_older_and_newer_processor_files_are_read(folders, config):
    old = {"size": 32, "crop_size": 32, "do_center_crop": True, "image_mean": MEAN, "image_std": STD}
    new = {**old, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    expected = Preprocess(32, 32, MEAN, STD, "bicubic")
    assert Preprocess.from_config(old if config == "numbers" else new, 32) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"crop_size": 24},
        {"resample": 0},
        {"rescale_factor": 1.0},
        {"size": {"shortest_edge": 20}},
        {"do_normalize": False},
        {"size": {"height": 32, "width": 48}},
    ],
)
def test_a_processor_that_cannot_be_followed_is_refused(change):
    config = {"size": 32, "crop_size": 32, "image_mean": MEAN, "image_std": STD} | change
    with pytest.raises(UserError, match="Expected an image processor"):
        Preprocess.from_config(config, 32)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights only"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    ],
)
def test_a_broken_folder_gets_one_sentence(tmp_path, folders, break_it, message):
    import shutil

    folder = tmp_path / "a clip"
    shutil.copytree(folders["clip"], folder)
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_clip(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_no_clip_gets_one_sentence(tmp_path, tiny_folder, folders):
    with pytest.raises(UserError, match="Did you mean 'testbed'"):
        load_clip("testbet", local_files_only=True)
    with pytest.raises(UserError, match="could not be loaded") as caught:
        load_clip(tmp_path / "missing", local_files_only=True)
    assert "\n" not in str(caught.value)
    import shutil

    folder = tmp_path / "text tower"  # a model, but no CLIP
    shutil.copytree(folders["clip"], folder)
    for file in (tiny_folder / "text_encoder").iterdir():
        shutil.copy(file, folder)
    with pytest.raises(UserError, match="Expected a CLIP or SigLIP of fixed image size, got a CLIPTextModel"):
        load_clip(folder, device="cpu")


# ---- resizing and cutouts -------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(12, 20), (40, 16), (31, 64), (30, 30)])
def test_resize_is_interpolate(mode, size):
    x = torch.randn(2, 3, 31, 30)
    expected = F.interpolate(x, size=size, mode=mode, antialias=True)
    torch.testing.assert_close(resize(x, *size, mode), expected, atol=1e-5, rtol=1e-5)


def test_resize_to_the_same_size_changes_no_bit():
    x = torch.randn(1, 3, 9, 7)
    assert resize(x, 9, 7) is x


def test_a_matrix_cached_in_inference_mode_can_be_differentiated_later():
    x = torch.randn(1, 1, 23, 19)
    with torch.inference_mode():
        resize(x, 11, 13)
    x.requires_grad_()
    resize(x, 11, 13).sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(11.0 * 13))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_whole_cutouts_are_the_image():
    x = torch.randn(2, 3, 16, 16)
    out = cutouts(x, 3, seeded(), 1.0, size=16, noise=0)
    assert torch.equal(out, x.expand(3, 2, 3, 16, 16))


def test_cutouts_depend_on_the_generator_and_not_on_the_batch():
    x = torch.randn(5, 3, 24, 30)
    options = {"size": 16}
    whole = cutouts(x, 4, seeded(3), 0.3, **options)
    assert torch.equal(whole, cutouts(x, 4, seeded(3), 0.3, **options))
    torch.testing.assert_close(cutouts(x[2:3], 4, seeded(3), 0.3, **options), whole[:, 2:3])
    assert not torch.equal(whole, cutouts(x, 4, seeded(4), 0.3, **options))


def test_cutouts_are_squares_of_the_sizes_asked_for_all_over_the_image():
    """A ramp tells where a square lay: its values span its side; its mean is its place."""
    height, width = 40, 60
    ramp = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()[None]
    out = cutouts(ramp, 300, seeded(), 0.25, size=8, noise=0, mode="bilinear")[:, 0]
    side_y, side_x = (8 / 7 * (out[:, c].amax((1, 2)) - out[:, c].amin((1, 2))) for c in (0, 1))
    torch.testing.assert_close(side_y, side_x, atol=0.5, rtol=0)
    assert 8 < side_y.min() < 12 and 37 < side_y.max() < 42
    centre_y, centre_x = (out[:, c].mean((1, 2)) for c in (0, 1))
    assert centre_y.min() > 4 and centre_y.max() < height - 5
    assert centre_x.min() < 10 and centre_x.max() > width - 11


def test_cutout_noise_has_its_size_and_the_gradient_passes():
    x = torch.zeros(2, 3, 16, 16, requires_grad=True)
    out = cutouts(x, 20, seeded(), size=16, noise=0.1)
    assert out.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(out[:, 0], out[:, 1])
    out.sum().backward()
    assert x.grad.abs().sum() > 0


# ---- distances ------------------------------------------------------------------------------------------------
def test_spherical_distance_is_half_the_squared_angle():
    u, v = F.normalize(torch.randn(2, 50, 8, dtype=torch.float64, generator=seeded()), dim=-1)
    asin = 2 * ((u - v).norm(dim=-1) / 2).asin().square()
    arccos = (u * v).sum(-1).arccos().square() / 2
    torch.testing.assert_close(spherical_distance(u, v), asin)
    torch.testing.assert_close(spherical_distance(u, v), arccos)


def test_spherical_distance_at_its_ends_is_exact_with_finite_gradient():
    v = F.normalize(torch.randn(4, 512, generator=seeded()), dim=-1)
    for sign, expected in ((1, 0.0), (-1, math.pi**2 / 2)):
        u = (sign * v).clone().requires_grad_()
        d = spherical_distance(u, v)
        torch.testing.assert_close(d, torch.full((4,), expected))
        (g,) = torch.autograd.grad(d.sum(), u)
        assert g.isfinite().all()


# ---- the guide ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distance": "cosine"},
        {"cutouts": 3, "min_size": 0.4},
        {"texts": [RED, BLUE], "weights": [1.0, -0.5], "cutouts": 2, "distance": "cosine"},
    ],
)
def test_the_gradient_is_that_of_finite_differences(pipe64, tiny64, options):
    guide = prepared(pipe64, tiny64, **options)
    x0 = latents(2, dtype=torch.float64).requires_grad_()
    value = guide.score(x0, torch.full((2,), 300.0))
    assert value.shape == (2,) and value.dtype == torch.float64
    (g,) = torch.autograd.grad(value.sum(), x0)
    for seed in range(3):
        d = latents(2, seed + 10, torch.float64)
        step = 1e-5
        up, down = (score(guide, x0.detach() + s * step * d, 300.0) for s in (1, -1))
        slope = (g * d).sum((1, 2, 3))
        assert slope.abs().min() > 1e-6
        torch.testing.assert_close((up - down) / (2 * step), slope, rtol=1e-5, atol=1e-9)


def test_the_score_is_what_it_says(tiny_pipe, tiny):
    x0 = latents(3)
    with torch.no_grad():
        u = tiny.embed_images(tiny_pipe.vae.decode(x0 / tiny_pipe.vae.config.scaling_factor).sample)
    v = tiny.embed_texts([RED, BLUE])
    cosine = tiny.logit_scale * (u @ v.T)
    spherical = -torch.stack([spherical_distance(u, w.expand_as(u)) for w in v], 1)
    for distance, s in (("cosine", cosine), ("spherical", spherical)):
        pair = prepared(tiny_pipe, tiny, texts=[RED, BLUE], distance=distance)
        torch.testing.assert_close(score(pair, x0), s.sum(1))
        weighted = prepared(tiny_pipe, tiny, texts=[RED, BLUE], weights=[2, -0.5], distance=distance)
        torch.testing.assert_close(score(weighted, x0), 2 * s[:, 0] - 0.5 * s[:, 1])
        away = prepared(tiny_pipe, tiny, texts=RED, weights=-1.0, distance=distance)
        torch.testing.assert_close(score(away, x0), -s[:, 0])


def test_scaling_and_shift_of_the_decoder_are_undone(tiny_pipe, tiny):
    vae = copy.deepcopy(tiny_pipe.vae)
    vae.register_to_config(scaling_factor=0.25, shift_factor=0.5)
    scaled, plain = prepared(tiny_pipe, tiny, decoder=vae), prepared(tiny_pipe, tiny)
    z = latents(2)
    torch.testing.assert_close(score(scaled, (z - 0.5) * 0.25), score(plain, z))


def test_images_are_targets_too(tiny_pipe, tiny):
    image = Image.fromarray(
        ((tiny_pipe.vae.decode(latents(1)).sample[0].clamp(-1, 1) + 1) * 127.5)
        .round().byte().permute(1, 2, 0).numpy()
    )  # fmt: skip
    guide = prepared(tiny_pipe, tiny, texts=None, images=image)
    itself, others = score(guide, latents(1)), score(guide, latents(4, seed=5))
    assert itself > others.max()
    assert itself.abs() < 1e-3
    both = prepared(tiny_pipe, tiny, images=[image])
    torch.testing.assert_close(
        score(both, latents(2)), score(guide, latents(2)) + score(prepared(tiny_pipe, tiny), latents(2))
    )


def test_own_prompts_come_from_the_run(tiny_pipe, tiny):
    guide = prepared(tiny_pipe, tiny, texts=None)
    x0 = latents(2)
    assert guide.needs_prompts and not prepared(tiny_pipe, tiny).needs_prompts
    with pytest.raises(UserError, match="got none; pass texts or images"), apply_guidance(tiny_pipe, [guide]):
        pass
    with pytest.raises(UserError, match="of the 1 samples, got 2 prompts"):
        sample_latents(tiny_pipe, [RED], [0], num_steps=1, guides=[guide], guide_prompts=[RED, BLUE])
    seen = []
    guide.score = lambda x0, t, prompts: seen.append(prompts) or ClipGuide.score(guide, x0, t, prompts)
    sample_latents(tiny_pipe, [RED, BLUE], [0, 1], num_steps=1, guides=[guide])
    assert seen == [(RED, BLUE)]
    expected = [score(prepared(tiny_pipe, tiny, texts=p), x0[i : i + 1]) for i, p in enumerate((RED, BLUE))]
    torch.testing.assert_close(score(guide, x0, 500.0, (RED, BLUE)), torch.cat(expected))


def test_texts_are_embedded_once(tiny_pipe, folders, monkeypatch):
    clip = load_clip(folders["clip"], device="cpu")
    guide = prepared(tiny_pipe, clip, texts=None)
    calls = []
    embed = Clip.embed_texts
    monkeypatch.setattr(Clip, "embed_texts", lambda self, texts: calls.append(texts) or embed(self, texts))
    for _ in range(3):
        score(guide, latents(3), 500.0, (RED, RED, BLUE))
    assert calls == [[RED, BLUE]]


def test_a_sample_does_not_depend_on_its_batch_but_its_cutouts_do_on_t_and_seed(tiny_pipe, tiny):
    guide = prepared(tiny_pipe, tiny, cutouts=4)
    x0, t = latents(3), torch.tensor([900.0, 20.0, 20.5])
    whole = score(guide, x0, 20.0)
    torch.testing.assert_close(score(guide, x0[1:2], 20.0), whole[1:2], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        mixed = guide.score(x0, t)
    torch.testing.assert_close(mixed[1], whole[1], atol=1e-5, rtol=1e-5)
    others = score(prepared(tiny_pipe, tiny, cutouts=4, seed=1), x0, 20.0)
    assert (mixed != whole)[[0, 2]].all() and (others != whole).all()
    assert max((mixed - whole)[[0, 2]].abs().max(), (others - whole).abs().max()) > 1e-4
    assert torch.equal(score(prepared(tiny_pipe, tiny, cutouts=4), x0, 20.0), whole)


def test_whole_cutouts_without_noise_give_the_score_of_the_whole_image(tiny_pipe, tiny, monkeypatch):
    import functools

    monkeypatch.setattr(clip_guide, "cutouts", functools.partial(cutouts, noise=0))
    guide = prepared(tiny_pipe, tiny, cutouts=3, min_size=1.0)
    torch.testing.assert_close(score(guide, latents(2)), score(prepared(tiny_pipe, tiny), latents(2)))


@pytest.mark.parametrize("options", [{}, {"cutouts": 4, "distance": "cosine"}])
def test_ascent_on_the_score_raises_it(tiny_pipe, tiny, options):
    guide = prepared(tiny_pipe, tiny, **options)
    x0, t = latents(3), torch.full((3,), 100.0)
    before = score(guide, x0, 100.0)
    for _ in range(5):
        x0.requires_grad_()
        (g,) = torch.autograd.grad(guide.score(x0, t).sum(), x0)
        x0 = (x0 + 0.1 * g / g.square().mean((1, 2, 3), keepdim=True).sqrt()).detach()
    assert (score(guide, x0, 100.0) > before).all()


def tiny_decoder(channels=4):
    from diffusers import AutoencoderTiny

    torch.manual_seed(3)
    widths = (8, 8, 8)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=channels,
    )


def test_a_tiny_decoder_decodes(tiny_pipe, tiny):
    decoder = tiny_decoder()
    guide = prepared(tiny_pipe, tiny, decoder=decoder)
    assert not any(p.requires_grad for p in decoder.parameters()) and not decoder.training
    x0 = latents(2).requires_grad_()
    value = guide.score(x0, torch.full((2,), 100.0))
    torch.testing.assert_close(value, -spherical_distance(tiny.embed_images(decoder.decode(x0).sample), guide.targets))
    (g,) = torch.autograd.grad(value.sum(), x0)
    assert g.isfinite().all() and g.flatten(1).norm(dim=1).min() > 0


def test_a_half_precision_pipeline_is_decoded_in_float32(tiny_pipe, tiny):
    vae = copy.deepcopy(tiny_pipe.vae).bfloat16()
    guide, exact = prepared(tiny_pipe, tiny, decoder=vae), prepared(tiny_pipe, tiny)
    kept = guide._prepared["decoder"]
    guide.prepare(tiny_pipe)
    assert guide._prepared["decoder"] is kept and vae.dtype == torch.bfloat16  # copied once; the pipeline's own stays
    x0 = latents(2).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = guide.score(x0, torch.full((2,), 100.0))
    (g,) = torch.autograd.grad(value.sum(), x0)
    assert value.dtype == g.dtype == torch.float32
    exact._prepared["decoder"] = copy.deepcopy(vae).float()
    torch.testing.assert_close(value.detach(), score(exact, x0.detach(), 100.0), atol=1e-6, rtol=1e-6)


def test_the_guide_follows_the_protocol_and_names_its_tap(tiny):
    guide = ClipGuide(tiny, 2.0, texts=RED, start=0.2, stop=0.8, every=2)
    assert isinstance(guide, ScoringGuide) and guide.tap == "x0" and guide.name == "clip"
    assert (guide.guidance_scale, guide.normalize, guide.start, guide.stop, guide.every, guide.space) == (
        2.0, "cfg", 0.2, 0.8, 2, "eps",
    )  # fmt: skip
    assert guide.interval == (0.2, 0.8)
    assert ClipGuide(tiny, texts=RED, through="unet").tap == "x0/unet"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": [RED, "  "]}, "got an empty one"),
        ({"texts": []}, "one or more targets"),
        ({"texts": [RED, BLUE], "weights": [1.0]}, "Expected 2 finite weights"),
        ({"texts": RED, "weights": [0.0]}, "not all 0"),
    ],
)
def test_bad_options_get_one_sentence(tiny, options, message):
    with pytest.raises(UserError, match=message) as caught:
        ClipGuide(tiny, **options)
    assert "\n" not in str(caught.value)


def test_an_unknown_choice_gets_the_nearest_name(tiny):
    guide = ClipGuide(tiny, texts=RED)
    guide.distance = "cosin"  # past the type checks of the tests
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        guide.__post_init__()


def test_prepare_refuses_what_does_not_fit(tiny_pipe, tiny):
    guide = ClipGuide(tiny, texts=RED)
    bare = copy.copy(tiny_pipe)
    bare.vae = None
    with pytest.raises(UserError, match="Expected a pipeline with a VAE"):
        guide.prepare(bare)
    with pytest.raises(UserError, match="denoiser's 4 latent channels, got AutoencoderTiny with 16"):
        ClipGuide(tiny, texts=RED, decoder=tiny_decoder(16)).prepare(tiny_pipe)
    vae = copy.deepcopy(tiny_pipe.vae)
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(UserError, match="per-channel statistics"):
        ClipGuide(tiny, texts=RED, decoder=vae).prepare(tiny_pipe)


def test_a_text_that_clip_cannot_read_to_its_end_is_told(tiny):
    with pytest.warns(UserWarning, match="1 of 1 texts are longer"):
        ClipGuide(tiny, texts=" ".join(["balloon"] * 60))
