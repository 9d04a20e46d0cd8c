"""Networks that grade: loading by name, agreement with the models themselves, batches, images, refusals."""

from __future__ import annotations

import dataclasses
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eval.features.extractors import ClassExtractor, TextExtractor, extractor_from_module, load_extractor
from guidance.models.clip import load_clip
from guidance.testbed.judges import load_judges
from guidance.testbed.render import render_scenes
from guidance.testbed.scenes import scenes
from guidance.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SCENES = list(scenes("test", 7))
ARRAYS = render_scenes(SCENES)
CAPTIONS = [scene.caption for scene in SCENES]
TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.fromarray(array) for array in ARRAYS]


@pytest.fixture(scope="module")
def odd_sizes(pictures) -> list[Image.Image]:
    return [image.resize((64 + 9 * i, 80 - 4 * i)) for i, image in enumerate(pictures)]


def save_dino(folder):
    """A tiny DINOv2 of another size than its processor's crop, as the published ones are."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(3)
    Dinov2Model(Dinov2Config(**TINY, image_size=56, patch_size=14)).save_pretrained(folder)
    crop = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=crop).save_pretrained(folder)
    return folder


def save_vit(folder, *, pooler: bool):
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(4)
    config = ViTConfig(**TINY, intermediate_size=64, image_size=32, patch_size=8)
    ViTModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def brightness() -> nn.Module:
    """Pixels averaged per channel: (b, 3)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def by_the_model(folder, images, take):
    """Features as transformers' own processor and model make them."""
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        return take(AutoModel.from_pretrained(folder)(**processor(images, return_tensors="pt"))).numpy()


def test_the_judge_is_the_judge(pictures) -> None:
    judge, judges = load_extractor("judge"), load_judges()
    np.testing.assert_allclose(judge.embed(pictures), judges.features(ARRAYS), atol=1e-5)
    assert judge.embed(list(ARRAYS)).dtype == np.float32 and judge.label == "judge"
    assert isinstance(judge, ClassExtractor)
    p = judge.probabilities(pictures)
    assert p.shape == (7, 8)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert (p.argmax(1) == judges.classify(ARRAYS)["object"]).all()


def test_the_judge_clip_is_the_judge_clip(pictures) -> None:
    grader, judges = load_extractor("judge-clip"), load_judges()
    assert isinstance(grader, TextExtractor)
    np.testing.assert_allclose(grader.embed(pictures), judges.clip_embed_images(ARRAYS), atol=1e-5)
    np.testing.assert_allclose(grader.embed_texts(CAPTIONS), judges.clip_embed_texts(CAPTIONS), atol=1e-5)
    assert grader.truncated(["a red boat", "boat " * 40]) == [False, True]


def test_the_guiding_clip_can_be_told_from_the_judge(pictures) -> None:
    """Records name the CLIP that guided by this fingerprint."""
    guiding, judge = load_extractor("testbed-clip"), load_extractor("judge-clip")
    assert guiding.weights_fingerprint == load_clip("testbed").fingerprint != judge.weights_fingerprint
    np.testing.assert_allclose(
        guiding.embed(pictures), load_clip("testbed").embed_pil(pictures).cpu().numpy(), atol=1e-6
    )


@pytest.mark.parametrize("name", ["judge", "judge-clip"])
def test_judges_know_their_size_only(name: str) -> None:
    with pytest.raises(UserError, match=r"64x64 .* 64x65"):
        load_extractor(name).embed([Image.new("RGB", (64, 65))])


def test_a_clip_folder(tmp_path, odd_sizes) -> None:
    from guidance.models.pipelines import TESTBED_FOLDER

    found = load_extractor(f"clip:{TESTBED_FOLDER / 'clip'}")
    assert isinstance(found, TextExtractor) and found.label == "clip"
    assert found.fingerprint == load_extractor("testbed-clip").fingerprint  # the weights count, not the name
    x = found.embed(odd_sizes)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(x, load_extractor("testbed-clip", batch_size=2).embed(odd_sizes), atol=1e-5)


def test_dino_is_pooled(tmp_path, odd_sizes) -> None:
    found = load_extractor(f"vision:{save_dino(tmp_path / 'dinov2-tiny')}")
    assert found.label == "dinov2-tiny" and not isinstance(found, TextExtractor | ClassExtractor)
    expected = by_the_model(tmp_path / "dinov2-tiny", odd_sizes, lambda output: output.pooler_output)
    np.testing.assert_allclose(found.embed(odd_sizes), expected, atol=1e-5)


