"""Steering: resampling, weights that telescope, groups that do not mix, and a population that really is steered."""

import dataclasses

import pytest
import torch
from conftest import make_head
from diffusers import EulerAncestralDiscreteScheduler

from guidance.guides import MidBlockGuide, ScoringGuide
from guidance.sampling import sample_latents
from guidance.sampling.start import FromMask
from guidance.sampling.steering import (
    Population,
    best_of_n,
    effective_sample_size,
    particle_seeds,
    steer_latents,
    systematic,
)
from guidance.taps import X0
from guidance.utils.errors import UserError

PROMPTS = ["a red balloon over the sea at dusk", "a white tower in the hills at noon"]
OPTIONS = {"num_steps": 5, "cfg_scale": 2.0}


@pytest.fixture(scope="module")
def guide(tiny_pipe):
    """A random head whose score is scaled up, so that a few particles differ clearly."""
    guide = MidBlockGuide(make_head(tiny_pipe), 1.0, start=0, stop=1)
    small = guide.score_of
    guide.score_of = lambda y: 100 * small(y)
    return guide


@dataclasses.dataclass(eq=False)
class Brightness(ScoringGuide):
    """The mean of the predicted x0: what can be checked on the final latents."""

    guidance_scale: float = 1.0
    tap = X0

    def score(self, h, t):
        return 10 * h.mean((1, 2, 3))


