"""Taps of transformers, and several taps at once: exact gradients, features as maps, heads that read them."""

from __future__ import annotations

import copy
import dataclasses
import functools
from contextlib import nullcontext

import pytest
import tiny_pipelines as tiny
import torch
from conftest import make_head
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from test_taps import hooks_of, inputs
from torch.utils.checkpoint import set_checkpoint_early_stop

from guidance.apply import apply_guidance
from guidance.apply.observers import StepScorer
from guidance.data.cache import FeatureCache
from guidance.data.encoding import FeatureEncoder
from guidance.data.features import cache_features
from guidance.guides import MidBlockGuide
from guidance.heads import HEADS, HeadConfig, build_head, check_fits, load_head, save_head
from guidance.models.pipelines import load_pipeline
from guidance.sampling import sample_latents
from guidance.schedule import NoiseSchedule
from guidance.taps import capture, encode_features, forward_with_gradient
from guidance.taps.hooks import join_maps, patch_grid, split_taps, tap_channels
from guidance.training.heads import prepare_head
from guidance.training.recipes import HeadRecipe
from guidance.utils.errors import UserError

JOINED = "down_blocks.0+mid_block"
T = torch.tensor([401, 401])
STATES = ("prompt_embeds", "negative_prompt_embeds")
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
TRANSFORMERS = ("dit", "pixart", "sd3", "flux")


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass
class Case:
    """A small transformer with random weights, its inputs, and how the image's tokens leave its blocks."""

    model: torch.nn.Module
    x: torch.Tensor
    kwargs: dict
    grid: tuple[int, int]
    image: int | None  # index of the image's tokens in a block's output; None: they are the output
    taps: tuple[str, str]


@functools.cache
def transformer(name: str) -> Case:
    """Each on a map that is not square, with as many text tokens as patches where that could be mistaken."""
    torch.manual_seed(0)
    if name == "dit":
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
            sample_size=8, patch_size=2, num_embeds_ada_norm=10,
        )  # fmt: skip
        x, kwargs, grid = randn(2, 4, 8, 8), {"class_labels": torch.tensor([1, 7])}, (4, 4)
        image, taps = None, ("transformer_blocks.0", "transformer_blocks.1")
    elif name == "pixart":
        model = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
            sample_size=8, patch_size=2, cross_attention_dim=16, caption_channels=12,
            use_additional_conditions=False,
        )  # fmt: skip
        none = {"resolution": None, "aspect_ratio": None}
        kwargs = {"encoder_hidden_states": randn(2, 12, 12), "added_cond_kwargs": none}
        x, grid = randn(2, 4, 6, 8), (3, 4)
        image, taps = None, ("transformer_blocks.0", "transformer_blocks.1")
    elif name == "sd3":
        model = SD3Transformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3,
            sample_size=16, patch_size=2, joint_attention_dim=12, pooled_projection_dim=6,
            caption_projection_dim=16, pos_embed_max_size=16,
        )  # fmt: skip
        text = {"encoder_hidden_states": randn(2, 12, 12), "pooled_projections": randn(2, 6)}
        x, kwargs, grid = randn(2, 4, 6, 8), text, (3, 4)
        image, taps = 1, ("transformer_blocks.0", "transformer_blocks.2")
    else:
        model = FluxTransformer2DModel(
            patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(4, 2, 2),
        )  # fmt: skip
        rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(12, 3).float()
        text = {"encoder_hidden_states": randn(2, 12, 12), "pooled_projections": randn(2, 6)}
        x, kwargs, grid = randn(2, 12, 8), text | {"img_ids": ids, "txt_ids": torch.zeros(12, 3)}, (3, 4)
        image, taps = 1, ("transformer_blocks.0", "single_transformer_blocks.0")
    model = model.eval().requires_grad_(False)
    for p in model.parameters():  # adaptive norms start at zero, and then blocks do nothing
        p.data.copy_(0.3 * randn(*p.shape, seed=p.numel()))
    return Case(model, x, kwargs, grid, image, taps)


