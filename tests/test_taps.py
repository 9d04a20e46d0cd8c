"""One-forward gradients equal those of the full graph; hooks leave nothing behind."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from guidance.apply.guided import unit_rms
from guidance.taps import capture, encode_features, forward_with_gradient
from guidance.taps.hooks import pull_back
from guidance.utils.errors import UserError


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def sd15_shape() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet topology with a fifth of its channels, random weights."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=64, block_out_channels=(64, 128, 256, 256), cross_attention_dim=768, attention_head_dim=8
    )


def inputs(unet, batch=2, size=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    size = size or unet.config.sample_size
    x = torch.randn(batch, unet.config.in_channels, size, size, generator=g, dtype=dtype)
    text = torch.randn(batch, 7, unet.config.cross_attention_dim, generator=g, dtype=dtype)
    return x, torch.tensor(401), text


def score(h):
    return (h * torch.linspace(-1, 1, h.shape[1], dtype=h.dtype)[None, :, None, None]).tanh().sum((1, 2, 3))


def score_gradient(features):
    leaf = features["mid_block"].requires_grad_(True)
    with torch.enable_grad():
        return {"mid_block": torch.autograd.grad(score(leaf).sum(), leaf)[0]}, None


def full_graph(unet, x, t, text):
    leaf = x.clone().requires_grad_(True)
    found = []
    handle = unet.mid_block.register_forward_hook(lambda m, a, h: found.append(h))
    eps = unet(leaf, t, text).sample
    handle.remove()
    (g,) = torch.autograd.grad(score(found[0]).sum(), leaf)
    return eps.detach(), g


@pytest.mark.parametrize("which", ["tiny", "sd15"])
def test_one_forward_equals_the_full_graph_bit_for_bit(which, tiny_pipe):
    unet = tiny_pipe.unet if which == "tiny" else sd15_shape().eval().requires_grad_(False)
    x, t, text = inputs(unet, size=None if which == "tiny" else 16)
    eps, ((g, *_),) = forward_with_gradient(
        lambda leaf: unet(leaf, t, text).sample, unet, x, ["mid_block"], [score_gradient]
    )
    want_eps, want_g = full_graph(unet, x, t, text)
    assert torch.equal(eps, want_eps)
    assert torch.equal(g, want_g)
    assert g.abs().max() > 0
    assert not eps.requires_grad
    assert hooks_of(unet) == 0


def test_gradient_agrees_with_finite_differences(tiny_pipe):
    import copy

    unet = copy.deepcopy(tiny_pipe.unet).double()
    x, t, text = inputs(unet, batch=1, dtype=torch.float64)
    _, ((g, *_),) = forward_with_gradient(
        lambda leaf: unet(leaf, t, text).sample, unet, x, ["mid_block"], [score_gradient]
    )
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h = 1e-5
    up, down = (score(encode_features(unet, x + s * h * direction, t, text)) for s in (1, -1))
    torch.testing.assert_close((g * direction).sum(), (up - down)[0] / (2 * h), rtol=1e-6, atol=1e-9)


def test_two_targets_give_both_gradients(tiny_pipe):
    unet = tiny_pipe.unet
    x, t, text = inputs(unet)

    def half(features):
        return {"mid_block": 0.5 * score_gradient(features)[0]["mid_block"]}, None

    _, ((a, *_), (b, *_)) = forward_with_gradient(
        lambda leaf: unet(leaf, t, text).sample, unet, x, ["mid_block"], [score_gradient, half]
    )
    torch.testing.assert_close(b, 0.5 * a)


def test_encoding_stops_at_the_tap_and_equals_capture(tiny_pipe):
    unet = tiny_pipe.unet
    x, t, text = inputs(unet)
    with torch.no_grad(), capture(unet) as features:
        unet(x, t, text)
    ran = []
    handle = unet.up_blocks[0].register_forward_hook(lambda *a: ran.append(1))
    h = encode_features(unet, x, t, text)
    handle.remove()
    assert torch.equal(h, features["mid_block"])
    assert not ran
    assert hooks_of(unet) == 0


def test_hooks_are_removed_after_an_error(tiny_pipe):
    unet = tiny_pipe.unet
    x, t, text = inputs(unet)

    def broken(features):
        raise RuntimeError("broken head")

    with pytest.raises(RuntimeError, match="broken head"):
        forward_with_gradient(lambda leaf: unet(leaf, t, text).sample, unet, x, ["mid_block"], [broken])
    with pytest.raises(ZeroDivisionError), capture(unet):
        raise ZeroDivisionError
    assert hooks_of(unet) == 0
    assert torch.is_grad_enabled()


def test_half_precision_gradients_do_not_underflow(tiny_pipe):
    import copy

    unet = copy.deepcopy(tiny_pipe.unet)
    x, t, text = inputs(unet)

    def tiny(features):
        return {"mid_block": 1e-7 * score_gradient({k: v.float() for k, v in features.items()})[0]["mid_block"]}, None

    _, ((want, *_),) = forward_with_gradient(lambda leaf: unet(leaf, t, text).sample, unet, x, ["mid_block"], [tiny])
    unet.to(torch.bfloat16)
    half = [v.bfloat16() for v in (x, text)]
    _, ((got, *_),) = forward_with_gradient(
        lambda leaf: unet(leaf, t, half[1]).sample, unet, half[0], ["mid_block"], [tiny]
    )
    assert got.dtype == torch.float32
    cosine = torch.cosine_similarity(unit_rms(got).flatten(1), unit_rms(want).flatten(1))
    assert (cosine > 0.95).all()


def test_bad_taps_and_inference_mode_get_a_sentence(tiny_pipe):
    unet = tiny_pipe.unet
    x, t, text = inputs(unet)
    with pytest.raises(UserError, match="Did you mean 'mid_block'"):
        encode_features(unet, x, t, text, tap="mid_blok")
    with torch.inference_mode(), pytest.raises(UserError, match="inference_mode"):
        forward_with_gradient(lambda leaf: unet(leaf, t, text).sample, unet, x, ["mid_block"], [score_gradient])


def test_features_that_do_not_depend_on_the_input_pull_back_zeros() -> None:
    leaf = torch.ones(2, 3, 4, 4, requires_grad=True)
    fixed = torch.ones(2, 5, 2, 2)
    gradient = pull_back({"tap": fixed}, {"tap": torch.ones_like(fixed)}, leaf, retain=False)
    assert gradient.shape == leaf.shape and gradient.dtype == torch.float32 and not gradient.any()