# ---- mathematics --------------------------------------------------------------------------------------------------
def test_systematic_counts_are_within_one_of_their_expectation():
    w = torch.rand(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = w / w.sum(1, keepdim=True)
    u = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ancestors = systematic(w, u)
    counts = torch.nn.functional.one_hot(ancestors, 7).sum(1)
    assert ((counts - 7 * w).abs() < 1).all()
    assert (ancestors.diff(dim=1) >= 0).all()


def test_systematic_is_unbiased_and_never_takes_a_dead_particle():
    w = torch.tensor([[0.05, 0.0, 0.6, 0.35, 0.0]], dtype=torch.float64)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # the exact mean over u, by the midpoint rule
    counts = torch.nn.functional.one_hot(systematic(w.expand(1000, -1), u), 5).sum(1).double()
    torch.testing.assert_close(counts.mean(0), 5 * w[0], atol=2e-3, rtol=0)
    assert counts[:, [1, 4]].sum() == 0
    equal = torch.full((1, 5), 0.2, dtype=torch.float64)
    for value in (0.01, 0.5, 0.99):
        assert systematic(equal, torch.tensor([value])).tolist() == [[0, 1, 2, 3, 4]]


def test_effective_sample_size():
    w = torch.tensor([[0.5, 0.25, 0.25], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    want = w.sum(1) ** 2 / w.square().sum(1)
    torch.testing.assert_close(effective_sample_size(w.log()), want)
    torch.testing.assert_close(effective_sample_size(w.log() + 1000), want)
    assert want.tolist()[1:] == [3, 1]


@pytest.mark.parametrize("potential", ["diff", "max", "sum"])
def test_the_product_of_potentials_telescopes(potential):
    """Without resampling the final weights are exp(lam r_last), whatever the scores were on the way."""
    r = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
    population = Population([1, 2, 3], 4, 0.7, potential, threshold=0.0)
    for i, scores in enumerate(r):
        population.weigh(scores, last=i == 5)
        own = torch.arange(4).expand(3, 4)
        assert torch.equal(population.resample(i), own)
    torch.testing.assert_close(population.weights, (0.7 * r[-1].double()).softmax(1))


def test_each_potential_weighs_as_it_says():
    r = torch.tensor([[[1.0, 3.0]], [[2.0, -1.0]]])
    for potential, want in [("diff", [2.0, -1.0]), ("max", [1 + 2.0, 3 + 3.0]), ("sum", [1 + 3.0, 3 + 2.0])]:
        population = Population([0], 2, 0.5, potential, threshold=0.0)
        for scores in r:
            population.weigh(scores)
        torch.testing.assert_close(population.log_weights, 0.5 * torch.tensor([want], dtype=torch.float64))


@pytest.mark.parametrize(("potential", "lam"), [("diff", 0.6), ("max", 0.3), ("sum", 0.2)])
@pytest.mark.parametrize("threshold", [0.0, 0.9, 1.0])
def test_the_population_targets_the_tilted_distribution(potential, lam, threshold):
    """A Gaussian chain with N(0, 1) at every step, r(x) = x: the target's end is N(lam, 1) exactly.

    "max" and "sum" overshoot on the way and are corrected at the end, so their error grows quickly with lam.
    """
    n, a = 20_000, 0.8
    g = torch.Generator().manual_seed(3)
    population = Population([5, 6], n, lam, potential, threshold)
    x = torch.randn(2, n, generator=g, dtype=torch.float64)
    resampled = 0
    for i in range(4):
        if i:
            x = a * x + (1 - a * a) ** 0.5 * torch.randn(2, n, generator=g, dtype=torch.float64)
        population.weigh(x, last=i == 3)
        ancestors = population.resample(i)
        resampled += int((ancestors != torch.arange(n)).any())
        x = x.gather(1, ancestors)
    mean = (population.weights * x).sum(1)
    variance = (population.weights * (x - mean[:, None]).square()).sum(1)
    torch.testing.assert_close(mean, torch.full_like(mean, lam), atol=0.04, rtol=0)
    torch.testing.assert_close(variance, torch.ones_like(mean), atol=0.08, rtol=0)
    assert (resampled > 0) == (threshold > 0)


def test_groups_are_weighed_and_resampled_by_themselves():
    scores = torch.tensor([[9.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    both = Population([1, 2], 4, 1.0)
    both.weigh(scores)
    ancestors = both.resample(0)
    assert ancestors.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]
    alone = Population([1], 4, 1.0)
    alone.weigh(scores[:1])
    assert torch.equal(alone.resample(0), ancestors[:1])


def test_a_score_that_is_not_finite_has_no_weight():
    for lam in (2.0, 0.0, -2.0):
        population = Population([1, 2], 3, lam, threshold=0.9)
        population.weigh(torch.tensor([[1.0, torch.nan, 2.0], [torch.nan, torch.inf, torch.nan]]))
        assert population.weights[0, 1] == 0 and population.weights.isfinite().all()
        torch.testing.assert_close(population.weights[1], torch.full((3,), 1 / 3, dtype=torch.float64))
        assert 1 not in population.resample(0)[0]
        population.weigh(torch.ones(2, 3), last=True)
        assert population.weights.isfinite().all()


def test_particle_seeds():
    seeds = particle_seeds(7, 5)
    assert seeds[0] == 7 and len(set(seeds)) == 5 and seeds[:3] == particle_seeds(7, 3)
    assert not set(seeds) & set(particle_seeds(8, 5)) and min(particle_seeds(-1, 5)[1:]) >= 0


# ---- in the sampler -----------------------------------------------------------------------------------------------
def test_lam_zero_gives_the_plain_samples_bit_for_bit(tiny_pipe, guide):
    got = steer_latents(tiny_pipe, PROMPTS, [1, 2], guide, particles=3, lam=0.0, select="all", **OPTIONS)
    prompts = [p for p in PROMPTS for _ in range(3)]
    seeds = [*particle_seeds(1, 3), *particle_seeds(2, 3)]
    assert torch.equal(got.latents, sample_latents(tiny_pipe, prompts, seeds, eta=1.0, **OPTIONS))
    assert torch.equal(got.ancestors, torch.arange(3).expand_as(got.ancestors))
    torch.testing.assert_close(got.ess, torch.full_like(got.ess, 3))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++"])
def test_one_particle_is_sample_latents(tiny_pipe, guide, scheduler):
    got = steer_latents(tiny_pipe, PROMPTS, [1, 2], guide, particles=1, scheduler=scheduler, **OPTIONS)
    eta = float(scheduler == "ddim")
    plain = sample_latents(tiny_pipe, PROMPTS, [1, 2], scheduler=scheduler, eta=eta, **OPTIONS)
    assert torch.equal(got.latents, plain)


def test_lineage_is_the_latents_own(tiny_pipe, guide):
    """Copies have their ancestor's latents; following the lineage gives each path's scores."""
    after, before = [], []
    forward = tiny_pipe.unet.forward

    def spy(x, *args, **kwargs):
        before.append(x[-8:].clone())
        return forward(x, *args, **kwargs)

    tiny_pipe.unet.forward = spy
    try:
        got = steer_latents(
            tiny_pipe,
            PROMPTS,
            [1, 2],
            guide,
            lam=30.0,
            threshold=1.0,
            select="all",
            callback=lambda i, x, r: after.append(x),
            **OPTIONS,
        )
        assert tiny_pipe.unet.forward is spy
    finally:
        del tiny_pipe.unet.forward
    assert (got.ancestors != torch.arange(4)).any()
    assert torch.equal(got.ancestors[-1], torch.arange(4).expand(2, 4))  # finished latents are not copied
    for i, ancestors in enumerate(got.ancestors[:-1]):
        x = after[i].unflatten(0, (2, 4))
        assert torch.equal(after[i], before[i + 1])
        for group in range(2):
            same = (x[group][:, None] == x[group][None]).flatten(2).all(2)
            assert torch.equal(same, ancestors[group][:, None] == ancestors[group][None])
    assert torch.equal(after[-1], got.latents)
    lineage = got.lineage()
    assert torch.equal(lineage[-1], torch.arange(4).expand(2, 4))
    for i, ancestors in enumerate(got.ancestors):
        assert torch.equal(lineage[i], ancestors.gather(1, lineage[i + 1]))
    assert torch.equal(got.scores, got.score_history[-1])


def test_steering_raises_the_score_and_a_negative_lam_lowers_it(tiny_pipe, guide):
    options = {"particles": 24, "select": "all", **OPTIONS}
    low, plain, high = (
        steer_latents(tiny_pipe, PROMPTS[:1], [3], guide, lam=lam, **options) for lam in (-4.0, 0.0, 4.0)
    )
    mean = [float((s.weights * s.scores).sum()) for s in (low, plain, high)]
    assert mean[0] < mean[1] < mean[2]
    assert low.scores.mean() < high.scores.mean()
    assert (high.ess < 12).any() and (high.ancestors != torch.arange(24)).any()


def test_an_x0_guide_moves_the_final_latents(tiny_pipe, guide):
    options = {"particles": 24, "select": "all", **OPTIONS, "cfg_scale": 1.0}
    bright = Brightness()
    plain, high = (steer_latents(tiny_pipe, PROMPTS[:1], [3], bright, lam=lam, **options) for lam in (0.0, 20.0))
    final = [10 * s.latents.mean((1, 2, 3)) for s in (plain, high)]
    assert final[1].mean() > final[0].mean()
    torch.testing.assert_close(plain.scores[0], final[0], atol=0.5, rtol=0.2)


def test_each_prompt_is_the_same_alone_and_in_company(tiny_pipe, guide):
    options = {"lam": 30.0, "select": "all", **OPTIONS}
    both = steer_latents(tiny_pipe, PROMPTS, [1, 2], guide, **options)
    again = steer_latents(tiny_pipe, PROMPTS, [1, 2], guide, **options)
    assert torch.equal(both.latents, again.latents) and torch.equal(both.ancestors, again.ancestors)
    for i in (0, 1):
        alone = steer_latents(tiny_pipe, PROMPTS[i : i + 1], [i + 1], guide, **options)
        assert torch.equal(alone.ancestors[:, 0], both.ancestors[:, i])
        torch.testing.assert_close(alone.latents, both.latents[4 * i : 4 * i + 4], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("parts_together", [True, False])
def test_scores_are_of_the_conditional_part_beside_gradients(tiny_pipe, guide, monkeypatch, parts_together):
    """Under guidance the parts run in step (CPU) or one after the other (GPU): the same scores."""
    monkeypatch.setattr("guidance.apply.guided.IN_STEP_WEIGHTS", 0 if parts_together else float("inf"))
    records = []
    got = steer_latents(
        tiny_pipe,
        PROMPTS,
        [1, 2],
        guide,
        particles=2,
        lam=10.0,
        guides=[guide],
        callback=lambda i, x, r: records.append(r),
        **OPTIONS,
    )
    want = torch.stack([r.scores[guide.name].reshape(2, 2) for r in records])
    torch.testing.assert_close(got.score_history, want, rtol=1e-4, atol=1e-4)
    plain = steer_latents(tiny_pipe, PROMPTS, [1, 2], guide, particles=2, lam=10.0, **OPTIONS)
    assert not torch.allclose(got.latents, plain.latents, atol=1e-3)


def test_what_is_selected(tiny_pipe, guide):
    run = lambda select: steer_latents(  # noqa: E731
        tiny_pipe, PROMPTS, [1, 2], guide, lam=5.0, select=select, **OPTIONS
    )
    everything, best, drawn = (run(select) for select in ("all", "best", "draw"))
    x = everything.latents.unflatten(0, (2, 4))
    assert everything.chosen is None
    assert torch.equal(best.chosen, everything.scores.argmax(1))
    for got in (best, drawn):
        assert torch.equal(got.latents, torch.stack([x[g, c] for g, c in enumerate(got.chosen)]))
    assert (everything.weights.sum(1) - 1).abs().max() < 1e-12


def test_best_of_n_keeps_the_best_plain_sample(tiny_pipe, guide):
    got = best_of_n(tiny_pipe, PROMPTS, [1, 2], guide, scheduler="dpm++", **OPTIONS)
    seeds = [particle_seeds(s, 4)[c] for s, c in zip([1, 2], got.chosen, strict=True)]
    plain = sample_latents(tiny_pipe, PROMPTS, seeds, scheduler="dpm++", **OPTIONS)
    torch.testing.assert_close(got.latents, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.scores.argmax(1), got.chosen)


def test_the_guides_range_and_a_mask_are_respected(tiny_pipe, guide):
    half = MidBlockGuide(guide.heads[0], 1.0, start=0.2, stop=0.6)
    half.score_of = guide.score_of
    known, mask = torch.randn(1, 4, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    got = steer_latents(
        tiny_pipe, PROMPTS, [1, 2], half, lam=50.0, threshold=1.0, start=FromMask(known, mask), **OPTIONS
    )
    still = torch.arange(4).expand(2, 4)
    moved = [bool((a != still).any()) for a in got.ancestors]
    assert moved[1] and not (moved[0] or moved[3] or moved[4])
    torch.testing.assert_close(got.weights, torch.full_like(got.weights, 0.25))
    assert torch.equal(got.latents[..., 8:], known.expand(2, -1, -1, -1)[..., 8:])
    rare = steer_latents(tiny_pipe, PROMPTS, [1, 2], guide, lam=50.0, resample_every=3, **OPTIONS)
    assert [bool((a != still).any()) for a in rare.ancestors] == [False, False, True, False, False]


def test_ancestral_schedulers_can_be_steered(tiny_pipe, guide):
    own = tiny_pipe.scheduler
    tiny_pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(own.config)
    try:
        got = steer_latents(tiny_pipe, PROMPTS[:1], [1], guide, lam=30.0, **OPTIONS)
    finally:
        tiny_pipe.scheduler = own
    assert got.latents.isfinite().all() and "forward" not in vars(tiny_pipe.unet)


def test_bad_input_gets_a_sentence(tiny_pipe, guide):
    late = MidBlockGuide(guide.heads[0], 1.0, start=0.95, stop=1.0)
    rare = MidBlockGuide(guide.heads[0], 1.0, start=0, stop=1, every=2)
    for options, text in [
        ({"eta": 0.0}, "draws noise, got DDIMScheduler with eta=0; use eta=1"),
        ({"scheduler": "euler"}, "draws noise, got EulerDiscreteScheduler"),
        ({"scheduler": "dpm++"}, "without a memory of each sample, got DPMSolverMultistepScheduler"),
        ({"scheduler": "ddpm", "eta": 0.5}, "eta=0 with DDPMScheduler"),
        ({"potential": "mean"}, "potential to be one of diff, max, sum, got 'mean'"),
        ({"guides": [rare]}, "guides with every=1"),
        ({"guide": late}, "in the guide's range 0.95..1, got none"),
    ]:
        call = {"prompts": PROMPTS, "seeds": [1, 2], "guide": guide, **OPTIONS, **options}
        with pytest.raises(UserError, match=text):
            steer_latents(tiny_pipe, **call)
    assert "forward" not in vars(tiny_pipe.unet)
