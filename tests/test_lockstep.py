"""Parts in step are the parts apart: same numbers, a graph for the conditional part alone, weights used once."""

import pytest
import torch
from test_taps import sd15_shape

from guidance.taps import forward_with_gradient, whole_blocks
from guidance.taps.lockstep import Lockstep, as_batch, as_parts, lockstep, plain, split_parts


def saved_bytes(run):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


def double(model):
    return model.double().eval().requires_grad_(False)


def score_gradient(features):
    h = features["mid_block"]
    ramp = torch.linspace(-1, 1, h.shape[1], dtype=h.dtype)[None, :, None, None]
    return {"mid_block": ramp.expand_as(h) / h.numel()}, None


def linear_full_graph(unet, x, t, text):
    leaf = x.clone().requires_grad_(True)
    found = []
    handle = unet.mid_block.register_forward_hook(lambda m, a, h: found.append(h))
    eps = unet(leaf, t, text).sample
    handle.remove()
    h = found[0]
    return eps.detach(), torch.autograd.grad(h, leaf, score_gradient({"mid_block": h.detach()})[0]["mid_block"])[0]


@pytest.mark.parametrize("conditional", [0, 1, 2])
@pytest.mark.parametrize("times", ["one", "per sample"])
def test_parts_in_step_equal_parts_apart(conditional, times):
    unet = double(sd15_shape())
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(2, 4, 16, 16, generator=g).double() for _ in range(3)]
    text = [torch.randn(2, 7, 768, generator=g).double() for _ in range(3)]
    t = torch.tensor(401) if times == "one" else torch.tensor([401, 11])

    def in_step(leaf):
        xs = [*x[:conditional], leaf, *x[conditional + 1 :]]
        return unet(lockstep(xs, conditional), t, lockstep(text, conditional)).sample

    out, ((gradient, *_),) = forward_with_gradient(in_step, unet, x[conditional], ["mid_block"], [score_gradient])
    eps, expected = linear_full_graph(unet, x[conditional], t, text[conditional])
    parts = split_parts(out, conditional)
    assert not any(isinstance(p, Lockstep) or p.requires_grad for p in parts)
    torch.testing.assert_close(parts[conditional], eps, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-14)
    with torch.no_grad():
        for p in range(3):
            torch.testing.assert_close(parts[p], unet(x[p], t, text[p]).sample, rtol=1e-9, atol=1e-11)


def test_only_the_conditional_part_is_remembered_for_the_backward_pass():
    unet = sd15_shape().eval().requires_grad_(False)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, 7, 768)
    leaf = x.clone().requires_grad_(True)
    alone = saved_bytes(lambda: unet(leaf, 401, text))
    both = saved_bytes(lambda: unet(lockstep([x + 1, leaf], 1), 401, lockstep([text + 1, text], 1)))
    assert both <= 1.02 * alone


def test_weights_are_used_once_for_all_parts():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = conv(lockstep([a, b], 1))
    assert [e.count for e in profile.key_averages() if e.key == "aten::conv2d"] == [1]
    for part, whole in zip(split_parts(y, 1), (a, b), strict=True):
        torch.testing.assert_close(part, conv(whole))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 3, "dilation": 2, "padding": 2}])
def test_convolutions_with_any_options_pull_back(options):
    conv = double(torch.nn.Conv2d(6, 9, 3, **options))
    a, b = torch.randn(2, 6, 9, 9).double(), torch.randn(2, 6, 9, 9).double().requires_grad_(True)
    y = conv(lockstep([a, b], 1))
    vector = torch.randn(plain(y).shape).double()
    (got,) = torch.autograd.grad(plain(y), b, vector)
    (expected,) = torch.autograd.grad(conv(b), b, vector)
    torch.testing.assert_close(got, expected)


def test_containers_and_shared_arguments():
    a, b = torch.zeros(1, 2), torch.ones(1, 2)
    joined = lockstep([({"k": a, "same": None}, [a]), ({"k": b, "same": None}, [b])], 1)
    assert plain(joined[0]["k"]) is not a and torch.equal(plain(joined[0]["k"]), b)
    assert joined[0]["same"] is None and torch.equal(joined[1][0].others[0], a)
    assert not isinstance(lockstep([a, a], 0), Lockstep)  # the very same tensor stays ordinary


def test_blocks_after_the_tap_get_the_whole_batch():
    unet = sd15_shape().eval().requires_grad_(False)
    x, text = torch.randn(2, 4, 16, 16), torch.zeros(2, 7, 768)
    seen = {"down_blocks": [], "up_blocks": []}
    for name, found in seen.items():
        for block in getattr(unet, name):
            forward = block.forward

            def watched(*args, found=found, forward=forward, **kwargs):
                every = [*args, *kwargs.values(), *kwargs.get("res_hidden_states_tuple", ())]
                found.append({(isinstance(a, Lockstep), len(a)) for a in every if isinstance(a, torch.Tensor)})
                return forward(*args, **kwargs)

            block.forward = watched

    def in_step(leaf):
        with whole_blocks(unet):
            return unet(lockstep([x, leaf], 1), torch.tensor(401), lockstep([text + 1, text], 1)).sample

    out, _ = forward_with_gradient(in_step, unet, x + 1, ["mid_block"], [score_gradient])
    assert all((True, 2) in sizes and (False, 4) not in sizes for sizes in seen["down_blocks"])
    # the time embedding too, which all parts share
    assert all(sizes == {(False, 4)} for sizes in seen["up_blocks"])
    assert isinstance(out, Lockstep) and out.shape == x.shape


def test_a_batch_of_parts_and_back():
    a, b, own = torch.zeros(1, 2), torch.ones(1, 2), torch.full((1, 3), 5.0)
    tied = lockstep([a, b], 0)
    (x, shared, number), options, parts = as_batch((tied, own, 7), {"skips": (tied, None)})
    assert parts == 2 and number == 7 and options["skips"][1] is None
    # the conditional part is the last
    assert torch.equal(x, torch.cat([b, a])) and torch.equal(options["skips"][0], x)
    assert shared.shape == (2, 3)
    back = as_parts((x, None), parts)[0]
    assert torch.equal(plain(back), a) and torch.equal(back.others[0], b)
    (again,), _, _ = as_batch((back,), {})
    assert again is x  # no copy
    assert as_batch((own,), {}) is None
    assert as_batch((tied, lockstep([torch.zeros(3, 2), torch.ones(3, 2)], 0)), {}) is None
