"""Variants of classifier-free guidance: their formulas, what they leave alone, and partners of guides."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_head
from diffusers import PNDMScheduler

from guidance.apply import apply_guidance
from guidance.guides import MidBlockGuide
from guidance.models.denoiser import fingerprint
from guidance.sampling import sample_latents
from guidance.sampling.cfg import ClassifierFree
from guidance.sampling.loop import build_scheduler
from guidance.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["a red balloon over the sea at dusk", "a blue tree in the snow at night"]


def sample(pipe, cfg, **options):
    return sample_latents(pipe, TEXTS, [0, 1], num_steps=4, cfg_scale=cfg, **options)


def counted(pipe, monkeypatch) -> list[int]:
    """Batch sizes of the denoiser's calls."""
    sizes: list[int] = []
    original = pipe.unet.forward

    def forward(x, *args, **kwargs):
        sizes.append(len(x))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    return sizes


@pytest.fixture(scope="module")
def guide(tiny_pipe) -> MidBlockGuide:
    head = make_head(tiny_pipe, task="class", target="time", labels=["a", "b"], outputs=2)
    return MidBlockGuide(head, 1.0, target="b", start=0.0, stop=1.0)


def test_plain_guidance_is_the_same_bits(tiny_pipe) -> None:
    assert torch.equal(sample(tiny_pipe, ClassifierFree(4.0)), sample(tiny_pipe, 4.0))
    assert ClassifierFree(4.0).describe() is None


def test_a_record_says_what_modulates(guide) -> None:
    said = ClassifierFree(4.0, modulate=guide).describe()
    assert said is not None and said["modulate"] == {
        "guide": guide.name,
        "networks": [fingerprint(guide.heads[0])],
        "objective": None,
        "target": "b",
        "pessimism": 0.0,
    }
    json.dumps(said)


def test_rescale_gives_the_conditional_deviation_back() -> None:
    """Lin et al. 2024, equations 15 and 16; diffusers' ``rescale_noise_cfg`` is the reference."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    uncond, cond = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = uncond + 5 * (cond - uncond)
    for phi in (0.0, 0.7, 1.0):
        ours = ClassifierFree(5.0, rescale=phi).combine(uncond, cond, 0.0)
        torch.testing.assert_close(ours, rescale_noise_cfg(plain, cond, phi), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.std((1, 2, 3)), cond.std((1, 2, 3)))
    assert plain.std() > 2 * cond.std()


def test_outside_its_interval_only_the_conditional_part_is_computed(tiny_pipe, monkeypatch) -> None:
    sizes = counted(tiny_pipe, monkeypatch)
    limited = sample(tiny_pipe, ClassifierFree(4.0, start=0.25, stop=0.75))
    assert sizes == [2, 4, 4, 2]
    assert not torch.allclose(limited, sample(tiny_pipe, 4.0)) and not torch.allclose(limited, sample(tiny_pipe, 1.0))


def test_an_interval_of_no_steps_is_conditional_sampling(tiny_pipe) -> None:
    off = sample(tiny_pipe, ClassifierFree(4.0, start=0.9))  # steps begin at 0, 0.25, 0.5 and 0.75
    torch.testing.assert_close(off, sample(tiny_pipe, 1.0), atol=1e-5, rtol=1e-5)


def test_with_guides_both_parts_are_there_at_every_step(tiny_pipe, guide) -> None:
    """The portable scale is in units of their difference, inside the interval and outside."""
    with_interval = sample(tiny_pipe, ClassifierFree(4.0, stop=0.5), guides=[guide])
    unguided = sample(tiny_pipe, ClassifierFree(4.0, stop=0.5))
    assert with_interval.isfinite().all() and not torch.allclose(with_interval, unguided)


def test_a_sure_head_turns_guidance_off_and_an_unsure_one_leaves_it(tiny_pipe, guide) -> None:
    class Sure(MidBlockGuide):
        log_p = 0.0

        def score(self, h, t):
            return torch.full((len(h),), self.log_p)

    sure = Sure(guide.heads[0], target="b")
    torch.testing.assert_close(
        sample(tiny_pipe, ClassifierFree(4.0, modulate=sure)), sample(tiny_pipe, 1.0), atol=1e-4, rtol=1e-4
    )
    sure.log_p = -math.inf
    torch.testing.assert_close(
        sample(tiny_pipe, ClassifierFree(4.0, modulate=sure)), sample(tiny_pipe, 4.0), atol=1e-5, rtol=1e-5
    )
    sure.log_p = math.log(0.5)
    torch.testing.assert_close(
        sample(tiny_pipe, ClassifierFree(4.0, modulate=sure)), sample(tiny_pipe, 2.5), atol=1e-4, rtol=1e-4
    )


def test_each_sample_has_its_own_weight(tiny_pipe, guide) -> None:
    """The same sample alone and in a batch; and the score is the head's, read without a gradient."""
    cfg = ClassifierFree(4.0, modulate=guide)
    both = sample(tiny_pipe, cfg)
    alone = sample_latents(tiny_pipe, TEXTS[1:], [1], num_steps=4, cfg_scale=cfg)
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)
    p = guide.score(torch.randn(1, 64, 4, 4), torch.zeros(1)).exp()
    assert 0.05 < p < 0.95 and not torch.allclose(both, sample(tiny_pipe, 4.0), atol=1e-3)
    assert "forward" not in vars(tiny_pipe.unet)


def test_bad_options_get_a_sentence(tiny_pipe, guide) -> None:
    for options, message in (
        ({"scale": math.nan}, "finite cfg_scale"),
        ({"rescale": 1.5}, "rescale in 0..1"),
        ({"start": 0.5, "stop": 0.5}, "start < stop"),
    ):
        with pytest.raises(UserError, match=message):
            ClassifierFree(**options)
    rating = MidBlockGuide(make_head(tiny_pipe))
    with pytest.raises(UserError, match="log-probabilities"):
        sample(tiny_pipe, ClassifierFree(4.0, modulate=rating))
    with apply_guidance(tiny_pipe, [guide], parts=2), pytest.raises(UserError, match="unguided denoiser"):
        sample(tiny_pipe, ClassifierFree(4.0, modulate=guide))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++", "euler"])
def test_a_scheduler_by_name_clips_no_latents(name: str) -> None:
    """Published configurations leave clip_sample out, which diffusers then takes for true."""
    like = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = build_scheduler(name, like)
    scheduler.set_timesteps(4)
    x, t = torch.full((1, 4, 2, 2), 20.0), scheduler.timesteps[-1]
    scheduler.scale_model_input(x, t)
    after = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
    assert after.abs().max() > 10
