"""Amortised guidance: the adapter, its teacher pairs, its training, the script for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_head
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from guidance.apply import apply_guidance
from guidance.apply.guided import rms, unit_rms
from guidance.data.cache import FeatureCache
from guidance.guides import AmortisedGuide, DirectGuide, MidBlockGuide
from guidance.heads import HeadConfig, build_head, save_head
from guidance.heads.adapter import (
    AdapterConfig,
    build_adapter,
    check_adapter_fits,
    direction_loss,
    load_adapter,
    save_adapter,
)
from guidance.models.denoiser import fingerprint
from guidance.models.pipelines import freeze
from guidance.sampling import sample_latents, using_scheduler
from guidance.schedule import NoiseSchedule
from guidance.training.adapters import (
    NoisedLatents,
    PairRecorder,
    SampledStates,
    cache_pairs,
    describe_teacher,
    fit_adapter,
    measure_adapter,
    read_teacher,
)
from guidance.training.recipes import PairOptions, Stage
from guidance.utils.errors import UserError
from train.amortise import AmortiseConfig

PROMPTS = {
    "train": ["a red balloon over the sea at dusk", "a white tower in the hills at noon"],
    "test": ["a blue car in the desert at dawn"],
}
STATES = SampledStates(PROMPTS, PairOptions(num_steps=[3, 4]))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe(tiny_pipe):
    """The tiny pipeline with an even smaller denoiser of 8x8 latents."""
    from guidance.testbed.models import build_unet

    torch.manual_seed(1)
    config = {**build_unet((8, 16, 16)).config, "sample_size": 8}
    parts = {**tiny_pipe.components, "unet": UNet2DConditionModel.from_config(config)}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    freeze(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def head(pipe):
    return make_head(pipe, hidden=16, start=0.0, stop=0.9, base_fingerprint=fingerprint(pipe.unet))


def small(seed: int = 0, **options):
    config = AdapterConfig(**{"width": 8, "depth": 1, "prediction_type": "v_prediction", **options})
    return build_adapter(config, seed)


def states(size: tuple[int, int] = (8, 8), n: int = 2, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    x_t, eps, x0 = torch.randn(3, n, 4, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x_t, eps, x0, torch.full((n,), 500.0)


# ---- the adapter ----------------------------------------------------------------------------------------------


def test_size_and_precision() -> None:
    usual = AmortiseConfig()
    shape = AdapterConfig(width=usual.width, depth=usual.depth, patch=usual.patch)
    assert 40_000 < sum(p.numel() for p in build_adapter(shape).parameters()) < 60_000
    for patch in (1, 2, 3):
        guide = AmortisedGuide(small(patch=patch))
        for size, dtype in (((8, 8), torch.float32), ((5, 13), torch.float16), ((16, 4), torch.bfloat16)):
            with torch.autocast("cpu", torch.bfloat16):
                d = guide.direction(*states(size, dtype=dtype))
            assert d.shape == (2, 4, *size) and d.dtype == torch.float32 and not d.requires_grad
            assert d.isfinite().all() and rms(d).min() > 0


def test_patches_keep_their_place() -> None:
    """Blocks on squares of pixels: a change moves the directions near it, its own square most; sides are continued."""
    (x_t, eps, x0, t), adapter = states((16, 16), n=1), small(patch=2)
    torch.nn.init.zeros_(adapter.blocks[0].everywhere.weight)
    changed = x_t.clone()
    changed[..., 4:6, 10:12] += 3
    moved = (adapter(changed, eps, x0, t) - adapter(x_t, eps, x0, t)).abs().sum(1)[0]
    assert moved[4:6, 10:12].mean() > 2 * moved[moved > 0].mean()
    reach = moved.nonzero()  # 3x3 convolutions: first, two of a block, last
    assert reach.amin(0).tolist() == [0, 2] and reach.amax(0).tolist() == [13, 15]
    whole, part = (adapter(*(v[..., :n, :] for v in (x_t, eps, x0)), t) for n in (16, 15))
    # the continued row is too far to reach these
    torch.testing.assert_close(part[..., :4, :], whole[..., :4, :])
    assert part.shape[2] == 15


def test_every_place_sees_the_whole_picture_through_the_mean() -> None:
    x_t, eps, x0, t = states((24, 24), n=1)
    changed = x_t.clone()
    changed[..., 0, 0] += 3
    adapter = small()
    far = lambda x: adapter(x, eps, x0, t)[..., -1, -1].detach()  # noqa: E731
    assert not torch.equal(far(changed), far(x_t))
    torch.nn.init.zeros_(adapter.blocks[0].everywhere.weight)
    assert torch.equal(far(changed), far(x_t))


def test_the_timestep_matters_once_trained() -> None:
    adapter, (x_t, eps, x0, t) = small(), states()
    assert torch.equal(adapter(x_t, eps, x0, t), adapter(x_t, eps, x0, 10.0))  # FiLM starts at zero
    torch.nn.init.normal_(adapter.film.layers[0].weight)
    assert not torch.allclose(adapter(x_t, eps, x0, t), adapter(x_t, eps, x0, 10.0))


def test_inputs_are_standardised_and_cut() -> None:
    adapter, (x_t, eps, x0, t) = small(), states(n=64)
    adapter.standardize(x_t, 3 * eps, x0 + 5)
    torch.testing.assert_close(adapter.input_std[4:8] / 3, torch.ones(4), rtol=0.1, atol=0)
    torch.testing.assert_close(adapter.input_mean[8:] / 5, torch.ones(4), rtol=0.1, atol=0)
    assert torch.equal(adapter(x_t, eps, x0 + 1e4, t), adapter(x_t, eps, x0 + 1e5, t))


def test_loss_leaves_out_samples_without_a_direction() -> None:
    wanted = unit_rms(states(n=4)[0])
    wanted[1] = 0
    predicted = -wanted + 0.0
    predicted[1] = torch.nan_to_num(states()[1][0])
    assert direction_loss(wanted.clone(), wanted) == pytest.approx(0, abs=1e-6)
    assert direction_loss(predicted, wanted, mse_weight=0.1) == pytest.approx(2 + 0.1 * 4, rel=1e-5)
    assert direction_loss(predicted, 0 * wanted) == 0


def test_save_and_load(tmp_path: Path) -> None:
    adapter = small(width=9, teacher=[{"head": "h", "predicts": "rating"}], metrics={"cosine": 0.5}, stop=0.75)
    adapter.standardize(*states()[:3])
    save_adapter(adapter, tmp_path / "a", "a card", train="seed: 0\n")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "adapter.safetensors", "config.json", "README.md", "train.yaml"
    }  # fmt: skip
    loaded = load_adapter(tmp_path / "a")
    assert loaded.config == adapter.config and not loaded.training
    assert torch.equal(loaded(*states()), adapter(*states())) and not loaded(*states()).requires_grad
    guide = AmortisedGuide(loaded, 2.0)
    assert guide.name == "amortised:rating" and guide.interval[1] == 0.75 and isinstance(guide, DirectGuide)
    file = tmp_path / "a" / "config.json"  # adapters of before there were patches
    config = json.loads(file.read_text())
    assert config.pop("patch") == 1
    file.write_text(json.dumps(config))
    assert torch.equal(load_adapter(tmp_path / "a")(*states()), adapter(*states()))
    save_adapter(small(1), tmp_path / "a")  # an adapter may be replaced
    assert load_adapter(tmp_path / "a").config.width == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": 16}, "latents of 16 channels, got 4"),
        ({"prediction_type": "epsilon"}, "prediction_type epsilon, got v_prediction"),
        ({"num_train_timesteps": 100}, "num_train_timesteps 100, got 1000"),
    ],
)
def test_a_model_it_does_not_fit_is_refused(wrong, message: str, pipe) -> None:
    with pytest.raises(UserError, match=message), apply_guidance(pipe, [AmortisedGuide(small(**wrong))]):
        pass
    assert "forward" not in vars(pipe.unet)


def test_other_weights_only_warn(pipe) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    with pytest.warns(UserWarning, match="trained on other weights"):
        check_adapter_fits(small(base_fingerprint="abc"), pipe.unet, schedule, "def")


# ---- teacher pairs --------------------------------------------------------------------------------------------


def record(pipe, teacher, scales) -> PairRecorder:
    """One run of two steps, the same prompt and noise for every scale."""
    recorder, n = PairRecorder(), len(scales)
    options = {"guides": teacher, "guide_factors": scales, "observe": [recorder]}
    sample_latents(pipe, PROMPTS["test"] * n, [7] * n, num_steps=2, **options)
    assert "forward" not in vars(pipe.unet)
    return recorder


def test_each_sample_follows_its_own_scale(pipe, head) -> None:
    scales = [1.0, 0.0, -0.5]
    recorder = record(pipe, [MidBlockGuide(head, stop=1.0)], scales)
    second = recorder.pairs[1].float()[:, :4]
    for scale, got in zip(scales, second, strict=True):
        run: list[torch.Tensor] = []
        options = {"num_steps": 2, "callback": lambda i, x, record, run=run: run.append(x)}
        sample_latents(pipe, PROMPTS["test"], [7], guides=[MidBlockGuide(head, scale, stop=1.0)], **options)
        torch.testing.assert_close(got, run[0][0], rtol=2e-3, atol=2e-3)  # pairs are kept in float16
    assert (second[0] - second[2]).abs().max() > 0.05  # the scales do differ


def test_directions_are_those_of_the_gradient(pipe, head) -> None:
    """Against plain autograd through the encoder half, without any of the guidance code."""
    guide = MidBlockGuide(head, 0.7, stop=1.0)
    recorder = record(pipe, [guide], [1.0])
    h, t = recorder.pairs[0].float(), recorder.times[0]
    text = pipe.encode_prompt(PROMPTS["test"], "cpu", 1, False)[0]
    x = h[:, :4].clone().requires_grad_(True)
    found = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda m, a, out: found.append(out))
    v = pipe.unet(x, t, encoder_hidden_states=text).sample
    handle.remove()
    (gradient,) = torch.autograd.grad(guide.score(found[0], t).sum(), x)
    assert F.cosine_similarity(h[:, 12:].flatten(), unit_rms(gradient).flatten(), dim=0) > 0.999
    torch.testing.assert_close(rms(h[:, 12:]).flatten(), torch.ones(1), rtol=2e-3, atol=0)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    for part, wanted in ((1, schedule.to_eps(v, x, t)), (2, schedule.to_x0(v, x, t))):
        torch.testing.assert_close(h[:, 4 * part : 4 * part + 4], wanted, rtol=1e-2, atol=1e-2)


def test_an_adapter_that_knows_the_direction_equals_its_teacher(pipe, head) -> None:
    """The recorded direction, given by an AmortisedGuide, shifts a denoiser call as the teacher itself does."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    text = pipe.encode_prompt(PROMPTS["train"], "cpu", 1, True, negative_prompt=["", ""])
    text = torch.cat([text[1], text[0]])

    def call(*guides, observe=()):
        options = {"parts": 2, "observe": observe}
        with torch.no_grad(), using_scheduler(pipe, None), apply_guidance(pipe, guides, **options) as handle:
            y = pipe.unet(torch.cat([x, x]), torch.tensor(600), encoder_hidden_states=text).sample
        return y, handle

    recorder = PairRecorder()
    call(MidBlockGuide(head), observe=[recorder])
    knowing = AmortisedGuide(small(stop=0.9), 1.5)
    knowing.direction = lambda x_t, eps, x0, t: recorder.pairs[0][:, 12:].float()
    base, (wanted, steps), (got, record) = call()[0], call(MidBlockGuide(head, 1.5)), call(knowing)
    torch.testing.assert_close(got - base, wanted - base, rtol=2e-3, atol=2e-3 * float((wanted - base).abs().max()))
    assert (wanted - base).std() > 0.01 * base.std()
    torch.testing.assert_close(record.records[0].shift_rms, steps.records[0].shift_rms, rtol=1e-3, atol=0)


