"""Committees of heads: mean minus k standard deviations, from a guide's score to the command line."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_head

from guidance.guides import MidBlockGuide
from guidance.guides.registry import read_guide
from guidance.heads import HeadConfig, build_head, save_head
from guidance.utils.errors import UserError


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(0)
    return [build_head(HeadConfig("linear", in_channels=4, time_conditioned=False)) for _ in range(3)]


def features() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1)), torch.full((5,), 300.0)


def test_the_score_is_mean_minus_k_deviations(heads) -> None:
    h, t = features()
    alone = torch.stack([MidBlockGuide(head).score(h, t) for head in heads])
    for k in (0.0, 1.0, -2.0):
        score = MidBlockGuide(heads, pessimism=k).score(h, t)
        torch.testing.assert_close(score, alone.mean(0) - k * alone.std(0), atol=1e-5, rtol=1e-5)
    assert (alone.std(0) > 1e-3).all()
    torch.testing.assert_close(MidBlockGuide([heads[0]]).score(h, t), alone[0])


def test_the_gradient_agrees_with_finite_differences(heads) -> None:
    guide = MidBlockGuide([head.double() for head in heads], pessimism=1.5)
    h, t = features()
    h = h.double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: guide.score(x, t.double()), h, eps=1e-6, atol=1e-6)
    for head in heads:
        head.float()


def test_heads_that_agree_have_a_finite_gradient(heads) -> None:
    h, t = features()
    guide = MidBlockGuide([heads[0], heads[0]], pessimism=1.0)
    (gradient,) = torch.autograd.grad(guide.score(h.requires_grad_(True), t).sum(), h)
    (alone,) = torch.autograd.grad(MidBlockGuide(heads[0]).score(h, t).sum(), h)
    torch.testing.assert_close(gradient, alone)


def test_committees_that_cannot_be_are_refused(heads, tiny_pipe) -> None:
    other = build_head(HeadConfig("linear", in_channels=4, target="truth", time_conditioned=False))
    for wrong, k, message in (
        (heads[:1], 1.0, "0 with a single head"),
        (heads, math.nan, "finite pessimism"),
        ([heads[0], other], 0.0, "one target in a committee"),
    ):
        with pytest.raises(UserError, match=message):
            MidBlockGuide(wrong, pessimism=k)
    with pytest.raises(UserError, match="Expected 4 channels"):
        MidBlockGuide([make_head(tiny_pipe), heads[0]]).prepare(tiny_pipe)


def test_a_committee_is_named_on_the_command_line(heads, tmp_path) -> None:
    for i, head in enumerate(heads):
        save_head(head, tmp_path / f"seed{i}")
    others = ",".join(str(tmp_path / f"seed{i}") for i in (1, 2))
    guide = read_guide(f"midblock:head={tmp_path / 'seed0'},committee=[{others}],pessimism=0.5").at(2.0)
    assert len(guide.heads) == 3 and guide.pessimism == 0.5 and guide.guidance_scale == 2
    described = guide.describe()
    prints = {described["head_fingerprint"], *described["committee_fingerprints"]}
    assert described["pessimism"] == 0.5 and len(prints) == 3
