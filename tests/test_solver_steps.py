"""Every scheduler of diffusers that the classic pipelines take: the guided step, the plan of steps, moved latents.

What a scheduler does in each call is written down here by hand, apart from :class:`guidance.schedule.StepPlan`.
"""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from test_diffusers_pipelines import CASES, PROMPTS, PatternGuide, by_hand, picture, sd, sdxl
from torch import Tensor

from guidance.apply import MoveLatents, apply_guidance
from guidance.sampling import sample_latents, using_scheduler
from guidance.sampling.loop import SCHEDULERS, build_scheduler
from guidance.schedule import NoiseSchedule, StepPlan
from guidance.utils.errors import UserError

KARRAS = {"use_karras_sigmas": True}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
RUNGE_KUTTA = {"skip_prk_steps": False}

#: Scheduler, options, and the solver step of each of its calls for four steps.
ONE = (0, 1, 2, 3)
TWO = (0, 0, 1, 1, 2, 2, 3)
KINDS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "ddim": ("DDIMScheduler", {}, ONE),
    "ddim-parallel": ("DDIMParallelScheduler", {}, ONE),
    "ddim-zero-snr": ("DDIMScheduler", ZERO_SNR, ONE),
    "ddpm": ("DDPMScheduler", {}, ONE),
    "ddpm-parallel": ("DDPMParallelScheduler", {}, ONE),
    "deis": ("DEISMultistepScheduler", {}, ONE),
    "dpm++": ("DPMSolverMultistepScheduler", {}, ONE),
    "dpm++-karras": ("DPMSolverMultistepScheduler", KARRAS, ONE),
    "dpm++-sde-multistep": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, ONE),
    "dpm++-sde": ("DPMSolverSDEScheduler", {"noise_sampler_seed": 0}, TWO),
    "dpm++-singlestep": ("DPMSolverSinglestepScheduler", {}, (0, 0, 1, 2)),
    "dpm++-singlestep-3": ("DPMSolverSinglestepScheduler", {"solver_order": 3}, (0, 0, 0, 1)),
    "euler": ("EulerDiscreteScheduler", {}, ONE),
    "euler-karras": ("EulerDiscreteScheduler", KARRAS, ONE),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}, ONE),
    "heun": ("HeunDiscreteScheduler", {}, TWO),
    "heun-karras": ("HeunDiscreteScheduler", KARRAS, TWO),
    "kdpm2": ("KDPM2DiscreteScheduler", {}, TWO),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}, TWO),
    "lcm": ("LCMScheduler", {}, ONE),
    "lms": ("LMSDiscreteScheduler", {}, ONE),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, (0, 0, 1, 2, 3)),
    "pndm-runge-kutta": ("PNDMScheduler", RUNGE_KUTTA, (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3)),
    "sa": ("SASolverScheduler", {}, ONE),
    "tcd": ("TCDScheduler", {}, ONE),
    "unipc": ("UniPCMultistepScheduler", {}, ONE),
    "cogvideox-ddim": ("CogVideoXDDIMScheduler", {}, ONE),
}
CORRECTORS = ("sa", "unipc")
BY_NAME = ("heun", "unipc", "dpm++-sde", "EulerAncestralDiscreteScheduler")


@functools.cache
def shared() -> Any:
    return sd()


def scheduler(kind: str, like: Any) -> Any:
    name, options, _ = KINDS[kind]
    cls = getattr(diffusers, name)
    try:
        return cls.from_config(like.config, clip_sample=False, **options)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])


def with_scheduler(kind: str) -> Any:
    pipe = tiny.with_parts(shared(), type(shared()))
    pipe.scheduler = scheduler(kind, shared().scheduler)
    return pipe


def approx(times: list[float]) -> Any:
    return pytest.approx(times, rel=1e-4)


def run(pipe: Any, **options: Any) -> Tensor:
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"} | options
    return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **given).images