def test_an_amortised_guide_takes_no_gradient_and_changes_sampling(pipe) -> None:
    guide = AmortisedGuide(small(), 1.0)
    options = {"num_steps": 2, "cfg_scale": 3.0}
    with torch.inference_mode():  # MidBlockGuide must refuse this; no gradient is needed here
        pushed = sample_latents(pipe, PROMPTS["test"], [1], guides=[guide], **options)
    assert not torch.equal(pushed, sample_latents(pipe, PROMPTS["test"], [1], **options))


def test_two_heads_add_up_and_a_negative_one_turns_around(pipe, head) -> None:
    one = record(pipe, [MidBlockGuide(head, 1.0)], [0.0]).pairs[0][:, 12:]
    back = record(pipe, [MidBlockGuide(head, -2.0)], [0.0]).pairs[0][:, 12:]
    both = record(pipe, [MidBlockGuide(head, 1.0), MidBlockGuide(head, 0.5)], [0.0]).pairs[0][:, 12:]
    torch.testing.assert_close(back, -one, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(both, one, rtol=1e-2, atol=1e-2)


def test_noised_latents_are_asked_inside_the_teachers_range(pipe, head) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    table = {"image": [Image.fromarray(p) for p in pixels], "caption": PROMPTS["train"] + PROMPTS["test"]}
    dataset = datasets.Dataset.from_dict(table)
    source = NoisedLatents({"train": dataset, "test": dataset}, PairOptions(dataset="mine"))
    recorder = source.record(pipe, [MidBlockGuide(head)], "train", 3, 2, np.random.default_rng(0))
    h, t = torch.cat(recorder.pairs).float(), torch.cat(recorder.times)
    assert h.shape == (6, 16, 8, 8) and t[0] > t[3] and t.min() >= 100  # the head stops at 0.9 of the steps
    torch.testing.assert_close(rms(h[:, 12:]).flatten(), torch.ones(6), rtol=2e-3, atol=0)
    again = source.record(pipe, [MidBlockGuide(head)], "train", 3, 2, np.random.default_rng(0))
    assert torch.equal(torch.cat(again.pairs), torch.cat(recorder.pairs))
    x_t, eps, x0, _ = h.chunk(4, 1)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), x_t, rtol=2e-2, atol=2e-2)


