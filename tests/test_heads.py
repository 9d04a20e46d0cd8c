"""Heads: the report's network bit for bit, shapes, precision, files, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from guidance.heads import HEADS, HeadConfig, build_head, check_fits, load_head, save_head
from guidance.schedule import NoiseSchedule
from guidance.utils.errors import UserError


def make(kind: str = "conv", **options):
    torch.manual_seed(0)
    return build_head(HeadConfig(kind, **{"in_channels": 24, **options}))


def features(b: int = 3, c: int = 24, y: int = 8, x: int = 8) -> torch.Tensor:
    return torch.randn(b, c, y, x, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("time_conditioned", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (4, 4), (5, 7)])
def test_conv_head_is_the_reports_bit_for_bit(time_conditioned: bool, size: tuple[int, int]) -> None:
    head = make(in_channels=1280, time_conditioned=time_conditioned).eval()
    report = nn.Sequential(
        nn.Conv2d(1280, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(256, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 2)),
        nn.Flatten(), nn.Linear(128 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    shapes = [tuple(p.shape) for p in head.layers.parameters()]
    assert shapes == [tuple(p.shape) for p in report.parameters()]
    report.load_state_dict(dict(zip(report.state_dict(), head.layers.state_dict().values(), strict=True)))
    h = features(2, 1280, *size)
    assert torch.equal(head(h, torch.tensor([3.0, 900.0])), report(h))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (4, 4), (12, 9), (32, 32)])
def test_any_spatial_size(kind: str, size: tuple[int, int]) -> None:
    assert make(kind)(features(2, 24, *size), 500).shape == (2, 10)


@pytest.mark.parametrize("kind", HEADS)
def test_rows_do_not_see_each_other_and_channels_last_is_fine(kind: str) -> None:
    head = make(kind).eval()
    h, t = features().requires_grad_(), torch.tensor([0.0, 500.0, 999.0])
    out = head(h.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(out[1:2], head(h[1:2], t[1:2]))
    (gradient,) = torch.autograd.grad(out[1].sum(), h)
    assert gradient[1].abs().sum() > 0 and gradient[0].abs().sum() == 0


@pytest.mark.parametrize("kind", HEADS)
def test_gradient_equals_finite_differences(kind: str) -> None:
    head = make(kind, in_channels=4, hidden=16).double().eval()
    h = features(2, 4, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head(x, torch.tensor([10.0, 800.0])), h)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_computes_in_float32_whatever_comes(kind: str, dtype: torch.dtype) -> None:
    head, h = make(kind).eval(), features().to(dtype)
    out = head(h, 7)
    assert out.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(h, 7), out) and torch.equal(head(h.float(), 7), out)


@pytest.mark.parametrize("kind", HEADS)
def test_only_a_time_conditioned_head_learns_the_timestep(kind: str) -> None:
    for conditioned in (True, False):
        head = make(kind, time_conditioned=conditioned)
        with torch.no_grad():
            for p in head.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        same = torch.equal(head(features(), 10), head(features(), 900))
        assert same is not conditioned


def test_standardisation_and_temperature() -> None:
    head = make().eval()
    h, t = features(), torch.tensor([5.0, 450.0, 999.0])
    plain = head(h, t)
    head.feature_mean.fill_(2.0)
    head.feature_std.fill_(0.5)
    torch.testing.assert_close(head(h * 0.5 + 2, t), plain)
    head.config.temperature = [1.0 + i for i in range(10)]
    expected = plain / torch.tensor([[1.0], [5.0], [10.0]])
    torch.testing.assert_close(head(h * 0.5 + 2, t), expected)
    torch.testing.assert_close(head.temperature(t), torch.tensor([1.0, 5.0, 10.0]))


def test_regression_outputs_are_in_target_units() -> None:
    head = make(task="regression", outputs=1, labels=[])
    plain = head(features(), 3)
    head.output_mean.fill_(50.0)
    head.output_std.fill_(7.0)
    torch.testing.assert_close(head(features(), 3), plain * 7 + 50)


@pytest.mark.parametrize("kind", HEADS)
def test_saved_and_loaded(kind: str, tmp_path) -> None:
    head = make(kind, temperature=[1.5] * 10, start=0.2, metrics={"accuracy": 0.3})
    head.feature_mean.normal_()
    save_head(head, tmp_path / "a head")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a head"]
    loaded = load_head(tmp_path / "a head")
    assert loaded.config == head.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(features(), 400), head.eval()(features(), 400))


def test_missing_and_broken_heads_get_a_sentence(tmp_path) -> None:
    save_head(make(), tmp_path / "aesthetic")
    with pytest.raises(UserError, match="Did you mean 'aesthetic'"):
        load_head(tmp_path / "aestetic")
    with pytest.raises(UserError, match=r"accelerate launch train/head\.py"):
        load_head(tmp_path / "nowhere" / "x")
    weights = tmp_path / "aesthetic" / "head.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(UserError, match="cut short"):
        load_head(tmp_path / "aesthetic")


def test_a_folder_of_other_things_is_never_replaced(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        save_head(make(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"outputs": 3}, "one label per output"), ({"temperature": [1.0]}, "10 positive temperatures")],
)
def test_a_bad_config_gets_a_sentence(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**options)


def test_check_fits(tiny_pipe) -> None:
    schedule = NoiseSchedule.from_scheduler(tiny_pipe.scheduler)
    fitting = {"in_channels": 64, "prediction_type": "v_prediction", "base_model": "tiny"}
    check_fits(make(**fitting), tiny_pipe.unet, schedule)
    for options, message in [
        ({"in_channels": 1280}, "Expected 1280 channels at 'mid_block', but UNet2DConditionModel has 64"),
        ({"prediction_type": "epsilon"}, "prediction_type epsilon, got v_prediction"),
        ({"num_train_timesteps": 100}, "num_train_timesteps 100, got 1000"),
        ({"tap": "midblock"}, "Expected a tap"),
    ]:
        with pytest.raises(UserError, match=message):
            check_fits(make(**{**fitting, **options}), tiny_pipe.unet, schedule)
    for tap, channels in [("down_blocks.0", 16), ("up_blocks.0", 64), ("conv_in", 16)]:
        check_fits(make(**{**fitting, "tap": tap, "in_channels": channels}), tiny_pipe.unet, schedule)


def test_other_weights_only_warn(tiny_pipe, recwarn) -> None:
    schedule = NoiseSchedule.from_scheduler(tiny_pipe.scheduler)
    head = make(in_channels=64, prediction_type="v_prediction", base_fingerprint="a" * 12)
    check_fits(head, tiny_pipe.unet, schedule, "a" * 12)
    assert not recwarn
    with pytest.warns(UserWarning, match="other weights"):
        check_fits(head, tiny_pipe.unet, schedule, "b" * 12)
