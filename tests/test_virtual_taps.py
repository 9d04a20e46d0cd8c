"""Guides at the x0 prediction, and guides without gradients: same wrapper, same scale, composable with the others."""

import copy
import dataclasses

import pytest
import torch
from test_apply import MeanGuide, batch, call

from guidance.apply import apply_guidance
from guidance.apply.guided import rms, unit_rms
from guidance.guides.base import DirectGuide
from guidance.sampling import sample_latents
from guidance.schedule import NoiseSchedule
from guidance.taps import X0, X0_THROUGH_UNET


class PixelGuide(MeanGuide):
    """A quadratic score of the predicted x0."""

    def __init__(self, tap, **options):
        super().__init__(tap, **options)
        self.tap = tap

    def score(self, h, t):
        ramp = torch.linspace(-1, 1, h.shape[-1], dtype=h.dtype)
        return -(h - ramp).square().sum((1, 2, 3))


@dataclasses.dataclass(eq=False)
class UpGuide(DirectGuide):
    """Points to larger latents, and remembers what it was shown."""

    guidance_scale: float = 1.0

    def direction(self, x, eps, x0, t):
        self.seen = x, eps, x0, t
        return 3 * torch.ones_like(x)


@pytest.fixture
def precise(tiny_pipe):
    pipe = copy.copy(tiny_pipe)
    pipe.unet = copy.deepcopy(tiny_pipe.unet).double()
    return pipe


def eps_of(pipe, prediction, x, t):
    return NoiseSchedule.from_scheduler(pipe.scheduler).to_eps(prediction, x, t)


def without_and_with(pipe, guide, x, t, text):
    plain = call(pipe, x, t, text)
    with apply_guidance(pipe, [guide], parts=2):
        return plain, call(pipe, x, t, text)


