"""apply_guidance beside what users switch on: slicing, checkpointing, compiling, offloading, half precision, LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import make_head
from diffusers import IPNDMScheduler, StableDiffusionUpscalePipeline
from test_diffusers_pipelines import CASES, PatternGuide
from torch import Tensor, nn
from torch.nn import functional as F

from guidance.apply import apply_guidance
from guidance.guides import MidBlockGuide
from guidance.models.denoiser import device_of, fingerprint_of
from guidance.taps.lockstep import NotInStepError, lockstep
from guidance.utils.errors import UserError


@pytest.fixture
def pipe() -> Any:
    """Stable Diffusion, its own copy for each test."""
    return tiny.build_sd()


def guided(pipe: Any, name: str = "sd", variant: str = "plain", tap: str | None = None, **options: Any) -> Tensor:
    guide = PatternGuide(tap or CASES[name].tap, **{"guidance_scale": 0.7} | options)
    with apply_guidance(pipe, [guide]) as handle:
        result = CASES[name].run(pipe, variant)
    assert len(handle.records) == 2
    return result


@pytest.mark.parametrize("in_step", [False, True])
def test_slicing_and_checkpointing_change_nothing(pipe: Any, in_step: bool, monkeypatch) -> None:
    monkeypatch.setattr("guidance.apply.guided.IN_STEP_WEIGHTS", 0 if in_step else 10**9)
    plain, wanted = CASES["sd"].run(pipe), guided(pipe)
    deep = guided(pipe, guidance_scale=0.5)
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(guided(pipe), wanted, rtol=1e-4, atol=1e-5)
    pipe.disable_attention_slicing()
    pipe.unet.enable_gradient_checkpointing()
    torch.testing.assert_close(guided(pipe), wanted, rtol=1e-4, atol=1e-5)
    pipe.unet.train()
    torch.testing.assert_close(guided(pipe, guidance_scale=0.5), deep, rtol=1e-4, atol=1e-5)
    assert torch.equal(CASES["sd"].run(pipe), plain)


def test_parts_in_step_refuse_to_write_into_one_tensor() -> None:
    parts = lockstep([torch.ones(2), torch.zeros(2)], 1)
    for write in (lambda x: torch.zeros(2).add_(x), lambda x: torch.zeros(2).__setitem__(slice(0, 2), x)):
        with pytest.raises(NotInStepError):
            write(parts)


COMPILED: dict[str, Callable[[Any], Any]] = {
    "wrapped": lambda net: torch.compile(net, backend="eager"),
    "in place": lambda net: net.compile(backend="eager"),
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_denoiser_is_guided_although_it_ran_before(how: str) -> None:
    """A graph compiled before guidance came must not run in its place."""
    pipe = tiny.build_dit(num_layers=2)

    def run() -> Tensor:
        return CASES["dit"].run(pipe, "no cfg")

    plain, wanted = run(), {tap: guided(pipe, "dit", "no cfg", tap) for tap in (None, "x0")}
    torch._dynamo.reset()
    compiled = COMPILED[how](pipe.transformer)
    pipe.transformer = pipe.transformer if compiled is None else compiled
    for tap, images in wanted.items():
        torch.testing.assert_close(run(), plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(guided(pipe, "dit", "no cfg", tap), images, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain, images, atol=1e-3)


def test_compiled_blocks_beside_the_taps_stay_compiled() -> None:
    """What pipe.unet.compile_repeated_blocks() makes of blocks."""
    pipe, ran = tiny.build_dit(), []

    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: ran.append(torch.is_grad_enabled()) or graph(*args)

    wanted = guided(pipe, "dit", "no cfg")
    torch._dynamo.reset()
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend=backend)
    torch.testing.assert_close(guided(pipe, "dit", "no cfg"), wanted, rtol=1e-4, atol=1e-5)
    assert {True, False} == set(ran)  # the block before the tap with a graph, the one after it without
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.transformer_blocks)


@pytest.mark.parametrize("how", ["sequential", "model"])
def test_offloading_hooks_of_accelerate(pipe: Any, how: str) -> None:
    """What pipe.enable_sequential_cpu_offload() and enable_model_cpu_offload() put around each module."""
    head = make_head(pipe, in_channels=16)
    plain = CASES["sd"].run(pipe)
    guides = [MidBlockGuide(head, 1.0, start=0, stop=1)]
    with apply_guidance(pipe, guides):
        wanted = CASES["sd"].run(pipe)
    pipe.unet.conv_in.weight.requires_grad_(True)
    if how == "sequential":
        cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
        assert pipe.unet.device.type == "meta" and fingerprint_of(pipe) is None
    else:
        cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    hooked = vars(pipe.unet)["forward"]
    assert device_of(pipe).type == "cpu"
    with apply_guidance(pipe, guides):
        assert torch.equal(CASES["sd"].run(pipe), wanted)
        assert not pipe.unet.conv_in.weight.requires_grad
    assert vars(pipe.unet)["forward"] is hooked and pipe.unet.conv_in.weight.requires_grad
    assert torch.equal(CASES["sd"].run(pipe), plain) and not torch.allclose(wanted, plain, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pipelines_with_a_float32_head(pipe: Any, dtype: torch.dtype) -> None:
    head = make_head(pipe, in_channels=16)
    guide = MidBlockGuide(head, 1.0, start=0, stop=1)
    moves = []
    for own in (pipe, copy.deepcopy(pipe).to(dtype)):
        plain = CASES["sd"].run(own)
        with apply_guidance(own, [MidBlockGuide(head, 0.0)]):
            assert torch.equal(CASES["sd"].run(own), plain)
        with apply_guidance(own, [guide]) as handle:
            moved = CASES["sd"].run(own)
        assert moved.dtype == own.unet.dtype and handle.skipped == 0
        assert handle.records[0].shift_rms.dtype == torch.float32 == next(head.parameters()).dtype
        moves.append((moved.float() - plain.float()).flatten())
    assert F.cosine_similarity(*moves, dim=0) > 0.95
    assert 0.9 < moves[1].norm() / moves[0].norm() < 1.1


class LowRank(nn.Module):
    """A linear layer with a low-rank update beside it, as LoRA loaders leave it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.8 * self.up(self.down(x))

    def fused(self) -> nn.Linear:
        base = copy.deepcopy(self.base_layer)
        base.weight.data += 0.8 * self.up.weight @ self.down.weight
        return base


