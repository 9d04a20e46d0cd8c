"""Closed forms of the schedules, and agreement of the four parameterisations."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from guidance.schedule import NoiseSchedule

VP = [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("kind", VP)
def test_alpha_and_sigma_equal_the_product_of_one_minus_beta(kind):
    schedule = NoiseSchedule.from_scheduler(kind(**BETAS))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    alpha, sigma = schedule.alpha_sigma(torch.arange(1000))
    torch.testing.assert_close(alpha, abar.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-12)


def test_sigma_is_what_euler_scales_its_input_with():
    euler = EulerDiscreteScheduler(**BETAS)
    euler.set_timesteps(25)
    schedule = NoiseSchedule.from_scheduler(euler)
    x0, eps = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for i, t in enumerate(euler.timesteps):
        euler._step_index = None
        x = x0 + euler.sigmas[i].double() * eps
        seen = euler.scale_model_input(x, t)
        want = schedule.add_noise(x0[None], eps[None], t[None])[0]
        torch.testing.assert_close(seen, want, rtol=2e-3, atol=2e-3)


def test_add_noise_agrees_with_diffusers():
    ddim = DDIMScheduler(**BETAS)
    x0, eps, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 500, 998, 999])
    ours = NoiseSchedule.from_scheduler(ddim).add_noise(x0, eps, t)
    torch.testing.assert_close(ours, ddim.add_noise(x0, eps, t), rtol=1e-6, atol=1e-6)


def _schedules():
    for prediction in ("epsilon", "v_prediction", "sample"):
        yield NoiseSchedule.from_scheduler(DDIMScheduler(prediction_type=prediction, **BETAS))
    yield NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("schedule", list(_schedules()), ids=lambda s: s.prediction_type)
def test_conversions_recover_eps_and_x0(schedule):
    x0, eps = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([50, 500, 900])
    x = schedule.add_noise(x0, eps, t)
    prediction = schedule.from_eps(eps, x, t)
    torch.testing.assert_close(schedule.to_eps(prediction, x, t), eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.to_x0(prediction, x, t), x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", list(_schedules()), ids=lambda s: s.prediction_type)
def test_one_eps_shift_is_one_shift_in_every_parameterisation(schedule):
    x, eps, shift = torch.randn(3, 3, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([50, 500, 900])
    prediction = schedule.from_eps(eps, x, t)
    factor = schedule.shift_factor(t).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(schedule.to_eps(prediction + factor * shift, x, t), eps + shift, rtol=1e-9, atol=1e-9)


def test_velocity_agrees_with_diffusers():
    ddim = DDIMScheduler(prediction_type="v_prediction", **BETAS)
    schedule = NoiseSchedule.from_scheduler(ddim)
    x0, eps, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    x = ddim.add_noise(x0, eps, t)
    torch.testing.assert_close(schedule.from_eps(eps, x, t), ddim.get_velocity(x0, eps, t), rtol=1e-4, atol=1e-4)


def test_fractional_timesteps_lie_between_their_neighbours():
    schedule = NoiseSchedule.from_scheduler(EulerDiscreteScheduler(**BETAS))
    _, sigma = schedule.alpha_sigma(torch.tensor([500.0, 500.25, 501.0]))
    assert sigma[0] < sigma[1] < sigma[2]