class FakeSource:
    """Pairs out of nothing: the direction is a fixed filter of the inputs."""

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at, self.calls = die_at, 0

    def settings(self):
        return {"source": "fake"}

    def record(self, pipe, teacher, split, n, calls, rng):
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        self.calls += 1
        recorder = PairRecorder()
        for _ in range(calls):
            x_t, eps, x0 = torch.from_numpy(rng.normal(size=(3, n, 4, 8, 8))).float()
            wanted = unit_rms(x0 - eps.flip(1) + x_t.mean((2, 3), keepdim=True) * 8)
            t = torch.full((n,), float(rng.integers(1000)))
            recorder.pairs.append(torch.cat([x_t, eps, x0, wanted], 1).half())
            recorder.times.append(t)
        return recorder


def fake_pairs(folder: Path, source=None, seed: int = 0, **options) -> FeatureCache:
    data = PairOptions(**{"train": 500, "test": 60, **options}, batch_size=16, calls_per_run=4)
    nothing = SimpleNamespace(scheduler=None)
    described = {"described": {"teacher": []}, "progress": False}
    return cache_pairs(nothing, [], source or FakeSource(), folder, data, seed=seed, **described)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_killed_recording_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fake_pairs(tmp_path / "killed", FakeSource(die_at=3))
    (tmp_path / "killed" / "train" / "shard-00003.tmp-1-ab").mkdir()  # what kill -9 leaves
    with pytest.raises(UserError, match="missing"):
        FeatureCache(tmp_path / "killed")
    rest = FakeSource()
    pairs = fake_pairs(tmp_path / "killed", rest)
    assert rest.calls == 9 - 3 and len(pairs.select("train")) == 512 and len(pairs.select("test")) == 64
    fake_pairs(tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.tmp-*"))
    with pytest.raises(UserError, match="another seed: 1 instead of 0"):
        fake_pairs(tmp_path / "killed", seed=1)


# ---- training -------------------------------------------------------------------------------------------------


class Shuffled:
    """Pairs whose directions belong to other pairs: the control."""

    def __init__(self, pairs: FeatureCache) -> None:
        self.pairs = pairs
        self.order = np.random.default_rng(0).permutation(len(pairs))

    def __len__(self) -> int:
        return len(self.pairs)

    def column(self, name):
        return self.pairs.column(name)

    def read(self, rows, epoch=0):
        h, t = self.pairs.read(rows)
        h[:, 12:] = self.pairs.read(self.order[np.asarray(rows)])[0][:, 12:]
        return h, t


@pytest.fixture(scope="module")
def pairs(pipe, tmp_path_factory) -> FeatureCache:
    """Pairs of a random head on features of a random denoiser.

    The head reads the first layer: the Jacobian of a whole random encoder is a function too wild for a small adapter
    and a few hundred pairs, unlike a trained one's.
    """
    torch.manual_seed(0)
    head = build_head(HeadConfig("conv", 8, hidden=16, tap="conv_in", prediction_type="v_prediction"))
    data = PairOptions(train=512, test=128, batch_size=64, calls_per_run=2)
    folder = tmp_path_factory.mktemp("pairs") / "random"
    return cache_pairs(pipe, [MidBlockGuide(head)], STATES, folder, data, described={}, progress=False)


def train(pairs, work: Path, steps: int = 200, **options):
    adapter = small(width=16, depth=2)
    stage = Stage(steps, 32, 5e-3, warmup=max(1, steps // 10))
    fit_adapter(adapter, pairs, stage, work, **options)
    return adapter


def test_an_adapter_learns_the_teacher_and_not_a_shuffled_one(pairs: FeatureCache, tmp_path: Path) -> None:
    metrics = measure_adapter(train(pairs.select("train"), tmp_path / "a"), pairs.select("test"))
    control = measure_adapter(train(Shuffled(pairs.select("train")), tmp_path / "b"), pairs.select("test"))
    # measured: 0.53; the best constant direction, all that a shuffled teacher can teach, has 0.39
    assert metrics["cosine"] > 0.45 and metrics["cosine"] > control["cosine"] + 0.07
    assert metrics["rows"] == 128 == sum(b["rows"] for b in metrics["bins"])
    mean = sum(b["rows"] * b["cosine"] for b in metrics["bins"] if b["rows"]) / 128
    assert mean == pytest.approx(metrics["cosine"], abs=1e-5)


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch) -> None:
    pairs = fake_pairs(tmp_path / "pairs", train=64, test=64).select("train")
    whole = train(pairs, tmp_path / "a", steps=6, checkpoint_every=0.0).state_dict()

    class Dies:
        calls = 0

        def __len__(self):
            return len(pairs)

        def column(self, name):
            return pairs.column(name)

        def read(self, rows, epoch=0):
            self.calls += 1
            if self.calls == 5:  # the first call is for the statistics
                raise KeyboardInterrupt
            return pairs.read(rows)

    with pytest.raises(KeyboardInterrupt):
        train(Dies(), tmp_path / "b", steps=6, checkpoint_every=0.0)
    resumed = train(pairs, tmp_path / "b", steps=6, checkpoint_every=0.0).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    fresh = small(width=16, depth=2).state_dict()
    assert any(not torch.equal(fresh[name], whole[name]) for name in whole)


# ---- the script -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(pipe, head, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("amortise")
    pipe.save_pretrained(folder / "model")
    save_head(head, folder / "head")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS["train"], *PROMPTS["test"]]))
    words = {"model": folder / "model", "pairs": folder / "pairs", "data.prompts": folder / "prompts.txt"}
    words |= {"teacher": f"[{{head: {folder / 'head'}}}]", "data.num_steps": "[3,3]", "data.batch_size": 4}
    words |= {"data.calls_per_run": 2, "data.train": 16, "data.test": 8, "steps": 4, "batch_size": 8}
    words |= {"width": 8, "depth": 1, "device": "cpu", "data.num_prompts": "null"}
    return [f"{key}={value}" for key, value in words.items()]


