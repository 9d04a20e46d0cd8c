"""Faults that gave wrong images without a word: each with the right value, or the sentence that it gets now.

The reference is a graph of the whole denoiser, written by hand here.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import (
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from test_diffusers_pipelines import CASES, INPAINT, PROMPTS, PatternGuide, by_hand, picture, sd
from torch import Tensor, nn

from guidance.apply import MoveLatents, apply_guidance
from guidance.apply.guided import rms, unit_rms
from guidance.models.denoiser import denoiser_of
from guidance.schedule import NoiseSchedule, StepPlan
from guidance.taps import capture
from guidance.utils.errors import UserError

RAW = {"normalize": None}


@pytest.fixture
def pipe() -> Any:
    return sd()


def states(batch: int, seed: int = 5) -> Tensor:
    return torch.randn(batch, 3, tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


def noise(batch: int = 1, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(2))


def gradient_by_hand(unet: Any, guide: Any, x: Tensor, t: Any, text: Tensor, **others: Any) -> Tensor:
    found: list[Tensor] = []
    hook = unet.get_submodule(guide.tap).register_forward_hook(lambda module, given, output: found.append(output))
    leaf = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        unet(leaf, t, encoder_hidden_states=text, **others)
        (g,) = torch.autograd.grad(guide.score(found[0].float(), torch.zeros(len(x))).sum(), leaf)
    hook.remove()
    return g


# ---- S1, S2: whose batch is it ------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_loop_of_ones_own_says_its_parts(pipe: Any) -> None:
    pipe.scheduler.set_timesteps(4)
    x, t, text = noise(), pipe.scheduler.timesteps[1], states(2)
    both = lambda: pipe.unet(torch.cat([x, x]), t, text).sample  # noqa: E731
    plain = both()
    with apply_guidance(pipe, [PatternGuide()]), pytest.raises(UserError, match=r"parts=2.*or parts=1"):
        both()
    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.7)], parts=2):
        guided = both()
    g = gradient_by_hand(pipe.unet, PatternGuide(), x, t, text[1:])
    shift = -0.7 * rms(plain[1:] - plain[:1]) * unit_rms(g)
    torch.testing.assert_close(guided - plain, torch.cat([shift, shift]), rtol=1e-3, atol=1e-5)
    with apply_guidance(pipe, [PatternGuide()]):  # a call of the pipeline before it changes nothing
        pipe(PROMPTS[0], num_inference_steps=1, output_type="latent")
        with pytest.raises(UserError, match="parts=2"):
            both()


def test_a_class_of_ones_own_without_the_property_says_its_parts(pipe: Any) -> None:
    class Own:
        def __init__(self) -> None:
            self.unet, self.scheduler = pipe.unet, pipe.scheduler

        @torch.no_grad()
        def __call__(self) -> Tensor:
            self.scheduler.set_timesteps(2)
            return self.unet(noise(), self.scheduler.timesteps[0], states(1)).sample

    own = Own()
    with apply_guidance(own, [PatternGuide()]), pytest.raises(UserError, match="do_classifier_free_guidance"):
        own()
    with apply_guidance(own, [PatternGuide()], parts=1) as handle:
        own()
    assert handle.gradients == 1


@pytest.mark.parametrize("weights", [(7.5, 1.0), (1.0, 7.5)])
def test_the_running_pipeline_is_asked_not_the_one_that_is_guided(pipe: Any, weights: tuple[float, float]) -> None:
    """Another pipeline with the same denoiser has its own classifier-free guidance and scheduler."""
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    other.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        options = {"num_inference_steps": 4, "strength": 0.7, "guidance_scale": weights[1], "output_type": "latent"}
        return other(PROMPTS[0], image=picture(), generator=torch.Generator().manual_seed(0), **options).images

    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.7)]):
        options = {"num_inference_steps": 2, "guidance_scale": weights[0], "output_type": "latent"}
        pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **options)
        guided = run()
    with by_hand(CASES["sd"], other, 0.7, "plain" if weights[1] > 1 else "no cfg"):
        wanted = run()
    torch.testing.assert_close(guided, wanted, rtol=1e-3, atol=1e-4)


# ---- S5: a gradient that is none ----------------------------------------------------------------------------------
class Quick(AttnProcessor2_0):
    """An attention without a gradient."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs).detach()