def score(h):
    """A score that tells positions and channels apart."""
    weights = torch.linspace(-1, 1, h[0].numel(), dtype=h.dtype).reshape(h.shape[1:])
    return (h * weights).tanh().sum((1, 2, 3))


def score_gradient(tap, features):
    leaf = features[tap].requires_grad_(True)
    with torch.enable_grad():
        return {tap: torch.autograd.grad(score(leaf).sum(), leaf)[0]}, None


def raw_outputs(model, taps, run):
    """What modules put out, in the graph, by hooks that this test writes itself."""
    found = {}
    handles = [
        model.get_submodule(tap).register_forward_hook(lambda m, a, out, tap=tap: found.update({tap: out}))
        for tap in taps
    ]
    output = run()
    for handle in handles:
        handle.remove()
    return output, found


def by_hand(case, output):
    """Tokens on the grid, written with loops of indices instead of einops."""
    tokens = output if case.image is None else output[case.image]
    rows, columns = case.grid
    return torch.stack([tokens[:, columns * r : columns * (r + 1)] for r in range(rows)], 1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformers_gradient_and_prediction_are_those_of_the_full_graph(name: str) -> None:
    case = transformer(name)
    model, tap = case.model, case.taps[1]
    call = lambda x: model(x, timestep=T, **case.kwargs).sample  # noqa: E731
    target = functools.partial(score_gradient, tap)
    with torch.no_grad():  # as pipelines call it
        output, ((g, *_),) = forward_with_gradient(call, model, case.x, [tap], [target])
        untouched = call(case.x)
    leaf = case.x.clone().requires_grad_(True)
    _, found = raw_outputs(model, [tap], lambda: call(leaf))
    (want,) = torch.autograd.grad(score(by_hand(case, found[tap])).sum(), leaf)
    assert torch.equal(output, untouched) and not output.requires_grad
    assert torch.equal(g, want) and g.abs().max() > 0
    assert hooks_of(model) == 0


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformers_features_stop_after_the_block(name: str) -> None:
    case = transformer(name)
    model, tap = case.model, case.taps[0]
    with torch.no_grad(), capture(model, case.taps) as features:
        _, found = raw_outputs(model, case.taps, lambda: model(case.x, timestep=T, **case.kwargs))
    ran = []
    handle = model.get_submodule(case.taps[1]).register_forward_hook(lambda *a: ran.append(1))
    h = encode_features(model, case.x, 401, tap=tap, **case.kwargs)
    handle.remove()
    assert not ran and h.is_contiguous() and h.shape == (2, 16, *case.grid)
    assert torch.equal(h, features[tap]) and torch.equal(h, by_hand(case, found[tap]))
    assert tap_channels(model, tap) == [16]
    assert hooks_of(model) == 0


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_checkpointed_blocks_that_run_twice_give_the_same_gradient(name: str) -> None:
    case = transformer(name)
    call = lambda model: lambda x: model(x, timestep=T, **case.kwargs).sample  # noqa: E731
    tap = "+".join(case.taps)
    target = functools.partial(score_gradient, tap)
    output, ((g, *_),) = forward_with_gradient(call(case.model), case.model, case.x, [tap], [target])
    model = copy.deepcopy(case.model)
    model.enable_gradient_checkpointing()
    for early in (True, False):  # whether the second run ends at the last tensor it has to save, or with the block
        with set_checkpoint_early_stop(early):
            again, ((h, *_),) = forward_with_gradient(call(model), model, case.x, [tap], [target])
        assert torch.equal(output, again) and torch.equal(g, h)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_nothing_behind_the_tap_has_a_graph(name: str) -> None:
    """Neither the image's tokens nor the text's, which leave the same block."""
    case = transformer(name)
    model, tap = case.model, case.taps[0]
    stack, _, index = case.taps[0].rpartition(".")
    behind = model.get_submodule("single_transformer_blocks.0" if name == "flux" else f"{stack}.{int(index) + 1}")
    seen = []

    def see(module, args, kwargs):
        given = [v for v in (*args, *kwargs.values()) if torch.is_tensor(v)]
        seen.append((torch.is_grad_enabled(), any(v.requires_grad for v in given)))

    handle = behind.register_forward_pre_hook(see, with_kwargs=True)
    call = lambda x: model(x, timestep=T, **case.kwargs).sample  # noqa: E731
    forward_with_gradient(call, model, case.x, [tap], [functools.partial(score_gradient, tap)])
    handle.remove()
    assert seen == [(False, False)]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformers_gradient_agrees_with_finite_differences(name: str) -> None:
    case = transformer(name)
    model = copy.deepcopy(case.model).double()
    kwargs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in case.kwargs.items()}
    x, tap = case.x.double(), "+".join(case.taps)
    call = lambda x: model(x, timestep=T, **kwargs).sample  # noqa: E731
    _, ((g, *_),) = forward_with_gradient(call, model, x, [tap], [functools.partial(score_gradient, tap)])
    size, close = (1e-3, 1e-3) if name == "flux" else (1e-6, 1e-5)  # its rotary embedding rounds to float32
    step = size * randn(*x.shape, seed=3).double()
    up, down = (score(encode_features(model, x + s * step, T, tap=tap, **kwargs)).sum() for s in (1, -1))
    torch.testing.assert_close((g * step).sum(), (up - down) / 2, rtol=close, atol=1e-12)