def run(*words: str) -> None:
    from train.amortise import main

    main(list(words))


def test_the_script_trains_an_adapter(options, pipe, tmp_path: Path, capsys) -> None:
    output = tmp_path / "a"
    run(*options, f"output={output}")
    assert "cosine" in capsys.readouterr().out and not Path(f"{output}.training").exists()
    adapter = load_adapter(output)
    config, schedule = adapter.config, NoiseSchedule.from_scheduler(pipe.scheduler)
    check_adapter_fits(adapter, pipe.unet, schedule, fingerprint(pipe.unet))
    assert config.base_fingerprint == fingerprint(pipe.unet) and (config.start, config.stop) == (0.0, 0.9)
    assert config.teacher[0]["predicts"] == "rating" and config.metrics["rows"] == 8
    assert "| low | high | pairs | cosine |" in (output / "README.md").read_text()
    before = (output / "adapter.safetensors").stat().st_mtime_ns
    run(*options, f"output={output}")
    assert (output / "adapter.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        run(*options, f"output={output}", "lr=0.5")
    assert "lr: 0.002 there, 0.5 here" in capsys.readouterr().err


def test_two_processes_record_the_bytes_of_one_and_train_its_weights(options, tmp_path: Path) -> None:
    """Real processes go on with what a killed one left; their shares of a batch of seven are four and three."""
    one, two, root = tmp_path / "one", tmp_path / "two", Path(__file__).resolve().parents[1]
    words = [*options, "data.train=24", "batch_size=7", "lr=0.01"]
    run(*words, f"output={one / 'a'}", f"pairs={one / 'pairs'}")
    kept, torn = ("pairs/train/shard-00002", "pairs/train/shard-00001.tmp-1-ab")
    shutil.copytree(one / kept, two / kept)
    shutil.copy(one / "pairs" / "manifest.json", two / "pairs")
    (two / torn).mkdir()
    before = (two / kept / "h.npy").stat().st_mtime_ns
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "train.amortise", *words, f"output={two / 'a'}", f"pairs={two / 'pairs'}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(launch, env=env, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("cosine") == 1  # one process speaks
    assert done.stderr.count("record train pairs:   0%") == 1 and (two / kept / "h.npy").stat().st_mtime_ns == before
    assert contents(one / "pairs") == contents(two / "pairs")
    wanted, got = load_adapter(one / "a").state_dict(), load_adapter(two / "a").state_dict()
    start = small(patch=2, base_model="x").state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)
    assert (wanted["first.weight"] - start["first.weight"]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=0"], "steps above 0, got 0"),
        (["teacher=[{heads: x}]"], "Did you mean 'head'?"),
        (["data.calls_per_run=4", "pairs={tmp}/pairs"], "4 guided steps or more"),
    ],
)
def test_bad_input_gets_a_sentence_and_leaves_no_adapter(options, tmp_path, capsys, words, message) -> None:
    words = [word.format(tmp=tmp_path) if "{tmp}" in word else word for word in words]
    with pytest.raises(SystemExit) as stop:
        run(*options, *words, f"output={tmp_path / 'a'}")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in error
    assert not (tmp_path / "a").exists() and not (tmp_path / "pairs").exists()


def test_a_teacher_describes_itself(head, tmp_path: Path) -> None:
    save_head(head, tmp_path / "h")
    terms = read_teacher([{"head": str(tmp_path / "h"), "guidance_scale": -1.0}])
    (description,) = describe_teacher(terms)
    assert description["guidance_scale"] == -1.0 and description["fingerprint"] == fingerprint(head)
    assert terms[0].guidance_scale == -1.0 and description["predicts"] == "rating"