@pytest.mark.parametrize("pooler", [True, False])
def test_a_pooler_without_weights_is_not_used(tmp_path, odd_sizes, pooler: bool) -> None:
    """transformers draws missing weights at random: features would differ between loads."""
    folder = save_vit(tmp_path, pooler=pooler)
    x = load_extractor(f"vision:{folder}").embed(odd_sizes)
    np.testing.assert_array_equal(x, load_extractor(f"vision:{folder}").embed(odd_sizes))
    take = (lambda output: output.pooler_output) if pooler else (lambda output: output.last_hidden_state[:, 0])
    np.testing.assert_allclose(x, by_the_model(folder, odd_sizes, take), atol=1e-5)


def test_a_convolutional_encoder_is_flattened(tmp_path, odd_sizes) -> None:
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

    torch.manual_seed(5)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert load_extractor(f"vision:{tmp_path}").embed(odd_sizes).shape == (7, 16)


def test_bad_vision_folders(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    from guidance.models.pipelines import TESTBED_FOLDER

    for folder in (TESTBED_FOLDER / "clip", tmp_path):
        with pytest.raises(UserError):
            load_extractor(f"vision:{folder}")
    weights = save_vit(tmp_path, pooler=True) / "model.safetensors"
    kept = {k: v for k, v in load_file(weights).items() if "layernorm" not in k}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"all weights .* missing, such as"):
        load_extractor(f"vision:{tmp_path}")
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_extractor(f"vision:{tmp_path}")


@pytest.mark.parametrize("name", ["judge", "judge-clip", "testbed-clip", "dino", "module"])
def test_results_do_not_depend_on_the_batch_size(tmp_path, pictures, name: str) -> None:
    torch.manual_seed(6)
    asked = f"vision:{save_dino(tmp_path)}" if name == "dino" else name
    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), brightness())
    found = extractor_from_module(net, name="x", size=32) if name == "module" else load_extractor(asked)
    whole = found.embed(pictures)
    for size in (1, 3):
        np.testing.assert_allclose(dataclasses.replace(found, batch_size=size).embed(pictures), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "white"),
    [
        ({}, 1),
        ({"value_range": (-1, 1)}, 1),
        ({"value_range": (0, 255)}, 255),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 0.5)}, (2, 1, 1)),
        ({"value_range": (0, 255), "mean": (55, 55, 55), "std": (2, 2, 2)}, 100),
    ],
)
def test_a_module_gets_the_pixels_it_asks_for(options, white) -> None:
    found = extractor_from_module(brightness(), name="mean", size=8, **options)
    x = found.embed([Image.new("RGB", (20, 30), "white"), Image.new("L", (8, 8), 255)])
    np.testing.assert_allclose(x, np.broadcast_to(white, (2, 3)), rtol=1e-5)


def test_a_module_is_frozen_and_told_by_all_it_depends_on() -> None:
    def build(**options):
        net = nn.Sequential(nn.Conv2d(3, 2, 4), nn.BatchNorm2d(2), nn.Dropout(), brightness())
        torch.manual_seed(7)
        net[0].reset_parameters()
        return net, extractor_from_module(net, **{"name": "a", "size": 16, **options})

    net, found = build()
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert build()[1].fingerprint == found.fingerprint
    changes = [build(size=17)[1], build(name="b")[1], build(mean=(0.1, 0, 0))[1]]
    net[1].running_mean += 1  # no parameter
    changes.append(extractor_from_module(net, name="a", size=16))
    changes.append(extractor_from_module(nn.Sequential(*net[:2], brightness()), name="a", size=16))
    assert len({found.fingerprint, *(other.fingerprint for other in changes)}) == 6
    assert changes[2].weights_fingerprint == found.weights_fingerprint


@pytest.mark.parametrize("name", ["juge", "judge:x", "clip", "clip:", "dino"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UserError):
        load_extractor(name)


def test_inception_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install torchvision torch-fidelity"):
        load_extractor("inception")


def test_inception_with_a_stand_in(monkeypatch, odd_sizes) -> None:
    """The published interface: uint8 (b, 3, h, w) of any size in, one tensor for each feature asked for out."""

    class StandIn(nn.Module):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path=None) -> None:
            super().__init__()
            assert features_list == ["2048", "logits_unbiased"]
            self.fc = nn.Linear(2048, 1008)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            features = x.float().mean((2, 3)).repeat(1, 683)[:, :2048]
            return features, features @ self.fc.weight.T

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = load_extractor("inception")
    assert isinstance(found, ClassExtractor) and found.name == "inception"
    x = found.embed(odd_sizes)
    np.testing.assert_allclose(x[:, :3], [np.asarray(i).mean((0, 1)) for i in odd_sizes], rtol=1e-5)
    np.testing.assert_allclose(x, dataclasses.replace(found, batch_size=1).embed(odd_sizes), rtol=1e-5)
    assert found.probabilities(odd_sizes).shape == (7, 1008)
