"""apply_guidance: the guided score in every parameterisation, every pipeline, every layout of the batch."""

import copy
import dataclasses

import pytest
import torch
from conftest import make_head
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from guidance.apply import apply_guidance
from guidance.apply.guided import rms
from guidance.guides import MidBlockGuide, ScoringGuide
from guidance.sampling import sample_images, sample_latents, using_scheduler
from guidance.schedule import NoiseSchedule
from guidance.taps import encode_features
from guidance.utils.errors import UserError

PROMPTS = ["a red balloon over the sea at dusk", "a white tower in the hills at noon"]


@dataclasses.dataclass(eq=False)
class MeanGuide(ScoringGuide):
    """Scores the mean activation under a ramp of weights: smooth, without a head."""

    label: str = "mean"
    sign: float = 1.0
    guidance_scale: float = 1.0
    tap = "mid_block"

    @property
    def name(self):
        return self.label

    def score(self, h, t):
        return self.sign * (h * torch.linspace(-1, 1, h.shape[1], dtype=h.dtype)[None, :, None, None]).mean((1, 2, 3))


@pytest.fixture
def head(tiny_pipe):
    return make_head(tiny_pipe)


def call(pipe, x, t, text):
    with torch.no_grad():
        return pipe.unet(x, t, encoder_hidden_states=text, return_dict=False)[0]