@pytest.mark.parametrize("tap", [X0, X0_THROUGH_UNET])
def test_the_shift_is_sigma_times_the_gradient_at_x0(precise, tap):
    x, t, text = batch(precise, dtype=torch.float64)
    schedule = NoiseSchedule.from_scheduler(precise.scheduler)
    alpha, sigma = schedule.alpha_sigma(t)
    guide = PixelGuide(tap, guidance_scale=0.7, normalize=None)
    plain, guided = without_and_with(precise, guide, x, t, text)
    leaf = x[2:].clone().requires_grad_(True)  # the conditional part
    with torch.enable_grad():
        prediction = precise.unet(leaf, t, text[2:]).sample
        x0 = schedule.to_x0(prediction, leaf, t)
        (through,) = torch.autograd.grad(guide.score(x0, t).sum(), leaf, retain_graph=True)
        (at_x0,) = torch.autograd.grad(guide.score(x0, t).sum(), x0)
    expected = through if tap == X0_THROUGH_UNET else at_x0 / alpha
    for part in (slice(0, 2), slice(2, 4)):
        shift = eps_of(precise, guided[part], x[part], t) - eps_of(precise, plain[part], x[part], t)
        torch.testing.assert_close(shift, -0.7 * sigma * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tap", [X0, X0_THROUGH_UNET])
def test_double_precision_is_kept(precise, tap):
    """Central differences of the score along one direction; for the x0 tap with eps held fixed.

    Rounding anything to float32 on the way costs 1e-7.
    """
    x, t, text = batch(precise, b=1, dtype=torch.float64)
    alpha, sigma = NoiseSchedule.from_scheduler(precise.scheduler).alpha_sigma(t)
    guide = PixelGuide(tap, guidance_scale=0.7, normalize=None)
    plain, guided = without_and_with(precise, guide, x, t, text)
    fixed = eps_of(precise, plain[1:], x[1:], t)

    def score(z):
        moving = eps_of(precise, call(precise, z, t, text[1:]), z, t)
        return guide.score((z - sigma * (fixed if tap == X0 else moving)) / alpha, t)

    step = 1e-5 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slope = (score(x[1:] + step) - score(x[1:] - step)) / 2
    want = -0.7 * sigma * slope / alpha  # v = (eps - sigma x) / alpha
    for part in (0, 1):
        got = ((guided - plain)[part] * step[0]).sum()
        torch.testing.assert_close(got, want[0], rtol=1e-8, atol=0)


def test_taps_of_all_kinds_add_up_in_one_forward(precise):
    """Raw shifts of a mid-block guide and of x0 guides: together the sum of each alone."""
    x, t, text = batch(precise, dtype=torch.float64)
    guides = [MeanGuide(guidance_scale=3.0, normalize=None)]
    guides += [PixelGuide(tap, guidance_scale=0.1, normalize=None) for tap in (X0, X0_THROUGH_UNET)]
    plain = call(precise, x, t, text)

    def shift(chosen):
        with apply_guidance(precise, chosen, parts=2) as handle:
            out = call(precise, x, t, text)
        assert set(handle.records[-1].scores) == {g.name for g in chosen}
        return out - plain

    torch.testing.assert_close(shift(guides), sum(shift([g]) for g in guides), rtol=1e-5, atol=1e-9)


def test_a_direct_guide_is_scaled_like_the_others_and_needs_no_gradient(tiny_pipe):
    x, t, text = batch(tiny_pipe)
    schedule = NoiseSchedule.from_scheduler(tiny_pipe.scheduler)
    plain = call(tiny_pipe, x, t, text)
    guide = UpGuide(guidance_scale=-0.5)
    with apply_guidance(tiny_pipe, [guide], parts=2) as handle:
        guided = call(tiny_pipe, x, t, text)
    eps = [eps_of(tiny_pipe, out[2:], x[2:], t) for out in (plain, guided)]
    uncond = eps_of(tiny_pipe, plain[:2], x[:2], t)
    expected = 0.5 * rms(eps[0] - uncond).expand_as(eps[0])  # minus scale times reference times direction
    torch.testing.assert_close(eps[1] - eps[0], expected.to(eps[0].dtype), rtol=1e-4, atol=1e-5)
    assert torch.equal(guide.seen[0], x[2:]) and guide.seen[3].tolist() == [float(t)] * 2
    torch.testing.assert_close(guide.seen[1], eps[0].float())
    torch.testing.assert_close(guide.seen[2], schedule.to_x0(plain[2:], x[2:], t).float())
    assert len(handle.records) == 1 and handle.records[0].shift_rms is not None


def test_direct_guides_add_up_and_join_gradients(tiny_pipe):
    x, t, text = batch(tiny_pipe)
    plain = call(tiny_pipe, x, t, text)

    def shift(guides):
        with apply_guidance(tiny_pipe, guides, parts=2):
            return call(tiny_pipe, x, t, text) - plain

    one = shift([UpGuide(guidance_scale=1.0)])
    torch.testing.assert_close(shift([UpGuide(guidance_scale=0.4), UpGuide(guidance_scale=0.6)]), one)
    assert torch.equal(
        shift([UpGuide(guidance_scale=0.4), UpGuide(guidance_scale=-0.4)]).abs().max(), one.new_zeros(())
    )
    both = shift([UpGuide(guidance_scale=1.0), MeanGuide(guidance_scale=2.0)])
    torch.testing.assert_close(both, one + shift([MeanGuide(guidance_scale=2.0)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guide", [PixelGuide(X0, guidance_scale=2.0), UpGuide(guidance_scale=2.0, every=2, start=0.2)])
def test_they_work_in_a_whole_run(tiny_pipe, guide):
    def run(guides):
        return sample_latents(tiny_pipe, ["a red boat", "a tree"], [0, 1], num_steps=4, guides=guides)

    plain, guided = run([]), run([guide])
    assert guided.isfinite().all() and not torch.allclose(plain, guided)
    if isinstance(guide, PixelGuide):
        t = torch.zeros(2)
        assert (guide.score(guided, t) > guide.score(plain, t)).all()
    assert unit_rms(guided - plain).isfinite().all()