def test_several_taps_in_one_forward_are_the_full_graphs(tiny_pipe) -> None:
    """A joined tap beside a single one: both gradients, from a tuple's block and from maps of two sizes."""
    unet = tiny_pipe.unet
    x, t, text = inputs(unet)
    call = lambda leaf: unet(leaf, t, text).sample  # noqa: E731
    targets = [functools.partial(score_gradient, tap) for tap in (JOINED, "up_blocks.0")]
    output, ((a, *_), (b, *_)) = forward_with_gradient(call, unet, x, [JOINED, "up_blocks.0"], targets)
    leaf = x.clone().requires_grad_(True)
    want, found = raw_outputs(unet, ["down_blocks.0", "mid_block", "up_blocks.0"], lambda: call(leaf))
    low, mid = found["down_blocks.0"][0], found["mid_block"]
    b_, _, y, x_ = mid.shape
    averaged = low.reshape(b_, low.shape[1], y, low.shape[2] // y, x_, low.shape[3] // x_).mean((3, 5))
    joined = torch.cat([averaged, mid], 1)
    (want_a,) = torch.autograd.grad(score(joined).sum(), leaf, retain_graph=True)
    (want_b,) = torch.autograd.grad(score(found["up_blocks.0"]).sum(), leaf)
    assert torch.equal(output, want) and hooks_of(unet) == 0
    torch.testing.assert_close(a, want_a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b, want_b, rtol=1e-5, atol=1e-6)
    with torch.no_grad(), capture(unet, [JOINED]) as features:
        unet(x, t, text)
    assert torch.equal(encode_features(unet, x, t, text, tap=JOINED), features[JOINED])
    torch.testing.assert_close(features[JOINED], joined.detach())


def multi_head(pipe, kind="multiscale", **options):
    channels = pipe.unet.config.block_out_channels
    sizes = [channels[0], channels[-1]]
    return make_head(pipe, kind=kind, tap=JOINED, in_channels=sum(sizes), tap_channels=sizes, hidden=16, **options)


def test_a_head_on_several_taps_guides(tiny_pipe) -> None:
    """Scale 0 is bit-equal; a raw scale shifts eps by sigma times the gradient of the full graph."""
    head = multi_head(tiny_pipe).double()
    pipe = copy.copy(tiny_pipe)
    pipe.unet = copy.deepcopy(tiny_pipe.unet).double()
    x, t, text = inputs(pipe.unet, batch=1, dtype=torch.float64)
    x, text = torch.cat([x, x]), torch.cat([torch.zeros_like(text), text])

    def call():
        with torch.no_grad():
            return pipe.unet(x, t, encoder_hidden_states=text).sample

    guide = lambda s: MidBlockGuide(head, s, normalize=None, start=0, stop=1)  # noqa: E731
    plain = call()
    with apply_guidance(pipe, [guide(0.0)], parts=2):
        assert torch.equal(call(), plain)
    with apply_guidance(pipe, [guide(2.0)], parts=2) as handle:
        guided = call()
    leaf = x[1:].clone().requires_grad_(True)
    run = lambda: pipe.unet(leaf, t, encoder_hidden_states=text[1:]).sample  # noqa: E731
    _, found = raw_outputs(pipe.unet, ["down_blocks.0", "mid_block"], run)
    joined = join_maps([found["down_blocks.0"][0], found["mid_block"]])
    value = guide(1.0).score(joined, t.double().expand(1))
    (g,) = torch.autograd.grad(value.sum(), leaf)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    eps = lambda out: schedule.to_eps(out, x, t)  # noqa: E731
    torch.testing.assert_close(
        eps(guided) - eps(plain), (-2 * schedule.alpha_sigma(t)[1] * g).expand(2, -1, -1, -1), rtol=1e-6, atol=1e-10
    )
    torch.testing.assert_close(handle.records[0].scores["midblock:rating"], value.detach().float().cpu())


def test_a_head_on_several_taps_works_in_a_run_and_scores_it(tiny_pipe) -> None:
    guide = MidBlockGuide(multi_head(tiny_pipe), 1.0)
    run = lambda guides: sample_latents(tiny_pipe, ["a tree"], [0], num_steps=3, guides=guides)  # noqa: E731
    plain, guided = run([]), run([guide])
    assert guided.isfinite().all() and not torch.allclose(plain, guided)
    x, t, text = inputs(tiny_pipe.unet)
    scorer = StepScorer(guide)
    with apply_guidance(tiny_pipe, (), parts=1, observe=[scorer]), torch.no_grad():
        tiny_pipe.unet(x, t, encoder_hidden_states=text)
    h = encode_features(tiny_pipe.unet, x, t, text, tap=JOINED)
    torch.testing.assert_close(scorer.scores, guide.score(h, t.float().expand(2)))


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_a_head_on_several_blocks_guides_a_transformers_pipeline(name: str) -> None:
    """Unmodified pipelines of diffusers: scale 0 is bit-equal, and the sign of the scale decides about the score."""
    pipe = tiny.build_dit() if name == "dit" else tiny.build_sd3()
    tap = "transformer_blocks.0+transformer_blocks.1"
    channels, schedule = tap_channels(pipe.transformer, tap), NoiseSchedule.from_scheduler(pipe.scheduler)
    config = HeadConfig("multiscale", sum(channels), tap=tap, tap_channels=channels, hidden=16)
    with pytest.raises(UserError, match=r"trained on another model") if name == "sd3" else nullcontext():
        check_fits(build_head(config), pipe.transformer, schedule)
    torch.manual_seed(1)
    head = build_head(dataclasses.replace(config, prediction_type=schedule.prediction_type))
    given = {"class_labels": [207]} if name == "dit" else {"height": 16, "width": 16}
    if name == "sd3":
        given |= {state: randn(1, 5, tiny.WIDTH, seed=seed) for seed, state in enumerate(STATES)}
        given |= {state: randn(1, tiny.WIDTH, seed=seed) for seed, state in enumerate(POOLED)}

    def run(scale: float | None):
        guides = [] if scale is None else [MidBlockGuide(head, scale, start=0, stop=1)]
        with apply_guidance(pipe, guides) as handle:
            g = torch.Generator().manual_seed(0)
            out = pipe(**given, num_inference_steps=4, guidance_scale=3.0, generator=g, output_type="np").images
        return torch.as_tensor(out), [float(r.scores["midblock:rating"]) for r in handle.records]

    plain, none = run(None)
    assert torch.equal(run(0.0)[0], plain) and not none
    (up, better), (down, worse) = run(1.0), run(-1.0)
    assert len(better) == 4 and better[0] == worse[0] and better[-1] > worse[-1]
    assert not torch.equal(up, down) and hooks_of(pipe.transformer) == 0


def test_a_head_on_several_taps_is_cached_trained_and_saved(tiny_pipe, tmp_path) -> None:
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(6)]
    rows = {"image": images, "caption": ["a tree"] * 6, "rating": [1, 3, 5, 7, 9, 10]}
    dataset = Dataset.from_dict(rows)
    cache_features(tiny_pipe, dataset, tmp_path / "cache", tap=JOINED, batch_size=4, progress=False)
    cache = FeatureCache(tmp_path / "cache")
    sizes = tap_channels(tiny_pipe.unet, JOINED)
    assert cache.manifest["settings"]["tap_channels"] == sizes and cache.feature_shape[0] == sum(sizes)
    encoder = FeatureEncoder(tiny_pipe, tap=JOINED)
    x0, text = encoder.latents(images[2:3]), encoder.text(["a tree"])
    h, t = encoder.encode(x0, text, [(2, 0)])
    torch.testing.assert_close(cache.read([2])[0].float(), h.float(), rtol=2e-3, atol=2e-3)
    assert cache.read([2])[1] == t
    recipe = HeadRecipe(kind="multiscale", hidden=8)
    head, _ = prepare_head({"train": cache}, recipe, cache.manifest["settings"])
    assert head.config.tap_channels == sizes and [e.in_channels for e in head.embed] == sizes
    save_head(head, tmp_path / "head")
    loaded = load_head(tmp_path / "head")
    assert loaded.config == head.config
    check_fits(loaded, tiny_pipe.unet, NoiseSchedule.from_scheduler(tiny_pipe.scheduler))