class Watched(PatternGuide):
    """Keeps the timesteps at which it is asked for a score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[float] = []

    def score(self, h: Tensor, t: Tensor) -> Tensor:
        self.seen.append(float(t[0]))
        return super().score(h, t)


# ---- noise levels -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_and_sigma_are_those_of_the_schedulers_own_input(kind: str) -> None:
    """Noised by the scheduler and scaled for the denoiser, data is ``alpha x0 + sigma eps``."""
    made = scheduler(kind, shared().scheduler)
    made.set_timesteps(4)
    schedule = NoiseSchedule.from_scheduler(made)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1, 3, 8, 8, generator=g)
    for i in (0, 2) if "scale_model_input" in vars(type(made)) else (0,):
        t = made.timesteps[i]
        fresh = type(made).from_config(made.config)
        fresh.set_timesteps(4)
        noised = fresh.scale_model_input(fresh.add_noise(x0, eps, t[None]), t)
        torch.testing.assert_close(schedule.add_noise(x0, eps, t[None]), noised, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_is_read_by_its_own_preconditioning(name: str, prediction: str) -> None:
    made = getattr(diffusers, name)(prediction_type=prediction)
    made.set_timesteps(6)
    schedule = NoiseSchedule.from_scheduler(made)
    x0, eps, raw = torch.randn(3, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for i in (0, 3, 5):
        sigma, t = made.sigmas[i], made.timesteps[i]
        x = x0 + sigma * eps
        x_in = made.precondition_inputs(x, sigma)
        torch.testing.assert_close(schedule.add_noise(x0, eps, t[None]), x_in, rtol=1e-4, atol=1e-5)
        wanted = made.precondition_outputs(x, raw, sigma)
        torch.testing.assert_close(schedule.to_x0(raw, x_in, t[None]), wanted, rtol=1e-4, atol=1e-4)
        back = schedule.from_eps(schedule.to_eps(raw, x_in, t[None]), x_in, t[None])
        torch.testing.assert_close(back, raw, rtol=1e-2, atol=1e-2)
        moved = schedule.from_eps(schedule.to_eps(raw, x_in, t[None]) + 0.1, x_in, t[None]) - back
        torch.testing.assert_close(moved, 0.1 * schedule.shift_factor(t).float().expand_as(raw), rtol=2e-2, atol=1e-2)


def test_continuous_euler_is_read_by_its_sigmas() -> None:
    made = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous", sigma_max=80.0)
    made.set_timesteps(5)
    alpha, sigma = NoiseSchedule.from_scheduler(made).alpha_sigma(made.timesteps)
    ve = made.sigmas[:5].double()
    torch.testing.assert_close(alpha, (1 + ve**2).rsqrt(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sigma, ve * (1 + ve**2).rsqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "flow_prediction"])
def test_flow_sigmas_keep_the_prediction_of_the_model(name: str, prediction: str) -> None:
    made = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type=prediction)
    made.set_timesteps(5)
    schedule = NoiseSchedule.from_scheduler(made)
    assert (schedule.kind, schedule.prediction_type) == ("flow", prediction)
    x, raw = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made._step_index = 2
    x0 = made.convert_model_output(raw, sample=x)
    torch.testing.assert_close(schedule.to_x0(raw, x, made.timesteps[2][None]), x0, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["IPNDMScheduler", "KarrasVeScheduler", "ScoreSdeVeScheduler"])
def test_what_has_no_noise_schedule_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="noise schedule"):
        NoiseSchedule.from_scheduler(getattr(diffusers, name)())


# ---- the guided step ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_guided_run_equals_the_full_graph_by_hand(kind: str) -> None:
    pipe = with_scheduler(kind)
    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.7)]) as handle:
        guided = run(pipe)
    calls = KINDS[kind][2]
    assert (handle.steps, handle.gradients, handle.pushes) == (calls[-1] + 1, len(calls), len(calls))
    with by_hand(CASES["sd"], pipe, 0.7, "plain"):
        wanted = run(pipe)
    scale = wanted.abs().max()
    torch.testing.assert_close(guided / scale, wanted / scale, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_interval_and_every_count_solver_steps(kind: str) -> None:
    """Both calls of a step are alike: fresh gradients at their own timesteps, or the held direction."""
    pipe, calls = with_scheduler(kind), KINDS[kind][2]
    for options in ({"start": 0.25, "every": 2}, {"stop": 0.5, "every": 4}):
        guide = Watched(guidance_scale=0.7, **options)
        with apply_guidance(pipe, [guide]) as handle:
            run(pipe)
        phases = guide.phases(calls[-1] + 1)
        times = pipe.scheduler.timesteps.tolist()
        assert guide.seen == approx([t for t, step in zip(times, calls, strict=True) if phases[step] == "fresh"])
        assert handle.gradients == len(guide.seen) and handle.pushes == sum(phases[step] != "off" for step in calls)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in CORRECTORS])
def test_moved_latents_equal_a_loop_by_hand(kind: str) -> None:
    """The push is added where a solver step starts, and reaches the result."""
    pipe, calls = with_scheduler(kind), KINDS[kind][2]
    guide = PatternGuide(guidance_scale=20.0, space="x", normalize=None)
    with apply_guidance(pipe, [guide]) as handle:
        moved = run(pipe)
    assert handle.pushes == handle.gradients == calls[-1] + 1 and handle.steps == calls[-1] + 1
    step, seen = pipe.scheduler.step, []

    def by_hand_step(output: Tensor, t: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        i = len(seen)
        seen.append(float(t))
        if i == 0 or calls[i] != calls[i - 1]:
            x = x + gradient(pipe, guide, x, t)
        return step(output, t, x, *args, **kwargs)

    by_hand_step.__signature__ = __import__("inspect").signature(step)  # type: ignore[attr-defined]
    pipe.scheduler.step = by_hand_step
    try:
        wanted = run(pipe)
    finally:
        del pipe.scheduler.step
    scale = wanted.abs().max()
    torch.testing.assert_close(moved / scale, wanted / scale, rtol=2e-3, atol=2e-4)
    assert not torch.allclose(moved / scale, run(pipe) / scale, atol=1e-3)


def gradient(pipe: Any, guide: Any, x: Tensor, t: Any) -> Tensor:
    """The gradient that moves latents, in their own scale; the conditional prompt."""
    scale = 1.0
    if hasattr(pipe.scheduler, "is_scale_input_called") or pipe.scheduler.init_noise_sigma != 1:
        scale = float(pipe.scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t))
    text = pipe.encode_prompt(PROMPTS[0], "cpu", 1, False)[0]
    found: list[Tensor] = []
    hook = pipe.unet.mid_block.register_forward_hook(lambda module, given, output: found.append(output))
    leaf = (x * scale).detach().requires_grad_(True)
    with torch.enable_grad():
        pipe.unet(leaf, t, encoder_hidden_states=text)
        (g,) = torch.autograd.grad(guide.score(found[0], torch.zeros(len(x))).sum(), leaf)
    hook.remove()
    return guide.guidance_scale * g / scale


@pytest.mark.parametrize("kind", CORRECTORS)
def test_moved_latents_under_a_corrector_are_refused(kind: str) -> None:
    pipe = with_scheduler(kind)
    guide = PatternGuide(guidance_scale=20.0, space="x", normalize=None)
    with pytest.raises(UserError, match="corrector"), apply_guidance(pipe, [guide]):
        pass
    with pytest.raises(UserError, match="corrector"):
        MoveLatents(pipe, [guide])
    corrected, pipe.scheduler = pipe.scheduler, shared().scheduler
    with apply_guidance(pipe, [guide]), pytest.raises(UserError, match="corrector"):
        pipe.scheduler = corrected
        run(pipe)
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("kind", ["ddim", "euler", "heun", "kdpm2", "dpm++-singlestep", "pndm"])
@pytest.mark.parametrize("cut", [False, True])
def test_the_callback_moves_latents_between_solver_steps(kind: str, cut: bool) -> None:
    pipe, calls = with_scheduler(kind), KINDS[kind][2]
    guide = Watched(guidance_scale=20.0, space="x", normalize=None)
    options: dict[str, Any] = {}
    if cut:
        image = tiny.with_parts(pipe, StableDiffusionImg2ImgPipeline)
        image.scheduler, pipe = pipe.scheduler, image
        options = {"image": picture(), "strength": 0.5}
    callback = MoveLatents(pipe, [guide])
    run(pipe, callback_on_step_end=callback, **options)
    times = pipe.scheduler.timesteps.tolist()
    first = [i for i in range(1, len(calls)) if calls[i] != calls[i - 1]]
    if cut:
        begin = len(times) - pipe.num_timesteps
        first = [i for i in first if i > begin and not (kind == "pndm" and i == begin + 1)]
    assert guide.seen == approx([times[i] for i in first]) and callback.handle.pushes == len(first) > 0


# ---- runs that begin late, end early, or have timesteps of their own ----------------------------------------------
@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("pndm")])
def test_a_cut_run_counts_from_pure_noise(kind: str) -> None:
    """img2img at half strength takes the second half of the steps."""
    pipe = tiny.with_parts(shared(), StableDiffusionImg2ImgPipeline)
    pipe.scheduler = scheduler(kind, shared().scheduler)
    calls = KINDS[kind][2]
    guide = Watched(guidance_scale=0.7, every=2, start=0.5)
    with apply_guidance(pipe, [guide]) as handle:
        run(pipe, image=picture(), strength=0.5)
    times, begin = pipe.scheduler.timesteps.tolist(), len(calls) - pipe.num_timesteps
    phases = guide.phases(calls[-1] + 1, calls[begin])
    fresh = [i for i in range(begin, len(calls)) if phases[calls[i] - calls[begin]] == "fresh"]
    if not (kind.startswith("dpm++-singlestep")):  # there the cut falls inside of a step, which begins anew
        assert guide.seen == approx([times[i] for i in fresh])
    assert handle.steps >= 1 and handle.gradients == len(guide.seen) > 0


@pytest.mark.parametrize("kind", ["ddim", "heun"])
def test_base_and_refiner_share_one_count_of_steps(kind: str) -> None:
    base, refiner = sdxl(), sdxl(StableDiffusionXLImg2ImgPipeline)
    made = [scheduler(kind, base.scheduler) for _ in range(2)]
    base.scheduler, refiner.scheduler = made
    options = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0}
    guides = [Watched(guidance_scale=0.7, every=2), Watched(guidance_scale=0.7, every=2)]
    with apply_guidance(base, [guides[0]]) as first:
        x = base(PROMPTS[0], height=16, width=16, denoising_end=0.5, **options).images
    with apply_guidance(refiner, [guides[1]]) as second:
        refiner(PROMPTS[0], image=x, denoising_start=0.5, **options)
    times = made[0].timesteps.tolist()
    assert first.steps + second.steps in (4, 5)  # Heun's cut falls inside of a step
    assert guides[0].seen[0] == times[0]
    assert set(guides[0].seen) | set(guides[1].seen) <= {t for t, s in zip(times, KINDS[kind][2], strict=True)}
    assert second.records and all(record.step >= 1 for record in second.records)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("dpm++", {"timesteps": [900, 500, 200, 20]}),
        ("heun", {"timesteps": [900, 500, 200, 20]}),
        ("euler", {"timesteps": [900, 500, 200, 20]}),
        ("euler", {"sigmas": [9.0, 3.0, 1.0, 0.1, 0.0]}),
        ("lcm", {"timesteps": [999, 759, 499, 259]}),
    ],
)
def test_timesteps_and_sigmas_of_ones_own(kind: str, given: dict[str, Any]) -> None:
    pipe = with_scheduler(kind)
    guide = Watched(guidance_scale=0.7, every=2)
    with apply_guidance(pipe, [guide]):
        guided = run(pipe, **given)
    times, numbers = pipe.scheduler.timesteps.tolist(), StepPlan.of(pipe.scheduler).numbers
    assert guide.seen == approx([t for t, n in zip(times, numbers, strict=True) if n % 2 == 0])
    with apply_guidance(pipe, [PatternGuide(guidance_scale=0.7)]):
        guided = run(pipe, **given)
    with by_hand(CASES["sd"], pipe, 0.7, "plain"):
        wanted = run(pipe, **given)
    torch.testing.assert_close(guided, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_schedulers_of_first_and_second_order(name: str) -> None:
    case = CASES["sd3"]
    pipe = case.build()
    pipe.scheduler = getattr(diffusers, name)()
    guide = Watched(case.tap, guidance_scale=0.7, every=2)
    with apply_guidance(pipe, [guide]) as handle:
        guided = case.run(pipe)
    times = pipe.scheduler.timesteps.tolist()
    calls = (0, 0, 1) if "Heun" in name else (0, 1)
    assert guide.seen == approx([t for t, step in zip(times, calls, strict=True) if step == 0])
    assert handle.steps == 2 and guided.isfinite().all()
    with apply_guidance(pipe, [PatternGuide(case.tap, guidance_scale=0.7)]):
        guided = case.run(pipe)
    with by_hand(case, pipe, 0.7, "plain"):
        torch.testing.assert_close(guided, case.run(pipe), rtol=1e-3, atol=1e-3)


# ---- by name ------------------------------------------------------------------------------------------------------
def test_every_short_name_is_a_class_of_diffusers_and_others_get_a_sentence(tiny_pipe: Any) -> None:
    like = tiny_pipe.scheduler
    for name, cls in SCHEDULERS.items():
        if cls != "DPMSolverSDEScheduler":
            assert type(build_scheduler(name, like)).__name__ == cls == type(build_scheduler(cls, like)).__name__
    with pytest.raises(UserError, match="Did you mean 'heun'"):
        build_scheduler("heum", like)
    for other in ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"):
        with pytest.raises(UserError, match="for a model of kind vp"):
            build_scheduler(other, like)
    with pytest.raises(UserError, match="noise schedule"):
        build_scheduler("IPNDMScheduler", like)


@pytest.mark.parametrize("name", BY_NAME)
def test_our_loop_equals_the_pipeline_with_schedulers_by_name(tiny_pipe: Any, name: str) -> None:
    guides = [PatternGuide(guidance_scale=0.5)]
    if name == "dpm++-sde":
        pytest.importorskip("torchsde")
    ours = sample_latents(tiny_pipe, PROMPTS, [1, 2], num_steps=4, cfg_scale=3.0, scheduler=name, guides=guides)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    with using_scheduler(tiny_pipe, name), apply_guidance(tiny_pipe, guides):
        if name == "dpm++-sde":  # draws no noise from the generators
            tiny_pipe.scheduler.noise_sampler_seed = [1, 2]
        theirs = tiny_pipe(
            PROMPTS, num_inference_steps=4, guidance_scale=3.0, generator=generators, output_type="latent"
        ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    alone = sample_latents(tiny_pipe, PROMPTS[1:], [2], num_steps=4, cfg_scale=3.0, scheduler=name, guides=guides)
    torch.testing.assert_close(ours[1:], alone, rtol=1e-3, atol=1e-3)