class Half(AttnProcessor2_0):
    """An attention whose residual has a gradient, and whose values have none."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().__call__(attn, hidden_states, *args, **kwargs)
        return hidden_states + (out - hidden_states).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_a_gradient_is_named_before_the_first_step(pipe: Any, dtype: torch.dtype) -> None:
    pipe.unet.to(dtype)
    pipe.scheduler.set_timesteps(4)
    sharp = {"normalize": None, "guidance_scale": 1.0}
    pipe.unet.set_attn_processor(Quick())
    for module in pipe.unet.modules():  # let attention matter in this random network
        if type(module).__name__ == "Attention":
            nn.init.normal_(module.to_out[0].weight, std=1.0)
    call = lambda: pipe.unet(noise().to(dtype), pipe.scheduler.timesteps[2], states(1).to(dtype))  # noqa: E731
    with torch.no_grad(), apply_guidance(pipe, [PatternGuide(**sharp)], parts=1):
        if dtype == torch.float32:
            with pytest.raises(UserError, match=r"finite differences.*attn.*Quick.*set_attn_processor"):
                call()
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with torch.no_grad(), apply_guidance(pipe, [PatternGuide(**sharp)], parts=1) as handle:
        call()
    assert handle.gradients == 1


def test_a_residual_with_a_gradient_does_not_hide_values_without(pipe: Any) -> None:
    pipe.scheduler.set_timesteps(4)
    pipe.unet.set_attn_processor(Half())
    for module in pipe.unet.modules():
        if type(module).__name__ == "Attention":
            nn.init.normal_(module.to_out[0].weight, std=1.0)
    with torch.no_grad(), apply_guidance(pipe, [PatternGuide()], parts=1):
        with pytest.raises(UserError, match="finite differences"):
            pipe.unet(noise(), pipe.scheduler.timesteps[2], states(1))


def test_features_without_any_gradient_and_gradients_that_are_not_finite_get_a_sentence(pipe: Any) -> None:
    pipe.scheduler.set_timesteps(4)
    t = pipe.scheduler.timesteps[2]
    first = pipe.unet.conv_in.forward
    pipe.unet.conv_in.forward = lambda x: first(x).detach()
    with torch.no_grad(), apply_guidance(pipe, [PatternGuide()], parts=1):
        with pytest.raises(UserError, match="carry no gradient"):
            pipe.unet(noise(), t, states(1))
    del pipe.unet.conv_in.forward

    class Sick(PatternGuide):
        def score(self, h: Tensor, t: Tensor) -> Tensor:
            return super().score(h, t) * torch.nan

    with torch.no_grad(), apply_guidance(pipe, [Sick()], parts=1), pytest.raises(UserError, match="finite gradient"):
        pipe.unet(noise(), t, states(1))


# ---- S6, S12: casts and compilation -------------------------------------------------------------------------------
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting_gives_the_gradient_of_the_weights_as_they_compute(pipe: Any, storage: torch.dtype) -> None:
    pipe.scheduler.set_timesteps(4)
    x, t, text, guide = noise(), pipe.scheduler.timesteps[2], states(1), PatternGuide(**RAW)
    exact = sd()
    exact.unet.load_state_dict(pipe.unet.state_dict())
    pipe.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    for mine, theirs in zip(exact.unet.parameters(), pipe.unet.parameters(), strict=True):
        mine.data = theirs.data.float()  # the weights that are stored
    with torch.no_grad(), apply_guidance(pipe, [guide], parts=1) as handle:
        pipe.unet(x, t, text)
    wanted = gradient_by_hand(exact.unet, guide, x, t, text).flatten(1).norm(dim=1)
    torch.testing.assert_close(handle.records[0].grad_norm, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_denoiser_compiled_inside_the_context_is_guided(pipe: Any, wrapped: bool) -> None:
    def run() -> Tensor:
        options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
        return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images

    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.7)]):
        wanted = run()
        if wrapped:
            pipe.unet = torch.compile(pipe.unet, backend="eager")
        else:
            pipe.unet.compile(backend="eager")
        guided = run()
    torch.testing.assert_close(guided, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapped", [True, False])
def test_capture_reads_a_compiled_denoiser(pipe: Any, wrapped: bool) -> None:
    x, text = noise(), states(1)
    with torch.no_grad(), capture(pipe.unet) as plain:
        pipe.unet(x, 5, text)
    unet = torch.compile(pipe.unet, backend="eager") if wrapped else pipe.unet
    if not wrapped:
        pipe.unet.compile(backend="eager")
    with torch.no_grad(), capture(unet) as found:
        unet(x, 5, text)
    torch.testing.assert_close(found["mid_block"], plain["mid_block"])


# ---- S9: what is left of a run ------------------------------------------------------------------------------------
def test_nothing_of_a_run_reaches_the_next(pipe: Any) -> None:
    image = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image.set_progress_bar_config(disable=True)
    guide = PatternGuide(guidance_scale=0.7, every=2)

    def run(seed: int, size: int = 16, stop: bool = False, steps: int = 2) -> Tensor:
        def end(p: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            image._interrupt = stop
            return given

        shown = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))
        options = {"num_inference_steps": steps, "strength": 1 / steps, "guidance_scale": 3.0, "output_type": "latent"}
        generator = torch.Generator().manual_seed(0)
        return image(PROMPTS[0], image=shown, generator=generator, callback_on_step_end=end, **options).images

    with apply_guidance(image, [guide]):
        alone = run(2)
    with apply_guidance(image, [guide]) as handle:
        run(1)
        run(1, size=32)
        run(1, stop=True)
        assert torch.equal(run(2), alone)
    assert handle.steps == handle.gradients == handle.pushes == 1


# ---- S10: exchanged parts -----------------------------------------------------------------------------------------
def test_an_exchanged_scheduler_is_followed_and_an_exchanged_denoiser_gets_a_sentence(pipe: Any) -> None:
    def run() -> Tensor:
        options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
        return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images

    other = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.7)]) as handle:
        run()
        pipe.scheduler = other
        guided = run()
    assert handle.pushes == 3
    with by_hand(CASES["sd"], pipe, 0.7, "plain"):
        torch.testing.assert_close(guided, run(), rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="another one now"), apply_guidance(pipe, [PatternGuide()]):
        pipe.unet = tiny.unet()
        run()
    assert "forward" not in vars(denoiser_of(pipe))


def test_an_exchanged_scheduler_moves_the_latents_too(pipe: Any) -> None:
    guide = PatternGuide(guidance_scale=3.0, space="x", **RAW)

    def run() -> Tensor:
        options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
        return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with apply_guidance(pipe, [guide]):
        wanted = run()
    first, second = (DDIMScheduler.from_config(pipe.scheduler.config) for _ in range(2))
    pipe.scheduler = first
    with apply_guidance(pipe, [guide]) as handle:
        pipe.scheduler = second
        assert torch.equal(run(), wanted) and handle.pushes == 3
    assert "step" not in vars(first) and "step" not in vars(second)


def test_a_forward_that_takes_off_its_own_hooks_does_not_take_off_guidance(pipe: Any) -> None:
    """As group offloading with streams does in its first forward, once it knows the order of the modules."""
    unet = pipe.unet
    hooked, plain = (lambda *args, **kwargs: type(unet).forward(unet, *args, **kwargs) for _ in range(2))

    def first(*args: Any, **kwargs: Any) -> Any:
        unet.forward = plain
        return hooked(*args, **kwargs)

    def run() -> Tensor:
        options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
        return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images

    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.7)]):
        wanted = run()
    for options in ({}, {"start": 0.5}):
        unet.forward = first
        with apply_guidance(pipe, [PatternGuide(guidance_scale=0.7, **options)]) as handle:
            guided = run()
        assert handle.pushes == (1 if options else 3) and unet.forward is plain
        assert options or torch.equal(guided, wanted)
    del unet.forward


# ---- S11: steps and calls, see tests/test_solver_steps.py ---------------------------------------------------------
def test_latents_move_only_where_a_solver_step_starts_and_are_read_at_its_timestep(pipe: Any) -> None:
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    guide, seen = PatternGuide(guidance_scale=3.0, space="x", **RAW), []

    class Watching(PatternGuide):
        def score(self, h: Tensor, t: Tensor) -> Tensor:
            seen.append(float(t[0]))
            return super().score(h, t)

    guide = Watching(guidance_scale=3.0, space="x", **RAW)
    callback = MoveLatents(pipe, [guide])
    pipe(PROMPTS[0], num_inference_steps=4, output_type="latent", callback_on_step_end=callback)
    times = pipe.scheduler.timesteps.tolist()  # t0, t1 (again from t0), t1, t2, t3
    assert seen == times[2:] and callback.handle.pushes == 3


# ---- S13: threads -------------------------------------------------------------------------------------------------
def test_two_threads_that_share_a_denoiser_get_a_sentence_and_leave_nothing(pipe: Any) -> None:
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    inside, found = threading.Event(), []

    def second() -> None:
        inside.wait()
        for attempt in (lambda: apply_guidance(other, [PatternGuide()]).__enter__(), lambda: unguided()):
            try:
                attempt()
            except UserError as error:
                found.append(str(error))

    def unguided() -> Any:
        other.set_progress_bar_config(disable=True)
        return other(PROMPTS[0], image=picture(), num_inference_steps=2, output_type="latent")

    thread = threading.Thread(target=second)
    thread.start()
    with apply_guidance(pipe, [PatternGuide()]):
        inside.set()
        thread.join()
        pipe(PROMPTS[0], num_inference_steps=1, output_type="latent")
    assert "in another thread" in found[0] and "got one in another" in found[1] and len(found) == 2
    assert "forward" not in vars(pipe.unet)


def test_threads_with_denoisers_of_their_own_are_guided_alike() -> None:
    pipes, results = [sd(), sd()], {}
    pipes[1].unet.load_state_dict(pipes[0].unet.state_dict())

    def work(i: int) -> None:
        with apply_guidance(pipes[i], [PatternGuide(guidance_scale=0.7)]):
            generator = torch.Generator().manual_seed(0)
            results[i] = pipes[i](PROMPTS[0], num_inference_steps=3, output_type="latent", generator=generator).images

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(results[0], results[1])


# ---- S14: nothing to scale by -------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_prompt_equal_to_the_negative_prompt_scales_by_eps(pipe: Any) -> None:
    """One sample of two; the other keeps the difference of classifier-free guidance."""
    pipe.scheduler.set_timesteps(4)
    x, t, text = noise(2), pipe.scheduler.timesteps[1], states(4)
    text[2] = text[0]
    call = lambda: pipe.unet(torch.cat([x, x]), t, text).sample  # noqa: E731
    plain = call()
    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.7)], parts=2), pytest.warns(UserWarning, match="equals"):
        guided = call()
    eps = NoiseSchedule.from_scheduler(pipe.scheduler).to_eps(plain[2:], x, t)
    size = torch.cat([rms(eps[:1]), rms(plain[3:] - plain[1:2])])
    torch.testing.assert_close(rms(guided - plain)[2:], 0.7 * size, rtol=1e-3, atol=0)


# ---- S16: masks ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("space", [{}, {"space": "x", "normalize": None, "guidance_scale": 30.0}])
def test_inpainting_is_pushed_inside_the_mask_only(space: dict[str, Any]) -> None:
    pipe = sd(StableDiffusionInpaintPipeline, 9)
    options = INPAINT | {"num_inference_steps": 1, "strength": 1.0, "guidance_scale": 3.0, "output_type": "latent"}

    def run() -> Tensor:
        return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images

    plain = run()
    with apply_guidance(pipe, [PatternGuide(**{"guidance_scale": 0.7} | space)]):
        moved = (run() - plain).abs().amax(1)[0]
    assert moved[2:6, 2:6].min() > 1e-4
    moved[2:6, 2:6] = 0
    assert moved.max() < 1e-4


# ---- timesteps ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_timestep_that_is_not_the_schedulers_gets_a_sentence(pipe: Any) -> None:
    pipe.scheduler.set_timesteps(4)
    with apply_guidance(pipe, [PatternGuide()], parts=1), pytest.raises(UserError, match=r"got 0.5; call scheduler"):
        pipe.unet(noise(), 0.5, states(1))
    assert StepPlan.of(pipe.scheduler).locate(pipe.scheduler, pipe.scheduler.timesteps[2]).number == 2


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_samples_at_timesteps_of_their_own_are_shifted_by_their_own_factors(pipe: Any, prediction: str) -> None:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    x, text = noise(2), states(2)
    times = torch.tensor([700, 40])
    both = {"guidance_scale": 5.0, "normalize": None}
    with apply_guidance(pipe, [PatternGuide(**both)], parts=1):
        together = pipe.unet(x, times, text).sample
    for i in range(2):
        with apply_guidance(pipe, [PatternGuide(**both)], parts=1):
            alone = pipe.unet(x[i : i + 1], times[i], text[i : i + 1]).sample
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-5)
