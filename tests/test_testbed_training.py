"""The testbed's training: the linear encoder is exact, a killed run goes on to the same weights, the export loads."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from guidance.testbed import models
from guidance.testbed.models import build_scheduler
from guidance.testbed.patch_pca import PatchPCA, set_decoder, set_encoder
from guidance.testbed.render import render
from guidance.testbed.scenes import scenes
from guidance.training.loop import Optimizer, Stage, batch_indices, fit
from guidance.training.testbed import denoising_loss
from guidance.utils.images import to_float


@pytest.fixture(scope="module")
def images():
    return np.stack([render(s) for s in scenes("validation", 64)])


def test_latents_are_white_and_the_stock_encoder_computes_them(images):
    pca, x = PatchPCA.fit(images), to_float(images)
    z = pca.encode(x)
    flat = z.permute(1, 0, 2, 3).flatten(1).double()
    torch.testing.assert_close(torch.cov(flat), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-3)
    vae = models.build_vae()
    set_encoder(vae, pca)
    posterior = vae.encode(x).latent_dist
    assert (posterior.mean - z).abs().max() < 0.02
    assert posterior.std.max() < 0.02


def test_the_decoder_starts_near_the_enlarged_patch_means(images):
    torch.manual_seed(0)
    pca, x = PatchPCA.fit(images), to_float(images)
    vae = models.build_vae()
    set_decoder(vae, pca)
    with torch.no_grad():
        y = vae.decode(pca.encode(x)).sample
    wanted = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bilinear")
    assert (y - wanted).square().mean() < 0.25 * x.var()


def test_batches_are_epochs_of_permutations():
    seen = np.concatenate([batch_indices(10, 4, k, seed=3) for k in range(5)])
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])


@pytest.mark.parametrize(("ema", "optimizer"), [(0.0, "adamw"), (0.9, "adamw"), (0.9, "muon")])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, ema, optimizer):
    def run(folder, die_at=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 1))

        def loss(step, g):
            if step == die_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=g)
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        stage = Stage(steps=12, batch_size=8, lr=0.05, warmup=2, ema=ema, optimizer=optimizer)
        fit("toy", model, loss, stage, folder, checkpoint_every=0.0)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", die_at=7)
    assert torch.equal(run(tmp_path / "b"), whole)


_SHARED = """
import sys, torch
from pathlib import Path
from accelerate import PartialState
from torch import nn
from guidance.training.loop import batch_indices, fit, world
from guidance.training.recipes import Stage
PartialState(cpu=True)
torch.manual_seed(0)
model, x = nn.Linear(3, 1), torch.arange(60.0).reshape(20, 3) / 30
def loss(step, g):
    rank, size = world()
    part = x[batch_indices(20, 8, step, 0)[rank::size]]
    return (model(part) - part.sum(1, keepdim=True)).square().mean()
fit("toy", model, loss, Stage(steps=6, batch_size=8, lr=0.1, warmup=1, ema=0.5), Path(sys.argv[1]))
if world()[0] == 0:
    print("WEIGHTS", world()[1], *model.weight.flatten().tolist(), model.bias.item())