def test_features_of_sdxl_are_cached(tmp_path) -> None:
    """Each row is the tap of the pipeline's own denoiser call, pooled text and sizes included."""
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    pipe = load_pipeline("random:sdxl-tiny")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (256, 256, 3), np.uint8)) for _ in range(3)]
    captions = ["a tree", "a house at dusk", ""]
    dataset = Dataset.from_dict({"image": images, "caption": captions, "rating": [1, 5, 9]})
    cache_features(pipe, dataset, tmp_path / "cache", draws=2, batch_size=4, progress=False)
    cache, encoder = FeatureCache(tmp_path / "cache"), FeatureEncoder(pipe)
    for row in (0, 3, 5):
        i = row // 2
        states, _, pooled, _ = pipe.encode_prompt(captions[i], do_classifier_free_guidance=False)
        t, eps = encoder.draw_noise([(i, row % 2)], encoder.latents(images[i : i + 1]).shape[1:])
        x_t = encoder.schedule.add_noise(encoder.latents(images[i : i + 1]), eps, t)
        side = float(encoder.image_size)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[side, side, 0, 0, side, side]])}
        with torch.no_grad(), capture(pipe.unet) as seen:
            pipe.unet(x_t, t, encoder_hidden_states=states, added_cond_kwargs=added)
        h, times = cache.read([row])
        assert times == t
        torch.testing.assert_close(h.float(), seen["mid_block"], rtol=2e-3, atol=2e-3)
    head, _ = prepare_head({"train": cache}, HeadRecipe(hidden=8), cache.manifest["settings"])
    check_fits(head, pipe.unet, NoiseSchedule.from_scheduler(pipe.scheduler))


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_runs_on_the_features_of_another_size(tiny_pipe, kind: str) -> None:
    """The same head, one tap or two, on latents of 8x8 and 16x8: scores, and gradients of the right shape."""
    head = multi_head(tiny_pipe, kind).eval()
    for size in ((8, 8), (16, 8)):
        x = randn(2, 4, *size)
        text = randn(2, 7, tiny_pipe.unet.config.cross_attention_dim)
        call = lambda leaf: tiny_pipe.unet(leaf, T, text).sample  # noqa: B023, E731

        def target(features):
            leaf = features[JOINED].requires_grad_(True)
            with torch.enable_grad():
                return {JOINED: torch.autograd.grad(head(leaf, 401).logsumexp(1).sum(), leaf)[0]}, None

        _, ((g, *_),) = forward_with_gradient(call, tiny_pipe.unet, x, [JOINED], [target])
        assert g.shape == x.shape and g.isfinite().all() and g.flatten(1).norm(dim=1).min() > 0


