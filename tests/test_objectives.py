"""Objectives: closed forms, gradients, and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from guidance.heads import HeadConfig
from guidance.heads.objectives import OBJECTIVES, build_objective
from guidance.utils.errors import UserError

RATING = HeadConfig("conv", in_channels=8)
COLOUR = HeadConfig("conv", 8, outputs=3, task="class", target="colour", labels=["red", "green", "blue"])
NUMBER = HeadConfig("conv", 8, outputs=1, task="regression", labels=[])
BINARY = HeadConfig("conv", 8, outputs=1, task="binary", labels=[])


def logits(outputs: int = 10, b: int = 4) -> torch.Tensor:
    return torch.randn(b, outputs, generator=torch.Generator().manual_seed(0)).double()


def test_expected_rating() -> None:
    x = logits()
    p = x.softmax(1)
    expected = sum((k + 1) * p[:, k] for k in range(10))
    torch.testing.assert_close(build_objective(RATING)(x), expected)
    certain = torch.full((1, 10), -100.0)
    certain[0, 6] = 100
    assert build_objective(RATING)(certain).item() == pytest.approx(7)


def test_expected_rating_gradient_is_the_covariance() -> None:
    x = logits().requires_grad_()
    (gradient,) = torch.autograd.grad(build_objective(RATING)(x).sum(), x)
    p, k = x.softmax(1), torch.arange(1, 11, dtype=torch.double)
    torch.testing.assert_close(gradient, p * (k - (p @ k)[:, None]))


@pytest.mark.parametrize("k", [2, 7, 7.0, "7", 10, 6.5])
def test_at_least(k) -> None:
    x = logits()
    rows = [i for i in range(10) if i + 1 >= float(k)]
    expected = x.softmax(1)[:, rows].sum(1).log()
    torch.testing.assert_close(build_objective(RATING, "at_least", k)(x), expected)


def test_at_least_stays_finite_where_the_probability_vanishes() -> None:
    x = torch.zeros(1, 10)
    x[0, 0] = 500.0
    assert build_objective(RATING, "at_least", 9)(x).item() == pytest.approx(math.log(2) - 500)


@pytest.mark.parametrize("target", ["green", 1])
def test_class_by_name_and_index(target) -> None:
    x = logits(3)
    torch.testing.assert_close(build_objective(COLOUR, target=target)(x), x.softmax(1)[:, 1].log())


def test_numeric_labels_are_names_never_indices() -> None:
    x = logits()
    torch.testing.assert_close(build_objective(RATING, "class", 7)(x), x.softmax(1)[:, 6].log())
    with pytest.raises(UserError, match="got 0"):
        build_objective(RATING, "class", 0)


def test_regression_and_binary() -> None:
    x = logits(1)
    assert torch.equal(build_objective(NUMBER)(x), x[:, 0])
    wide = torch.tensor([[-50.0], [0.3], [50.0]]).double()
    d = wide.sigmoid().clamp(1e-5, 1 - 1e-5)[:, 0]
    torch.testing.assert_close(build_objective(BINARY)(wide), (d / (1 - d)).log())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_equal_finite_differences(name: str) -> None:
    config = {"regression": NUMBER, "binary": BINARY}.get(name, RATING)
    target = 7 if name in ("class", "at_least") else None
    objective = build_objective(config, name, target)
    assert objective(logits(config.outputs)).shape == (4,)
    assert torch.autograd.gradcheck(objective, logits(config.outputs).requires_grad_())


@pytest.mark.parametrize(
    ("config", "name", "target", "message"),
    [
        (RATING, "expectd", None, "Did you mean 'expected'"),
        (RATING, "expected", 3, "no target"),
        (RATING, "at_least", None, "target above 1 and up to 10"),
        (RATING, "regression", None, "head of task regression"),
        (COLOUR, None, None, "among the labels"),
        (COLOUR, "expected", None, "numeric labels"),
        (HeadConfig("conv", 8, outputs=64, task="embedding", labels=[]), None, None, "Expected an objective"),
    ],
)
def test_mistakes_get_a_sentence(config, name, target, message) -> None:
    with pytest.raises(UserError, match=message):
        build_objective(config, name, target)