"""


def test_two_processes_train_the_weights_of_one(tmp_path):
    (tmp_path / "run.py").write_text(_SHARED)
    root = Path(__file__).resolve().parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    found = {}
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        command += [str(tmp_path / "run.py"), str(tmp_path / str(n))]
        out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=True).stdout
        _, size, *weights = next(line for line in out.splitlines() if line.startswith("WEIGHTS")).split()
        assert int(size) == n
        found[n] = [float(w) for w in weights]
    assert found[2] == pytest.approx(found[1], rel=1e-5)


def test_muon_moves_convolutions_by_orthogonal_matrices_and_the_rest_by_adamw():
    net = nn.Sequential(nn.Conv2d(16, 32, 3, bias=True))
    before = net[0].weight.detach().clone()
    optimizer = Optimizer(dict(net.named_parameters()), "muon", lr=0.1, weight_decay=0.0)
    net(torch.randn(4, 16, 5, 5)).square().sum().backward()
    optimizer.step(0.1)
    step = (net[0].weight.detach() - before).flatten(1)
    singular = torch.linalg.svdvals(step) / (0.1 * 0.2 * 144**0.5)  # the size that matches AdamW's RMS
    assert singular.min() > 0.5 and singular.max() < 1.3
    kept = {name: set(part.state[tensor]) for name, (part, tensor) in optimizer.slots.items()}
    assert kept == {"0.weight": {"momentum_buffer"}, "0.bias": {"step", "exp_avg", "exp_avg_sq"}}


def test_emphasis_counts_places_more_often_where_they_are_known():
    scheduler = build_scheduler()
    x0, text = torch.zeros(4, 4, 16, 16), torch.zeros(4, 1, 1)
    half = torch.zeros(4, 16, 16)
    half[:, :8] = 1.0

    def wrong_above(x, t, states, return_dict):
        v = scheduler.get_velocity(x0, x / (1 - scheduler.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1), t)
        return (v + half[:, None],)

    def loss(emphasis):
        return denoising_loss(wrong_above, scheduler, x0, text, torch.Generator().manual_seed(0), emphasis=emphasis)

    assert loss(None) == pytest.approx(0.5, abs=1e-4)  # half of the picture is off by one
    assert 0.5 < loss(half) < 2 / 3  # all of it at t with abar > 1/4, less in noise
    assert loss(1 - half) < 0.5


def test_the_whole_recipe_trains_exports_and_loads(tmp_path):
    from guidance.models.pipelines import load_pipeline
    from guidance.sampling import sample_images
    from guidance.testbed.judges import load_judges
    from train import testbed as script

    short = {"steps": 2, "batch_size": 4, "warmup": 1}
    words = [f"output={tmp_path}/weights", f"work={tmp_path}/work", "num_scenes=500", "unet_channels=[8,16,32]"]
    words += [
        f"{n}.{k}={v}" for n in ("vae", "clip", "judge_classifier", "judge_clip", "unet") for k, v in short.items()
    ]
    words += [f"{n}.minutes=0" for n in ("vae", "clip", "judge_classifier", "judge_clip", "unet")]
    assert script.main([*words, "compile=false"]) == 0
    pipe = load_pipeline(tmp_path / "weights")
    made = sample_images(pipe, ["a red house in the hills at noon"], [0], num_steps=2)
    assert made.shape == (1, 64, 64, 3)
    judges = load_judges(tmp_path / "weights")
    assert judges.features(made).shape == (1, 128)
    assert "not measured" in (tmp_path / "weights" / "README.md").read_text().lower()
    assert (tmp_path / "work" / "done-unet.json").exists()
    more = [w for w in words if "work=" not in w] + [f"work={tmp_path}/more", f"start_from={tmp_path}/weights"]
    first = load_file(tmp_path / "weights" / "unet" / "diffusion_pytorch_model.safetensors")
    assert script.main([*more, "compile=false", "unet.lr=1e-9", "unet.weight_decay=0", "vae.steps=3"]) == 0
    second = load_file(tmp_path / "weights" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(first[k].float(), second[k].float(), atol=1e-3) for k in first)
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "| unet, before | 2 |" in card and "| vae | 2 |" in card
    weights = sum(f.stat().st_size for f in (tmp_path / "weights").rglob("*"))
    assert weights < 24e6


def test_the_tokenizer_is_a_function_of_its_texts() -> None:
    """The same ids in every process (those of one are written down here); each word of the world is one token."""
    from guidance.testbed.models import build_tokenizer
    from guidance.testbed.scenes import scenes

    captions = [scene.caption for scene in scenes("train", 200)]
    tokenizer = build_tokenizer(captions)
    assert tokenizer("a red balloon over the sea").input_ids == [0, 274, 331, 386, 337, 301, 349, 1]
    assert all(len(tokenizer(text).input_ids) == len(text.replace(",", " ,").split()) + 2 for text in captions)
    assert "xyzzy 7" in tokenizer.decode(tokenizer("xyzzy 7").input_ids)
