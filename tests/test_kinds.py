"""Kinds of use on unmodified pipelines, each against the graph of the whole denoiser, written by hand.

Precisions, what saves memory, adapters, FreeU, options of calls, runs that end early.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    AutoPipelineForInpainting,
    ControlNetUnionModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MultiAdapter,
    MultiControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    T2IAdapter,
    TCDScheduler,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading
from safetensors.torch import save_file
from test_diffusers_pipelines import CASES, SQUARE, Case, PatternGuide, built, by_hand, ddim, picture, sd, sdxl
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from guidance.apply import apply_guidance
from guidance.apply.guided import rms, unit_rms
from guidance.apply.values import Observation
from guidance.guides import Guide
from guidance.models.denoiser import denoiser_of
from guidance.schedule import NoiseSchedule
from guidance.taps import capture, encode_features
from guidance.taps.hooks import join_maps, read_output
from guidance.utils.errors import UserError

PLAIN = CASES["sd"]
CPU = torch.device("cpu")


@pytest.fixture
def part_by_part(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Choose how the parts of a batch run: one after another, or in step."""
    return lambda apart: monkeypatch.setattr("guidance.apply.guided.IN_STEP_WEIGHTS", 10**9 if apart else 0)


def both_ways(names: Iterable[Any], in_step: Iterable[Any]) -> Any:
    """Parametrize a test by names, with parts one after another for all, and in step for some."""
    each = [(name, True) for name in names] + [(name, False) for name in in_step]
    ids = [f"{' and '.join(n) if isinstance(n, tuple) else n}{'' if apart else ', in step'}" for n, apart in each]
    return pytest.mark.parametrize(("name", "apart"), each, ids=ids)


def own(name: str) -> Any:
    """A copy of a case's pipeline, with the weights of all others."""
    return copy.deepcopy(built(name))


def guided(case: Case, pipe: Any, variant: str = "plain", tap: str | None = None) -> Tensor:
    with apply_guidance(pipe, [PatternGuide(tap or case.tap, guidance_scale=0.7)]) as handle:
        result = case.run(pipe, variant)
    assert handle.gradients > 0 == handle.skipped
    return result


def check(case: Case, pipe: Any, variant: str = "plain") -> None:
    """Compare a guided run with the one by hand, and see that it differs from one without guidance."""
    plain, result = case.run(pipe, variant), guided(case, pipe, variant)
    with by_hand(case, pipe, 0.7, variant):
        wanted = case.run(pipe, variant)
    torch.testing.assert_close(result, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(result, plain, atol=1e-3)


# ---- precision ----------------------------------------------------------------------------------------------------
class Shifts:
    """An observer that keeps the shift of each call."""

    taps = ()

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, seen: Observation) -> None:
        assert seen.shift is not None
        self.seen.append(seen.shift)


def shifts(name: str, pipe: Any, tap: str) -> list[Tensor]:
    keep = Shifts()
    with apply_guidance(pipe, [PatternGuide(tap, normalize=None)], observe=[keep]) as handle:
        assert CASES[name].run(pipe).isfinite().all()
    assert handle.skipped == 0
    return keep.seen


def cast_layers(pipe: Any, storage: torch.dtype) -> None:
    denoiser_of(pipe.to(torch.bfloat16)).enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.bfloat16)


PRECISIONS: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
    "float16": lambda pipe: pipe.to(torch.float16),
    "autocast": lambda pipe: None,
    "autocast of bfloat16": lambda pipe: pipe.to(torch.bfloat16),
    "layers in float8": lambda pipe: cast_layers(pipe, torch.float8_e4m3fn),
    "layers in bfloat16": lambda pipe: cast_layers(pipe, torch.bfloat16),
}

PRECISE_TAPS = [
    ("sd", "mid_block", True),
    ("sd", "x0/unet", False),
    ("sdxl", "up_blocks.0", False),
    ("dit", "transformer_blocks.1", True),
]


@cache
def exact_shifts(name: str, tap: str) -> list[Tensor]:
    return shifts(name, built(name), tap)