def batch(pipe, b=2, parts=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(b, 4, 8, 8, generator=g, dtype=dtype)
    text = torch.randn(parts * b, 24, 128, generator=g, dtype=dtype)
    pipe.scheduler.set_timesteps(10)
    return torch.cat([x] * parts), pipe.scheduler.timesteps[3], text


def test_raw_shift_is_sigma_times_the_gradient_of_the_score(tiny_pipe):
    """Central differences of the score, through a double-precision UNet, in the model's own v-prediction."""
    pipe = copy.copy(tiny_pipe)
    pipe.unet = copy.deepcopy(tiny_pipe.unet).double()
    x, t, text = batch(pipe, b=1, dtype=torch.float64)
    guide = MeanGuide(guidance_scale=7.0, normalize=None)
    plain = call(pipe, x, t, text)
    with apply_guidance(pipe, [guide], parts=2):
        guided = call(pipe, x, t, text)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    alpha, sigma = schedule.alpha_sigma(t)
    direction = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    f = lambda z: guide.score(encode_features(pipe.unet, z, t, text[1:]), t)  # noqa: E731
    slope = (f(x[1:] + 1e-5 * direction) - f(x[1:] - 1e-5 * direction)) / 2e-5
    want = -7.0 * sigma * slope / alpha  # v = (eps - sigma x) / alpha
    for part in (0, 1):
        got = ((guided - plain)[part] * direction[0]).sum()
        torch.testing.assert_close(got, want[0], rtol=1e-4, atol=1e-9)


def test_every_cfg_part_gets_the_same_shift(tiny_pipe):
    x, t, text = batch(tiny_pipe)
    plain = call(tiny_pipe, x, t, text)
    with apply_guidance(tiny_pipe, [MeanGuide(guidance_scale=1.0)], parts=2):
        guided = call(tiny_pipe, x, t, text)
    uncond, cond = (guided - plain).chunk(2)
    torch.testing.assert_close(uncond, cond, rtol=1e-4, atol=1e-5)
    for w in (0.0, 1.0, 7.5):
        mix = lambda e, w=w: e.chunk(2)[0] + w * (e.chunk(2)[1] - e.chunk(2)[0])  # noqa: E731
        torch.testing.assert_close(mix(guided), mix(plain) + cond, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kappa", [0.5, -2.0])
def test_portable_scale_has_the_stated_size(tiny_pipe, kappa):
    x, t, text = batch(tiny_pipe)
    plain = call(tiny_pipe, x, t, text)
    with apply_guidance(tiny_pipe, [MeanGuide(guidance_scale=kappa)], parts=2) as handle:
        guided = call(tiny_pipe, x, t, text)
    uncond, cond = plain.chunk(2)
    ratio = rms((guided - plain)[2:]) / rms(cond - uncond)
    torch.testing.assert_close(ratio, torch.full_like(ratio, abs(kappa)), rtol=1e-3, atol=0)
    assert handle.records[0].shift_rms.shape == (2,)


def test_portable_scale_without_cfg_refers_to_eps(tiny_pipe):
    x, t, text = batch(tiny_pipe, parts=1)
    plain = call(tiny_pipe, x, t, text)
    with apply_guidance(tiny_pipe, [MeanGuide(guidance_scale=0.3)], parts=1):
        guided = call(tiny_pipe, x, t, text)
    schedule = NoiseSchedule.from_scheduler(tiny_pipe.scheduler)
    eps, shifted = (schedule.to_eps(v, x, t) for v in (plain, guided))
    torch.testing.assert_close(rms(shifted - eps) / rms(eps), torch.full((2, 1, 1, 1), 0.3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_guided_score_is_the_same_in_every_parameterisation(tiny_pipe, prediction):
    """The same network, read as eps, v or x0 prediction: the shift in eps is the same one."""
    pipe = copy.copy(tiny_pipe)
    pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config, prediction_type=prediction)
    x, t, text = batch(pipe)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    plain = call(pipe, x, t, text)
    with apply_guidance(pipe, [MeanGuide(guidance_scale=9.0, normalize=None)], parts=2) as handle:
        guided = call(pipe, x, t, text)
    _, sigma = schedule.alpha_sigma(t)
    moved = schedule.to_eps(guided, x, t) - schedule.to_eps(plain, x, t)
    want = sigma * handle.records[0].grad_norm.double()
    torch.testing.assert_close(moved[:2].flatten(1).norm(dim=1).double(), want, rtol=1e-3, atol=1e-6)


def test_scales_add_and_opposites_cancel(tiny_pipe):
    x, t, text = batch(tiny_pipe)
    plain = call(tiny_pipe, x, t, text)

    def shift(*guides):
        with apply_guidance(tiny_pipe, guides, parts=2):
            return call(tiny_pipe, x, t, text) - plain

    one, two = shift(MeanGuide(guidance_scale=1.0)), shift(MeanGuide("a", guidance_scale=2.0))
    both = shift(MeanGuide("a", guidance_scale=1.5), MeanGuide("b", guidance_scale=0.5))
    none = shift(MeanGuide("a", guidance_scale=1.0), MeanGuide("b", sign=-1.0, guidance_scale=1.0))
    torch.testing.assert_close(both, two, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(two, 2 * one, rtol=1e-3, atol=1e-5)
    assert none.abs().max() < 1e-3 * one.abs().max()


@pytest.mark.parametrize("options", [{}, {"normalize": None}, {"normalize": None, "space": "x"}])
def test_scale_zero_is_bit_equal(tiny_pipe, head, options):
    plain = sample_latents(tiny_pipe, PROMPTS, [1, 2], num_steps=4)
    zero = sample_latents(tiny_pipe, PROMPTS, [1, 2], num_steps=4, guides=[MidBlockGuide(head, 0.0, **options)])
    assert torch.equal(plain, zero)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler", "ddpm"])
def test_our_loop_equals_the_diffusers_pipeline(tiny_pipe, head, scheduler):
    for guides in ([], [MidBlockGuide(head, 1.0, start=0, stop=1)]):
        ours = sample_latents(
            tiny_pipe, PROMPTS, [1, 2], num_steps=5, cfg_scale=3.0, scheduler=scheduler, guides=guides
        )
        generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
        with using_scheduler(tiny_pipe, scheduler), apply_guidance(tiny_pipe, guides):
            theirs = tiny_pipe(
                PROMPTS, num_inference_steps=5, guidance_scale=3.0, generator=generators, output_type="latent"
            ).images
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_unmodified_img2img_and_inpaint_are_guided(tiny_pipe, head):
    image = Image.new("RGB", (64, 64), (200, 80, 40))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    parts = {k: v for k, v in tiny_pipe.components.items()}
    for kind, extra in ((StableDiffusionImg2ImgPipeline, {}), (StableDiffusionInpaintPipeline, {"mask_image": mask})):
        pipe = kind(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)

        def run(pipe=pipe, extra=extra):
            generator = torch.Generator().manual_seed(0)
            options = {"strength": 0.8, "num_inference_steps": 5, "output_type": "latent"}
            return pipe(PROMPTS[0], image=image, generator=generator, **options, **extra).images

        plain = run()
        with apply_guidance(pipe, [MidBlockGuide(head, 0.0)]):
            assert torch.equal(run(), plain)
        with apply_guidance(pipe, [MidBlockGuide(head, 2.0, start=0, stop=1)]) as handle:
            assert not torch.allclose(run(), plain)
        assert handle.records
        assert torch.equal(run(), plain)


def test_a_second_img2img_call_starts_afresh(tiny_pipe, head):
    """It never reaches step 0, and must not reuse the last direction of the call before it."""
    pipe = StableDiffusionImg2ImgPipeline(**tiny_pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    options = {"strength": 0.6, "num_inference_steps": 10, "output_type": "latent"}

    def run(shade):
        image = Image.new("RGB", (64, 64), (shade, 80, 40))
        return pipe(PROMPTS[0], image=image, generator=torch.Generator().manual_seed(0), **options).images

    guide = MidBlockGuide(head, 2.0, start=0, stop=1, every=3)
    with apply_guidance(pipe, [guide]):
        alone = run(20)
    with apply_guidance(pipe, [guide]) as handle:
        run(200)
        calls = len(handle.records)
        assert torch.equal(run(20), alone)
        assert len(handle.records) == calls


def test_no_trace_is_left_after_use_and_after_an_error(tiny_pipe, head):
    unet, scheduler = tiny_pipe.unet, tiny_pipe.scheduler
    unet.conv_in.weight.requires_grad_(True)

    class Broken(MeanGuide):
        def score(self, h, t):
            raise RuntimeError("broken guide")

    with pytest.raises(RuntimeError, match="broken guide"):
        with apply_guidance(tiny_pipe, [Broken()], parts=2):
            assert not unet.conv_in.weight.requires_grad
            x, t, text = batch(tiny_pipe)
            call(tiny_pipe, x, t, text)
    assert unet.conv_in.weight.requires_grad
    unet.conv_in.weight.requires_grad_(False)
    assert "forward" not in vars(unet) and "step" not in vars(scheduler)
    assert not any(m._forward_hooks for m in unet.modules())


def test_guidance_twice_is_refused(tiny_pipe, head):
    with apply_guidance(tiny_pipe, [MidBlockGuide(head)]):
        with pytest.raises(UserError, match="applied to it already"), apply_guidance(tiny_pipe, [MidBlockGuide(head)]):
            pass


@pytest.mark.parametrize(("options", "fresh"), [((0.2, 0.8, 2), [2, 4, 6]), ((0.25, 1.0, 4), [3, 4, 8])])
def test_interval_and_every(tiny_pipe, options, fresh):
    steps = []

    class Counting(MeanGuide):
        def score(self, h, t):
            steps.append(float(t[0]))
            return super().score(h, t)

    guide = Counting(**dict(zip(("start", "stop", "every"), options, strict=True)))
    sample_latents(tiny_pipe, PROMPTS[:1], [0], num_steps=10, guides=[guide])
    tiny_pipe.scheduler.set_timesteps(10)
    assert steps == [tiny_pipe.scheduler.timesteps[i].item() for i in fresh]
    phases = guide.phases(10)
    assert [i for i, phase in enumerate(phases) if phase == "fresh"] == fresh
    assert phases[: fresh[0]].count("off") == fresh[0] and "off" not in phases[fresh[0] : fresh[-1]]


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_x_space_moves_the_latents_between_steps(tiny_pipe, scheduler):
    """Report mode: one step equals scheduler.step(eps(x), x + s g), g with respect to the denoiser's input."""
    pipe, guide = tiny_pipe, MeanGuide(guidance_scale=50.0, normalize=None, space="x")
    with using_scheduler(pipe, scheduler):
        pipe.scheduler.set_timesteps(10)
        t = pipe.scheduler.timesteps[0]
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * pipe.scheduler.init_noise_sigma
        text = torch.randn(2, 24, 128, generator=torch.Generator().manual_seed(2))
        x_in = pipe.scheduler.scale_model_input(x, t)
        with apply_guidance(pipe, [guide], parts=1):
            eps = call(pipe, x_in, t, text)
            got = pipe.scheduler.step(eps, t, x, return_dict=False)[0]
        plain = call(pipe, x_in, t, text)
        torch.testing.assert_close(eps, plain, rtol=1e-4, atol=1e-5)
        leaf, found = x_in.clone().requires_grad_(True), []
        hook = pipe.unet.mid_block.register_forward_hook(lambda m, a, o: found.append(o))
        with torch.enable_grad():
            pipe.unet(leaf, t, encoder_hidden_states=text)
            g = torch.autograd.grad(guide.score(found[0], t).sum(), leaf)[0]
        hook.remove()
        pipe.scheduler.set_timesteps(10)  # forget the step that was taken
        pipe.scheduler.scale_model_input(x, t)
        want = pipe.scheduler.step(plain, t, x + 50.0 * (x / x_in).mean() * g, return_dict=False)[0]
        unmoved = pipe.scheduler.step(plain, t, x, return_dict=False)[0] if scheduler == "ddim" else x
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, unmoved, atol=1e-2)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tiny_pipe):
    class Sick(MeanGuide):
        def score(self, h, t):
            bad = torch.tensor([float("nan"), 1.0], dtype=h.dtype)
            return super().score(h, t) * bad[: len(h)]

    x, t, text = batch(tiny_pipe)
    plain = call(tiny_pipe, x, t, text)
    with apply_guidance(tiny_pipe, [Sick()], parts=2) as handle:
        guided = call(tiny_pipe, x, t, text)
    assert handle.skipped == 1
    torch.testing.assert_close(guided[0], plain[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(guided[1], plain[1], atol=1e-4)


def test_images_do_not_depend_on_the_batch(tiny_pipe, head):
    prompts, seeds = PROMPTS * 2, [1, 2, 3, 4]
    guides = [MidBlockGuide(head, 1.0, start=0, stop=1)]
    whole = sample_images(tiny_pipe, prompts, seeds, num_steps=5, guides=guides, batch_size=4)
    single = sample_images(tiny_pipe, prompts, seeds, num_steps=5, guides=guides, batch_size=1)
    assert abs(whole.astype(int) - single.astype(int)).max() <= 1


def test_bad_strengths_get_a_sentence(head):
    for options, text in [
        ({"guidance_scale": float("nan")}, "finite guidance_scale"),
        ({"start": 0.5, "stop": 0.5}, "start < stop"),
        ({"every": 0}, "every >= 1"),
        ({"space": "x"}, "normalize=None"),
    ]:
        with pytest.raises(UserError, match=text):
            MidBlockGuide(head, **options)


@pytest.mark.parametrize(
    "make", [lambda: MeanGuide(guidance_scale=2.0), lambda: MeanGuide(guidance_scale=2.0, every=2)]
)
def test_parts_in_step_and_apart_give_the_same_run(tiny_pipe, monkeypatch, make):
    runs = []
    for weights in (0, 10**9):
        monkeypatch.setattr("guidance.apply.guided.IN_STEP_WEIGHTS", weights)
        runs.append(sample_latents(tiny_pipe, PROMPTS, [0, 1], num_steps=4, guides=[make()]))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


def test_perturbed_attention_beside_guides_is_refused_and_harmless_when_off(tiny_pipe) -> None:
    """Its batch has a third part, which two prompts would hide: six samples are three pairs and two triples."""
    from diffusers import StableDiffusionPAGPipeline

    parts = {name: part for name, part in tiny_pipe.components.items() if name != "image_encoder"}
    processors = tiny_pipe.unet.attn_processors
    pipe = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    guide = MidBlockGuide(make_head(tiny_pipe), 1.0)

    def images(pag_scale: float) -> torch.Tensor:
        options = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        with apply_guidance(pipe, [guide]):
            return pipe(["a red balloon", "a blue tree"], pag_scale=pag_scale, **options).images

    try:
        with pytest.raises(UserError, match="pag_scale=0"):
            images(3.0)
        tiny_pipe.unet.set_attn_processor(dict(processors))  # diffusers leaves its own there after an error
        assert "forward" not in vars(tiny_pipe.unet) and images(0.0).isfinite().all()
    finally:
        tiny_pipe.unet.set_attn_processor(dict(processors))