def test_a_map_of_constants_scores_the_same_at_every_size(tiny_pipe) -> None:
    """What pools by averages sees no difference between sizes where the picture has none."""
    h = randn(2, 80, 1, 1)
    for kind in ("linear", "attention", "multiscale"):
        head = multi_head(tiny_pipe, kind).eval()
        small, large = (head(h.expand(-1, -1, *size), 401) for size in ((4, 4), (12, 9)))
        torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)


def test_the_multiscale_head_by_its_formula() -> None:
    config = HeadConfig("multiscale", 5, tap="a+b", tap_channels=[2, 3], hidden=4, time_conditioned=False)
    head = build_head(config).double().eval()
    h = randn(2, 5, 3, 2).double()
    pooled = []
    for embed, part in zip(head.embed, (h[:, :2], h[:, 2:]), strict=True):
        projected = torch.einsum("bcyx,dc->bdyx", part, embed.weight[:, :, 0, 0]) + embed.bias[:, None, None]
        pooled.append(torch.nn.functional.gelu(projected).mean((2, 3)))
    torch.testing.assert_close(head(h, 3), head.mlp(torch.cat(pooled, 1)))


def test_metadata_decides_what_a_head_reads(tiny_pipe) -> None:
    schedule = NoiseSchedule.from_scheduler(tiny_pipe.scheduler)
    channels = tap_channels(tiny_pipe.unet, JOINED)
    wrong = [channels[0] + 1, channels[1] - 1]
    config = dataclasses.replace(multi_head(tiny_pipe).config, tap_channels=wrong)
    with pytest.raises(UserError, match=rf"Expected {wrong[0]} channels at 'down_blocks.0', but UNet2D"):
        check_fits(build_head(config), tiny_pipe.unet, schedule)
    config = dataclasses.replace(config, tap="transformer_blocks.0", tap_channels=[], in_channels=24)
    with pytest.raises(UserError, match=r"Expected 24 channels at 'transformer_blocks.0', but DiTTr"):
        check_fits(build_head(config), transformer("dit").model, schedule)
    with pytest.raises(UserError, match="Expected a tap that UNet2D"):
        check_fits(build_head(config), tiny_pipe.unet, schedule)
    fitting = build_head(dataclasses.replace(config, in_channels=16))
    check_fits(fitting, transformer("dit").model, schedule)
    flow = NoiseSchedule("flow", "flow_prediction", 1000)
    with pytest.raises(UserError, match="got flow_prediction"):
        check_fits(fitting, transformer("sd3").model, flow)
    for broken in ({"tap_channels": []}, {"tap_channels": [80]}, {"tap_channels": [16, 65]}):
        with pytest.raises(UserError, match="Expected the channels of each of 2 taps, 80 in all"):
            HeadConfig("conv", 80, **{"tap": JOINED, **broken})


def test_bad_taps_get_a_sentence(tiny_pipe) -> None:
    unet = tiny_pipe.unet
    x, t, text = inputs(unet)
    for tap in ("mid_block+mid_block", "mid_block+", "+"):
        with pytest.raises(UserError, match=r"joined by '[+]', each once"):
            split_taps(tap)
    with pytest.raises(UserError, match="Did you mean 'mid_block'"):
        encode_features(unet, x, t, text, tap="down_blocks.0+mid_blok")
    attention = next(n for n, _ in unet.named_modules() if n.endswith("transformer_blocks.0"))
    with pytest.raises(UserError, match="a token for each patch of the model's input, got"):
        encode_features(unet, x, t, text, tap=attention)
    with pytest.raises(UserError, match="Expected several taps to be blocks"):
        FeatureEncoder(tiny_pipe, tap=f"mid_block+{attention}")
    with pytest.raises(UserError, match="Expected a pipeline with a unet and a text encoder, got DiTPipeline"):
        FeatureEncoder(tiny.build_dit())
    assert patch_grid(torch.nn.Identity(), torch.zeros(7)) == (0, 0)
    assert hooks_of(unet) == 0 and torch.is_grad_enabled()
