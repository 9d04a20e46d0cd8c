"""The testbed's training: the linear encoder is exact, a killed run goes on to the same weights, the export loads."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from guidance.errors import UserError
from guidance.testbed import models
from guidance.testbed.patch_pca import PatchPCA, set_decoder, set_encoder
from guidance.testbed.render import render
from guidance.testbed.scenes import scenes
from guidance.testbed.training import Stage, batch_indices, fit, to_float


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


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, ema):
    def run(folder, die_at=None):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)

        def loss(step, g):
            if step == die_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=g)
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        stage = Stage(steps=12, batch_size=8, lr=0.05, warmup=2, ema=ema)
        fit("toy", model, loss, stage, folder, checkpoint_every=0.0)
        return model.weight.detach().clone()

    whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", die_at=7)
    assert torch.equal(run(tmp_path / "b"), whole)


def test_the_whole_recipe_trains_exports_and_loads(tmp_path):
    from guidance.pipelines import load_pipeline
    from guidance.sampling import sample_images
    from guidance.testbed.judges import load_judges
    from train import testbed as script

    short = {"steps": 2, "batch_size": 4, "warmup": 1}
    words = [
        f"output={tmp_path}/weights",
        f"work={tmp_path}/work",
        "num_scenes=500",
        "unet_channels=[8,16,32]",
    ]
    words += [
        f"{n}.{k}={v}"
        for n in ("vae", "clip", "judge_classifier", "judge_clip", "unet")
        for k, v in short.items()
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
    more = [w for w in words if "work=" not in w] + [
        f"work={tmp_path}/more",
        f"start_from={tmp_path}/weights",
    ]
    first = load_file(tmp_path / "weights" / "unet" / "diffusion_pytorch_model.safetensors")
    assert script.main([*more, "compile=false", "unet.lr=1e-9", "unet.weight_decay=0", "vae.steps=3"]) == 0
    second = load_file(tmp_path / "weights" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(first[k].float(), second[k].float(), atol=1e-3) for k in first)
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "| unet, before | 2 |" in card and "| vae | 2 |" in card
    weights = sum(f.stat().st_size for f in (tmp_path / "weights").rglob("*"))
    assert weights < 24e6


def test_export_before_training_is_refused(tmp_path):
    from guidance.testbed.export import export
    from guidance.testbed.recipe import Recipe

    recipe = Recipe(tmp_path, 500, {"unet": Stage()})
    with pytest.raises(UserError, match="data, vae, clip"):
        export(recipe, tmp_path / "out")
    with pytest.raises(UserError, match="training step"):
        recipe.run("vea")
    assert not (tmp_path / "out").exists()