@pytest.mark.parametrize(("name", "tap", "apart"), PRECISE_TAPS)
@pytest.mark.parametrize("how", PRECISIONS)
def test_coarse_precisions_shift_as_float32_does(name: str, tap: str, apart: bool, how: str, part_by_part) -> None:
    part_by_part(apart)
    pipe = own(name)
    PRECISIONS[how](pipe)
    with torch.autocast("cpu", torch.bfloat16) if how.startswith("autocast") else nullcontext():
        found = shifts(name, pipe, tap)
    for mine, exact in zip(found, exact_shifts(name, tap), strict=True):
        assert F.cosine_similarity(mine.flatten(1), exact.flatten(1)).min() > 0.95
        assert 0.9 < mine.norm() / exact.norm() < 1.1


# ---- memory -------------------------------------------------------------------------------------------------------
def checkpointed(pipe: Any, *, reentrant: bool = False, training: bool = False) -> Any:
    run = lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=reentrant)  # noqa: E731
    denoiser_of(pipe).enable_gradient_checkpointing(run)
    denoiser_of(pipe).train(training)
    return pipe


def chunked(pipe: Any, dim: int) -> None:
    for module in denoiser_of(pipe).modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, dim)


def grouped(pipe: Any, level: str, folder: Path | None = None) -> None:
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    to_disk = {"offload_to_disk_path": str(folder)} if folder else {}
    apply_group_offloading(denoiser_of(pipe), CPU, CPU, level, **options, **to_disk)


SAVING: dict[str, Callable[[Any, Path], Any]] = {
    "checkpointing": lambda pipe, _: pipe.unet.enable_gradient_checkpointing(),
    "checkpointing in training": lambda pipe, _: checkpointed(pipe, training=True),
    "slices of one": lambda pipe, _: pipe.enable_attention_slicing(1),
    "chunks of tokens": lambda pipe, _: chunked(pipe, 1),
    "chunks of samples": lambda pipe, _: chunked(pipe, 0),
    "fused projections": lambda pipe, _: pipe.fuse_qkv_projections(),
    "channels last": lambda pipe, _: pipe.unet.to(memory_format=torch.channels_last),
    "sequential offloading": lambda pipe, _: cpu_offload(pipe.unet, CPU, offload_buffers=True),
    "model offloading": lambda pipe, _: cpu_offload_with_hook(pipe.unet, CPU),
    "groups of blocks": lambda pipe, _: grouped(pipe, "block_level"),
    "groups of leaves": lambda pipe, _: grouped(pipe, "leaf_level"),
    "groups of blocks on disk": lambda pipe, folder: grouped(pipe, "block_level", folder),
    "groups of leaves on disk": lambda pipe, folder: grouped(pipe, "leaf_level", folder),
    "checkpointing and offloading": lambda pipe, _: cpu_offload(checkpointed(pipe).unet, CPU),
}


@cache
def images_by_hand(name: str, tap: str) -> Tensor:
    case = dataclasses.replace(CASES[name], tap=tap)
    with by_hand(case, built(name), 0.7, "plain"):
        return case.run(built(name))


@both_ways(SAVING, [name for name in SAVING if "checkpointing" not in name])  # those never run in step
def test_what_saves_memory_changes_nothing(name: str, apart: bool, part_by_part, tmp_path: Path) -> None:
    part_by_part(apart)
    pipe, tap = own("sd"), "mid_block" if apart else "up_blocks.0"
    SAVING[name](pipe, tmp_path)
    torch.testing.assert_close(guided(PLAIN, pipe, tap=tap), images_by_hand("sd", tap), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["checkpointing", "blocks", "leaves", "model"])
