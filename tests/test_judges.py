"""The judges: loading, batching and agreement with random weights; accuracy with the shipped ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from guidance.testbed import models
from guidance.testbed.judges import WEIGHTS, Judges, load_judges
from guidance.testbed.render import render
from guidance.testbed.scenes import ATTRIBUTES, scenes

SHIPPED = all((WEIGHTS / n / "model.safetensors").exists() for n in ("judge_classifier", "judge_clip"))
needs_weights = pytest.mark.skipif(not SHIPPED, reason=f"no trained judges in {WEIGHTS.name}/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained judges in the layout of the shipped ones, in fp16 as those are."""
    root = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    tokenizer = models.build_tokenizer([s.caption for s in scenes("train", 200)])
    tokenizer.save_pretrained(root / "tokenizer")
    clip = models.build_clip(len(tokenizer), tokenizer.eos_token_id, judge=True)
    clip.half().save_pretrained(root / "judge_clip")
    (root / "judge_classifier").mkdir()
    classifier = models.JudgeClassifier(16).half()
    save_file(classifier.state_dict(), root / "judge_classifier" / "model.safetensors")
    (root / "judge_classifier" / "config.json").write_text(json.dumps({"width": 16}))
    return root


@pytest.fixture(scope="module")
def judges(folder: Path) -> Judges:
    return load_judges(folder)


@pytest.fixture(scope="module")
def some() -> tuple[np.ndarray, list[str]]:
    found = list(scenes("test", 21))
    return np.stack([render(s) for s in found]), [s.caption for s in found]


def test_shapes_types_and_ranges(judges: Judges, some) -> None:
    images, captions = some
    seen = judges.classify(images)
    assert list(seen) == list(ATTRIBUTES)
    for name, classes in ATTRIBUTES.items():
        assert seen[name].shape == (21,)
        assert set(seen[name].tolist()) <= set(range(len(classes)))
    assert judges.features(images).shape == (21, 128)
    x, y = judges.clip_embed_images(images), judges.clip_embed_texts(captions)
    assert x.shape == y.shape == (21, 96)
    assert x.dtype == y.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1, atol=1e-5)


def test_results_do_not_depend_on_the_batch_size(folder: Path, judges: Judges, some) -> None:
    images, captions = some
    small = load_judges(folder, batch_size=4)
    for one, two in (
        (judges.features(images), small.features(images)),
        (judges.clip_embed_images(images), small.clip_embed_images(images)),
        (judges.clip_embed_texts(captions), small.clip_embed_texts(captions)),
    ):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
    whole, parts = judges.classify(images), small.classify(images)
    assert all((whole[name] == parts[name]).all() for name in ATTRIBUTES)


def test_embeddings_are_those_of_the_clip_as_trained(judges: Judges, some) -> None:
    images, captions = some
    ids = judges.tokenizer(captions, padding="max_length", max_length=models.MAX_TOKENS, return_tensors="pt")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        out = judges.clip(input_ids=ids.input_ids, pixel_values=pixels)
    np.testing.assert_allclose(judges.clip_embed_images(images), out.image_embeds, atol=1e-5)
    np.testing.assert_allclose(judges.clip_embed_texts(captions), out.text_embeds, atol=1e-5)
    assert np.ptp(judges.clip_embed_texts(captions), axis=0).max() > 1e-3  # captions are told apart


def test_agreement_is_that_of_the_classes_named(judges: Judges, some) -> None:
    images, _ = some
    seen = judges.classify(images)
    name = {a: [ATTRIBUTES[a][i] for i in seen[a]] for a in ATTRIBUTES}
    other = [ATTRIBUTES["time"][(i + 1) % 4] for i in seen["time"]]

    def caption(i: int) -> str:
        obj, terrain = name["object"][i], name["terrain"][i]
        flying, wet = obj in ("balloon", "kite"), terrain == "sea"
        where = "over" if flying else "in" if not wet else "on" if obj == "boat" else "by"
        return f"a {name['colour'][i]} {obj} {where} the {terrain} at {other[i]}"

    agreed = judges.agreement(images, [caption(i) for i in range(len(images))])
    assert all(agreed[a].all() for a in ("object", "colour", "terrain"))
    assert not agreed["time"].any()


@needs_weights
def test_the_shipped_judges_know_the_world() -> None:
    found = list(scenes("test", 500, start=5000))
    images, captions = np.stack([render(s) for s in found]), [s.caption for s in found]
    judges = load_judges()
    for name, right in judges.agreement(images, captions).items():
        assert right.mean() >= 0.98, name  # 99% over many scenes; 500 leave some play
    own = (judges.clip_embed_images(images) * judges.clip_embed_texts(captions)).sum(1)
    wrong = (judges.clip_embed_images(images) * judges.clip_embed_texts(captions[1:] + captions[:1])).sum(1)
    assert (own > wrong).mean() > 0.9