@pytest.mark.parametrize("in_step", [False, True])
def test_low_rank_updates_are_differentiated_too(pipe: Any, in_step: bool, monkeypatch) -> None:
    monkeypatch.setattr("guidance.apply.guided.IN_STEP_WEIGHTS", 0 if in_step else 10**9)
    torch.manual_seed(0)
    without = guided(pipe)
    attentions = [m for name, m in pipe.unet.named_modules() if name.endswith(("attn1", "attn2"))]
    for attention in attentions:
        attention.to_q, attention.to_v = LowRank(attention.to_q), LowRank(attention.to_v)
    got = guided(pipe)
    for attention in attentions:
        attention.to_q, attention.to_v = attention.to_q.fused(), attention.to_v.fused()
    torch.testing.assert_close(got, guided(pipe), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, without, atol=1e-4)


def test_a_lora_loaded_by_diffusers(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    got = guided(pipe)
    trainable = [p.requires_grad for p in pipe.unet.parameters()]
    assert any(trainable) and not all(trainable)  # as diffusers left them
    pipe.unet.fuse_lora()
    torch.testing.assert_close(got, guided(pipe), rtol=1e-4, atol=1e-5)


# ---- bad input ----------------------------------------------------------------------------------------------------
def test_a_pipeline_that_is_not_supported_gets_a_sentence(pipe: Any) -> None:
    kind = StableDiffusionUpscalePipeline
    other = tiny.with_parts(pipe, kind, low_res_scheduler=pipe.scheduler)
    with pytest.raises(UserError, match="got StableDiffusionUpscale"), apply_guidance(other, [PatternGuide()]):
        pass


def test_a_scheduler_without_a_noise_schedule_gets_a_sentence(pipe: Any) -> None:
    pipe.scheduler = IPNDMScheduler()
    with pytest.raises(UserError, match="noise schedule"), apply_guidance(pipe, [PatternGuide()]):
        CASES["sd"].run(pipe)
    assert "forward" not in vars(pipe.unet)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_out_of_memory_says_what_to_turn(pipe: Any, kind: str) -> None:
    class Greedy(PatternGuide):
        def score(self, h: Tensor, t: Tensor) -> Tensor:
            if kind == "gpu":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return torch.empty(2**55)

    with pytest.raises(UserError, match=r"(?s)batch smaller.*slicing.*every=") as error:
        guided_by = apply_guidance(pipe, [Greedy()])
        with guided_by:
            CASES["sd"].run(pipe)
    assert isinstance(error.value.__cause__, RuntimeError) and "forward" not in vars(pipe.unet)


def test_other_errors_stay_what_they_are_and_videos_are_refused(pipe: Any) -> None:
    with apply_guidance(pipe, [PatternGuide()], parts=1), pytest.raises(RuntimeError, match="4 channels"):
        pipe.unet(torch.zeros(1, 5, 8, 8), 1, encoder_hidden_states=torch.zeros(1, 3, tiny.WIDTH))
    pipe.scheduler.set_timesteps(2)
    with apply_guidance(pipe, [PatternGuide()], parts=1), pytest.raises(UserError, match=r"samples \(b, c, y, x\)"):
        pipe.unet(torch.zeros(1, 4, 2, 8, 8), 1, encoder_hidden_states=torch.zeros(1, 3, tiny.WIDTH))