def test_what_saves_memory_changes_nothing_of_a_transformer(how: str, tmp_path: Path) -> None:
    """The taps are inside of checkpoints here, and the blocks are the groups."""
    case, pipe = CASES["sd3"], own("sd3")
    {
        "checkpointing": lambda: checkpointed(pipe, training=True),
        "blocks": lambda: grouped(pipe, "block_level", tmp_path),
        "leaves": lambda: grouped(pipe, "leaf_level", tmp_path),
        "model": lambda: cpu_offload_with_hook(pipe.transformer, CPU),
    }[how]()
    torch.testing.assert_close(guided(case, pipe), images_by_hand("sd3", case.tap), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tap", ["mid_block", "mid_block.attentions.0", "mid_block.resnets.1", "x0/unet"])
def test_reentrant_checkpointing_gets_a_sentence(tap: str) -> None:
    """PyTorch's older kind takes no gradients of inputs; a tap inside of a checkpoint has no graph."""
    pipe = own("sd")
    checkpointed(pipe, reentrant=True)
    with pytest.raises(UserError, match="use_reentrant=True"):
        guided(PLAIN, pipe, tap=tap)
    assert torch.equal(guided(PLAIN, pipe, tap="x0"), guided(PLAIN, built("sd"), tap="x0"))


def test_checkpointing_of_layers_that_swap_their_weights_gets_a_sentence(tmp_path: Path) -> None:
    """PyTorch keeps frozen weights themselves when it computes a block again, not as they were then."""
    pipe = own("sd")
    grouped(pipe, "leaf_level", tmp_path)
    checkpointed(pipe)
    with pytest.raises(UserError, match=r"got both.*disable_gradient_checkpointing"):
        guided(PLAIN, pipe)
    pipe.unet.disable_gradient_checkpointing()
    torch.testing.assert_close(guided(PLAIN, pipe), images_by_hand("sd", "mid_block"), rtol=1e-3, atol=1e-4)


# ---- adapters -----------------------------------------------------------------------------------------------------
EMBEDDED = 6  # size of an image's embedding


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_ip_adapter(unet: Any, file: Path, seed: int) -> None:
    """Write an IP-Adapter of four tokens with random weights, as published ones are."""
    width = unet.config.cross_attention_dim
    image = {"proj.weight": (4 * width, EMBEDDED), "proj.bias": (4 * width,), "norm.weight": (width,)}
    state = {f"image_proj.{name}": 0.3 * randn(*shape, seed=seed) for name, shape in image.items()}
    state["image_proj.norm.bias"] = torch.zeros(width)
    layers = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for key, layer in enumerate(layers):
        shape = unet.get_submodule(layer).inner_dim, width
        for i, name in enumerate(("to_k_ip", "to_v_ip")):
            state[f"ip_adapter.{2 * key + 1}.{name}.weight"] = 0.3 * randn(*shape, seed=seed + 2 * key + i)
    save_file(state, file)


def ip_adapted(build: Callable[[], Any], folder: Path, number: int) -> Any:
    pipe, files = build(), [f"ip{i}.safetensors" for i in range(number)]
    for i, file in enumerate(files):
        write_ip_adapter(pipe.unet, folder / file, 10 * i)
    pipe.load_ip_adapter(str(folder), subfolder=[""] * number, weight_name=files, image_encoder_folder=None)
    pipe.set_ip_adapter_scale([0.8, 0.6][:number])
    return tiny.ready(pipe)


def embeds(number: int, parts: int = 2) -> dict[str, Any]:
    return {"ip_adapter_image_embeds": [randn(parts, 1, EMBEDDED, seed=i) for i in range(number)]}


def noisy(net: Any) -> Any:
    """Weights as after training: those that are zero before it are not."""
    torch.manual_seed(2)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
    return net


def t2i(number: int = 1) -> Any:
    """A UNet whose last block has no attention, as Stable Diffusion's, for which T2I-Adapters are."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(dict(tiny.unet().config) | blocks)
    adapters = [noisy(T2IAdapter(3, [8, 16], 1, 2, "full_adapter")) for _ in range(number)]
    adapter = adapters[0] if number == 1 else MultiAdapter(adapters)
    return tiny.with_parts(tiny.build_sd(unet=unet), StableDiffusionAdapterPipeline, adapter=adapter)


def t2i_xl() -> Any:
    adapter = noisy(T2IAdapter(3, [8, 16], 1, 4, "full_adapter_xl"))
    return tiny.with_parts(tiny.build_sdxl(), StableDiffusionXLAdapterPipeline, adapter=adapter)


def controlled_twice() -> Any:
    pipe = sd()
    nets = MultiControlNetModel([tiny.build_controlnet(pipe.unet) for _ in range(2)])
    return tiny.with_parts(pipe, StableDiffusionControlNetPipeline, controlnet=nets)


def union() -> Any:
    pipe = sdxl()
    names = (
        "in_channels", "down_block_types", "block_out_channels", "layers_per_block", "norm_num_groups",
        "cross_attention_dim", "attention_head_dim", "addition_embed_type", "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )  # fmt: skip
    own = {"num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}
    as_unet = {name: pipe.unet.config[name] for name in names}
    net = ControlNetUnionModel(**as_unet, **own, conditioning_embedding_out_channels=(8, 8))
    return tiny.with_parts(pipe, StableDiffusionXLControlNetUnionPipeline, controlnet=noisy(net))


TWO = [picture(), picture(1)]
LEFT = torch.cat([torch.ones(1, 1, 16, 8), torch.zeros(1, 1, 16, 8)], dim=3)
MASKED = {"cross_attention_kwargs": {"ip_adapter_masks": [LEFT]}}

ADAPTED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "ip": (lambda folder: ip_adapted(sd, folder, 1), embeds(1), "plain"),
    "ip, two": (lambda folder: ip_adapted(sd, folder, 2), embeds(2), "many"),
    "ip, masked": (lambda folder: ip_adapted(sd, folder, 1), embeds(1) | MASKED, "plain"),
    "ip, no cfg": (lambda folder: ip_adapted(sd, folder, 2), embeds(2, parts=1), "no cfg"),
    "ip, xl": (lambda folder: ip_adapted(sdxl, folder, 2), embeds(2) | SQUARE, "plain"),
    "t2i": (lambda _: t2i(), {"image": picture()}, "plain"),
    "t2i, many": (lambda _: t2i(), {"image": picture()}, "many"),
    "t2i, no cfg": (lambda _: t2i(), {"image": picture()}, "no cfg"),
    "t2i, two": (lambda _: t2i(2), {"image": TWO, "adapter_conditioning_scale": [0.5, 0.8]}, "plain"),
    "t2i, xl": (lambda _: t2i_xl(), {"image": picture()} | SQUARE, "plain"),
    "controlnets": (
        lambda _: controlled_twice(),
        {"image": TWO, "controlnet_conditioning_scale": [0.5, 0.8], "control_guidance_end": [0.4, 1.0]},
        "plain",
    ),
    "controlnets, guess": (lambda _: controlled_twice(), {"image": TWO, "guess_mode": True}, "plain"),
    "union": (lambda _: union(), {"control_image": [picture()], "control_mode": [3]}, "plain"),
    "union, two": (lambda _: union(), {"control_image": TWO, "control_mode": [3, 1]}, "plain"),
}


@both_ways(ADAPTED, ["ip, two", "ip, masked", "t2i, many", "t2i, xl", "controlnets", "union"])
def test_adapters_equal_the_full_graph_by_hand(name: str, apart: bool, part_by_part, tmp_path: Path) -> None:
    part_by_part(apart)
    build, options, variant = ADAPTED[name]
    check(Case(sd, options), build(tmp_path), variant)


def load_loras(pipe: Any, folder: Path) -> None:
    """Save two LoRAs, and load them."""
    peft = pytest.importorskip("peft")
    for i in range(2):
        torch.manual_seed(i)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        other, file = own("sd"), f"lora{i}.safetensors"
        other.unet.add_adapter(config)
        layers = peft.get_peft_model_state_dict(other.unet)
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name=file)
        pipe.load_lora_weights(str(folder), weight_name=file, adapter_name=f"lora{i}")


def test_two_loras_with_weights_and_a_scale(tmp_path: Path, part_by_part) -> None:
    pipe = own("sd")
    load_loras(pipe, tmp_path)
    pipe.set_adapters(["lora0", "lora1"], [0.7, 0.4])
    part_by_part(True)
    check(PLAIN, pipe)
    part_by_part(False)
    check(Case(sd, {"cross_attention_kwargs": {"scale": 0.5}}), pipe)


def test_loras_are_fused_and_switched_inside_the_context(tmp_path: Path) -> None:
    pipe = own("sd")
    load_loras(pipe, tmp_path)
    pipe.set_adapters(["lora0", "lora1"], [0.7, 0.4])

    def wanted() -> Tensor:
        with by_hand(PLAIN, pipe, 0.7, "plain"):
            return PLAIN.run(pipe)

    both, results = wanted(), []
    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.7)]):
        pipe.fuse_lora(adapter_names=["lora0", "lora1"])
        results.append(PLAIN.run(pipe))
        pipe.unfuse_lora()
        results.append(PLAIN.run(pipe))
        pipe.set_adapters(["lora1"], [1.0])
        one = PLAIN.run(pipe)
        pipe.disable_lora()
        none = PLAIN.run(pipe)
    for result in results:
        torch.testing.assert_close(result, both, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(none, images_by_hand("sd", "mid_block"), rtol=1e-3, atol=1e-4)
    pipe.enable_lora()
    torch.testing.assert_close(one, wanted(), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(one, both, atol=1e-3)


# ---- FreeU, and taps whose maps are written into ------------------------------------------------------------------
@contextmanager
def by_hand_at(pipe: Any, taps: Sequence[str], scale: float) -> Iterator[None]:
    """Guides at several taps, of any kind, from the graph of the whole batch of two parts."""
    unet, guide, schedule = pipe.unet, PatternGuide(), NoiseSchedule.from_scheduler(pipe.scheduler)
    original = unet.forward

    def forward(x: Tensor, t: Tensor, **others: Any) -> tuple[Tensor]:
        found: dict[str, Tensor] = {}
        names = {name for tap in taps if not tap.startswith("x0") for name in tap.split("+")}

        def keep(name: str, module: Any, given: Any, output: Any) -> None:
            found[name] = read_output(output).clone()

        hooks = [unet.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_(True)
            (prediction,) = original(leaf, t, **others)
            total = torch.zeros_like(x[1:])
            for tap in taps:
                if tap.startswith("x0"):
                    alpha, sigma = (v.float() for v in schedule.alpha_sigma(t))
                    noise = prediction if tap == "x0/unet" else prediction.detach()
                    h = (leaf - sigma * noise) / alpha
                else:
                    h = join_maps([found[name] for name in tap.split("+")])
                conditional = h[1:].detach().requires_grad_(True)
                (g,) = torch.autograd.grad(guide.score(conditional, t).sum(), conditional)
                total += torch.autograd.grad(h[1:], leaf, unit_rms(g), retain_graph=True)[0][1:]
        for hook in hooks:
            hook.remove()
        prediction = prediction.detach()
        size = scale * len(taps) ** 0.5 * rms(prediction[1:] - prediction[:1])
        return (prediction - size * unit_rms(total),)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward


@cache
def with_freeu() -> Any:
    pipe = sd()
    pipe.enable_freeu(s1=0.9, s2=0.6, b1=1.5, b2=1.6)
    return pipe


WRITTEN = [
    ("mid_block",),
    ("up_blocks.0",),
    ("x0",),
    ("x0/unet",),
    ("mid_block+up_blocks.0",),
    ("down_blocks.1+mid_block",),
    ("mid_block", "up_blocks.0"),
    ("mid_block", "x0"),
    ("up_blocks.0", "x0/unet"),
]


def check_at(pipe: Any, taps: Sequence[str], case: Case) -> None:
    guides: list[Guide] = [PatternGuide(tap, guidance_scale=0.7) for tap in taps]
    with apply_guidance(pipe, guides):
        result = case.run(pipe)
    with by_hand_at(pipe, taps, 0.7):
        torch.testing.assert_close(result, case.run(pipe), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(result, case.run(pipe), atol=1e-3)


@both_ways(WRITTEN, [WRITTEN[0], WRITTEN[4], WRITTEN[8]])
def test_freeu_writes_into_maps_after_they_are_read(name: tuple[str, ...], apart: bool, part_by_part) -> None:
    part_by_part(apart)
    check_at(with_freeu(), name, PLAIN)


@both_ways([("down_blocks.1+mid_block",), ("down_blocks.1", "x0/unet")], [("down_blocks.1+mid_block",)])
def test_t2i_adapters_write_into_maps_after_they_are_read(name: tuple[str, ...], apart: bool, part_by_part) -> None:
    part_by_part(apart)
    check_at(t2i(), name, Case(t2i, {"image": picture()}))


@torch.no_grad()
@pytest.mark.parametrize("tap", ["mid_block", "up_blocks.0", "mid_block+up_blocks.0", "up_blocks.0+up_blocks.1"])
def test_freeu_captures_what_is_encoded(tap: str) -> None:
    unet, x, text = with_freeu().unet, randn(2, 4, 8, 8), randn(2, 3, tiny.WIDTH, seed=1)
    maps: dict[str, Tensor] = {}
    names = tap.split("+")
    hooks = [
        unet.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: maps.update({name: out.clone()}))
        for name in names
    ]
    with capture(unet, [tap]) as found:
        unet(x, 500, text)
    for hook in hooks:
        hook.remove()
    assert torch.equal(found[tap], join_maps([maps[name] for name in names]))
    assert torch.equal(encode_features(unet, x, 500, text, tap=tap), found[tap])


# ---- options of calls ---------------------------------------------------------------------------------------------
STATES = {"prompt_embeds": randn(1, 5, tiny.WIDTH), "negative_prompt_embeds": randn(1, 5, tiny.WIDTH, seed=1)}
STATES_XL = {
    "prompt_embeds": randn(1, 5, 2 * tiny.WIDTH),
    "negative_prompt_embeds": randn(1, 5, 2 * tiny.WIDTH, seed=1),
    "pooled_prompt_embeds": randn(1, tiny.WIDTH, seed=2),
    "negative_pooled_prompt_embeds": randn(1, tiny.WIDTH, seed=3),
}

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "latents": ("sd", {"latents": randn(1, 4, 8, 8)}),
    "rescaled": ("sd", {"guidance_rescale": 0.7}),
    "eta": ("sd", {"eta": 0.5}),
    "wide": ("sd", {"height": 16, "width": 32}),
    "states": ("sd", STATES | {"num_images_per_prompt": 2}),
    "xl, states": ("sdxl", STATES_XL),
    "xl, rescaled": ("sdxl", {"guidance_rescale": 0.7}),
    "xl, clip skip": ("sdxl", {"clip_skip": 1}),
    "xl, ends early": ("sdxl", {"denoising_end": 0.6, "num_inference_steps": 4}),
    "xl, sizes": ("sdxl", {"original_size": (64, 32), "crops_coords_top_left": (4, 8)}),
    "xl, sigmas": ("sdxl", {"sigmas": [10.0, 3.0, 0.5]}),
    "ddim, clipped": ("ddim", {"use_clipped_model_output": True, "eta": 0.5}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_calls_equal_the_full_graph_by_hand(name: str) -> None:
    kind, options = OPTIONS[name]
    case = CASES[kind]
    case = dataclasses.replace(
        case, options=case.options | options, prompted=case.prompted and "prompt_embeds" not in options
    )
    check(case, built(kind), "plain" if case.parts > 1 else "no cfg")


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ancestral": EulerAncestralDiscreteScheduler.from_config,
    "ddpm": DDPMScheduler.from_config,
    "karras": partial(DPMSolverMultistepScheduler.from_config, use_karras_sigmas=True),
    "lcm": LCMScheduler.from_config,
    "tcd": TCDScheduler.from_config,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_with_noise_or_other_spacing(name: str) -> None:
    pipe = own("sd")
    pipe.scheduler = SCHEDULERS[name](pipe.scheduler.config)
    check(Case(sd, {"num_inference_steps": 3}), pipe)


def test_clipped_outputs_of_a_scheduler_that_clips() -> None:
    pipe = ddim()
    pipe.scheduler = DDIMScheduler(clip_sample=True)
    options = CASES["ddim"].options | {"use_clipped_model_output": True, "eta": 0.5}
    check(dataclasses.replace(CASES["ddim"], options=options), pipe, "no cfg")


@pytest.mark.parametrize("kind", ["text", "image", "Stable Diffusion"])
def test_consistency_models_take_the_guidance_scale_as_a_condition(kind: str) -> None:
    """One part, whose ``timestep_cond`` has an embedding of the guidance scale for each sample."""
    classes = {"text": LatentConsistencyModelPipeline, "image": LatentConsistencyModelImg2ImgPipeline}
    pipe = tiny.build_sd(unet=tiny.unet(time_cond_proj_dim=8))
    options = {"guidance_scale": 8.5, "num_images_per_prompt": 3}
    if kind in classes:
        pipe = tiny.with_parts(pipe, classes[kind], scheduler=LCMScheduler.from_config(pipe.scheduler.config))
    if kind == "image":
        options |= {"image": picture(), "strength": 0.6, "num_inference_steps": 3}
    check(Case(sd, options, parts=1, conditional=0), pipe, "no cfg")


def test_pipelines_that_share_parts_are_guided_with_them() -> None:
    pipe = own("sd")
    copies = [
        ("sd", lambda: StableDiffusionPipeline.from_pipe(pipe)),
        ("sd", lambda: StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)),
        ("sd-img2img", lambda: StableDiffusionImg2ImgPipeline.from_pipe(pipe)),
        ("sd-inpaint", lambda: AutoPipelineForInpainting.from_pipe(pipe)),
        (
            "sd-controlnet",
            lambda: StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=tiny.build_controlnet(pipe.unet)),
        ),
    ]
    found = []
    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.7)]):
        for name, build in copies:
            other = build()
            other.set_progress_bar_config(disable=True)
            found.append((CASES[name], other, CASES[name].run(other)))
    for case, other, result in found:
        with by_hand(case, other, 0.7, "plain"):
            torch.testing.assert_close(result, case.run(other), rtol=1e-3, atol=1e-4)


# ---- runs that end early ------------------------------------------------------------------------------------------
class End(Exception):
    """Ends a run."""


@dataclasses.dataclass(eq=False)
class FragileGuide(PatternGuide):
    """Raises an error once it has scored so many times."""

    left: int = 1000
    error: BaseException | None = None

    def score(self, h: Tensor, t: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0 and self.error is not None:
            self.left, error = 1000, self.error
            raise error
        return super().score(h, t)


@contextmanager
def raising(module: nn.Module, error: BaseException, call: int) -> Iterator[None]:
    calls = itertools.count()

    def hook(module: nn.Module, given: Any) -> None:
        if next(calls) == call:
            raise error

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def end_early(pipe: Any, guide: FragileGuide, where: str, error: BaseException) -> None:
    """Begin a run that an error or an interruption ends early."""

    def callback(pipe: Any, step: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = where == "interrupt" and step == 1
        if where == "callback" and step == 1:
            raise error
        return given

    case = Case(sd, {"callback_on_step_end": callback, "num_inference_steps": 3})
    if where == "interrupt":
        case.run(pipe)
        return
    if where == "score":
        guide.left, guide.error = 1, error
    place = raising(pipe.unet.get_submodule(where), error, 2) if where in BLOCKS else nullcontext()
    with pytest.raises(type(error)), place:
        case.run(pipe)


BLOCKS = ["conv_in", "mid_block", "up_blocks.0", "conv_out"]
PLACES = ["interrupt", "callback", "score", *BLOCKS]


@pytest.mark.parametrize(
    ("options", "apart"),
    [
        ({"every": 2}, False),
        ({"space": "x", "normalize": None, "guidance_scale": 3.0}, True),
        ({"tap": "x0/unet"}, True),
    ],
    ids=["every second", "moved latents", "x0"],
)
def test_a_run_that_ends_early_leaves_nothing_to_the_next(options: dict[str, Any], apart: bool, part_by_part) -> None:
    part_by_part(apart)
    pipe, plain = own("sd"), PLAIN.run(built("sd"))
    with apply_guidance(pipe, [FragileGuide(**options)]) as handle:
        wanted = PLAIN.run(pipe)
    counts = handle.steps, handle.gradients, handle.pushes
    for i, where in enumerate(PLACES):
        error = KeyboardInterrupt() if i % 2 else End()
        guide = FragileGuide(**options)
        with apply_guidance(pipe, [guide]) as handle:
            end_early(pipe, guide, where, error)
            assert torch.equal(PLAIN.run(pipe), wanted), where
            assert (handle.steps, handle.gradients, handle.pushes) == counts
            end_early(pipe, guide, where, error)
        assert "forward" not in vars(pipe.unet) and "step" not in vars(pipe.scheduler)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
        assert torch.is_grad_enabled() and torch.equal(PLAIN.run(pipe), plain)
