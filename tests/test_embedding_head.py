"""Heads that predict CLIP embeddings: losses and retrieval in closed form, the script for real, and their guide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from guidance.apply import apply_guidance
from guidance.data.cache import FeatureCache
from guidance.guides import ScoringGuide
from guidance.guides.embedding import EmbeddingGuide
from guidance.heads import build_head, load_head, save_head
from guidance.heads.config import HeadConfig
from guidance.heads.objectives import build_objective
from guidance.heads.tasks import CONTRASTIVE_TEMPERATURE, TASKS, compare_embeddings, embedding_loss
from guidance.sampling import sample_latents
from guidance.training.metrics import evaluate_head, useful_range
from guidance.training.recipes import HeadRecipe
from guidance.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def unit(n: int, d: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- mathematics


def test_loss_is_cosine_plus_info_nce() -> None:
    y, e = unit(6), unit(6, seed=1)
    cosines = e @ y.T
    nce = -(cosines / CONTRASTIVE_TEMPERATURE).log_softmax(1).diagonal().mean()
    for length in (1.0, 7.0):  # the length of a prediction means nothing
        torch.testing.assert_close(embedding_loss(length * e, y, 0.0), 1 - cosines.diagonal().mean())
        torch.testing.assert_close(embedding_loss(length * e, y, 0.5), 1 - cosines.diagonal().mean() + nce / 2)


def test_draws_of_one_image_all_count_as_right() -> None:
    y = unit(3)[[0, 0, 1, 2]]
    p = (y @ y.T / CONTRASTIVE_TEMPERATURE).softmax(1)
    expected = -torch.stack([(p[0, 0].log() + p[0, 1].log()) / 2, p[1, :2].log().mean(), p[2, 2].log(), p[3, 3].log()])
    torch.testing.assert_close(embedding_loss(y, y), expected.mean(), atol=1e-5, rtol=1e-5)


def test_loss_by_chunks_and_by_head() -> None:
    y, e = unit(10), unit(10, seed=1)
    parts = [embedding_loss(e[i : i + 4], y[i : i + 4]) * len(e[i : i + 4]) for i in (0, 4, 8)]
    torch.testing.assert_close(embedding_loss(e, y, chunk=4), sum(parts) / 10)
    torch.testing.assert_close(TASKS["embedding"].loss(e, y, HeadRecipe(batch_size=4)), sum(parts) / 10)
    x = unit(5, 4, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: embedding_loss(x, unit(5, 4).double()), x)


def test_targets_become_unit_vectors_or_a_sentence() -> None:
    y = TASKS["embedding"].encode(np.array([[3.0, 4.0], [0.0, 2.0]], np.float16), [])
    torch.testing.assert_close(y, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    with pytest.raises(UserError, match="row 1 and 1 bad rows"):
        TASKS["embedding"].encode(np.array([[1.0, 0.0], [np.nan, 1.0]]), [], "clip:x")


def test_retrieval_is_the_share_of_random_draws_that_find_the_image() -> None:
    y = unit(150)
    e = F.normalize(y + 1.2 * unit(150, seed=3), dim=1)
    found, candidates = compare_embeddings(3 * e, y)
    assert candidates == 100
    rng, hits = np.random.default_rng(0), np.zeros(150)
    for i in range(150):
        others = np.array([j for j in range(150) if j != i])
        for _ in range(200):
            drawn = rng.choice(others, 99, replace=False)
            hits[i] += bool((e[i] @ y[drawn].T < e[i] @ y[i]).all()) / 200
    np.testing.assert_allclose(found["retrieval"], hits, atol=0.15)
    assert abs(found["retrieval"].mean() - hits.mean()) < 0.02
    torch.testing.assert_close(found["cosine"], (e * y).sum(1))
    torch.testing.assert_close(found["cosine_other"], ((e @ y.T).sum(1) - (e * y).sum(1)) / 149)


def test_metrics_of_a_head_that_knows_and_ones_that_do_not() -> None:
    y, t = unit(120)[torch.arange(3000) % 120], torch.arange(3000) / 3
    config = HeadConfig("conv", 4, outputs=16, task="embedding", labels=[])
    knows = evaluate_head(y, y, t, config)
    assert knows["overall"]["retrieval"] == pytest.approx(1) and knows["overall"]["chance"] == 0.01
    assert useful_range(knows, 1000) == (0.0, 1.0) and len(knows["bins"]) == 10
    for blind in (y[torch.randperm(3000, generator=torch.Generator().manual_seed(0))], torch.ones(3000, 16)):
        found = evaluate_head(blind, y, t, config)["overall"]
        assert abs(found["retrieval"] - 0.01) < 0.02 and found["skill"] < 0.02
    half = torch.where((t < 600)[:, None], y, -y)
    assert useful_range(evaluate_head(half, y, t, config), 1000) == (0.4, 1.0)


# --- the script


@pytest.fixture(scope="module")
def options(tiny_folder, tmp_path_factory) -> list[str]:
    return [
        f"cache={tmp_path_factory.mktemp('caches') / 'clip'}",
        f"data.model={tiny_folder}",
        "data.train=160",
        "data.validation=60",
        "data.test=60",
        "data.device=cpu",
        "data.draws=1",
        "data.target_columns=[rating]",
        "data.timesteps=[0,20]",
        "data.shard_size=64",
        "compare=[]",
        "task=embedding",
        "target=clip:testbed",
        "kind=attention",
        "hidden=32",
        "batch_size=32",
        "epochs=12",
        "lr=0.005",
    ]


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory) -> Path:
    from train.head import main

    output = tmp_path_factory.mktemp("heads") / "clip"
    main([*options, f"output={output}"])
    return output


@pytest.fixture(scope="module")
def clip():
    from guidance.models.clip import load_clip

    return load_clip("testbed", device="cpu")


def test_the_script_trains_a_head_that_finds_the_image(trained, options, clip) -> None:
    head, metrics = load_head(trained), json.loads((trained / "metrics.json").read_text())
    overall = metrics["test"]["overall"]
    assert head.config.clip == "testbed" and head.config.clip_fingerprint == clip.fingerprint
    assert head.config.outputs == 128 and not head.config.labels and not head.config.temperature
    assert overall["chance"] == 1 / 60 and overall["retrieval"] > 3 * overall["chance"] and overall["skill"] > 0
    assert overall["cosine"] > overall["cosine_other"] + 0.05
    losses = [epoch["train_loss"] for epoch in metrics["training"]["history"]]
    assert losses[-1] < losses[0]
    assert "EmbeddingGuide" in (trained / "README.md").read_text()

    cache = FeatureCache(options[0].removeprefix("cache="), "test")
    y = cache.column("clip:testbed")
    assert y.dtype == np.float16 and y.shape == (60, 128)
    outputs = head(*cache.read(range(60)))
    target = TASKS["embedding"].encode(y, [])
    assert float(compare_embeddings(outputs, target)[0]["retrieval"].mean()) == pytest.approx(overall["retrieval"])
    shuffled, _ = compare_embeddings(outputs, target.roll(7, 0))  # the control
    assert float(shuffled["retrieval"].mean()) < 0.08
    assert float(shuffled["cosine"].mean()) < overall["cosine"] - 0.03


def test_the_cached_target_is_clips_view_of_the_clean_image(options, trained, clip) -> None:
    from guidance.data.sources import decode_image, load_examples

    images = [decode_image(cell) for cell in load_examples("testbed", "test", 60)["image"][:5]]
    cached = FeatureCache(options[0].removeprefix("cache="), "test").column("clip:testbed")[:5]
    np.testing.assert_allclose(cached, clip.embed_pil(images).numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target=rating"], "got task=embedding and target=rating"),
        (["task=regression"], "got task=regression and target=clip:testbed"),
    ],
)
def test_bad_input_gets_a_sentence(options, tmp_path, capsys, words, message) -> None:
    from train.head import main

    with pytest.raises(SystemExit):
        main([*options, *words, f"output={tmp_path / 'h'}"])
    assert message in capsys.readouterr().err and not (tmp_path / "h").exists()


# --- the guide


def test_the_guide_climbs_the_cosine(trained, tiny_pipe, clip) -> None:
    head, text = load_head(trained), "a red house in the hills at noon"
    guide = EmbeddingGuide(head, clip, texts=text)
    assert isinstance(guide, ScoringGuide) and guide.interval[0] == head.config.start
    h, t = (torch.randn(3, 64, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 8.0, 20.0]))
    expected = clip.logit_scale * F.cosine_similarity(head(h, t), clip.embed_texts([text]))
    torch.testing.assert_close(guide.score(h, t), expected)
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    both = EmbeddingGuide(head, clip, texts=[text], images=image).score(h, t)
    torch.testing.assert_close(both, (expected + EmbeddingGuide(head, clip, images=[image]).score(h, t)) / 2)
    h.requires_grad_()
    (gradient,) = torch.autograd.grad(guide.score(h, t).sum(), h)
    assert (guide.score(h + 0.01 * gradient / gradient.norm(), t) > guide.score(h, t)).all()


def test_each_sample_is_guided_to_its_own_prompt(trained, tiny_pipe, clip) -> None:
    head = load_head(trained)
    prompts, options = (["a red house in the hills at noon", "a blue boat on the sea at night"], {"num_steps": 2})
    guide = EmbeddingGuide(head, clip, 1.0, start=0.0, stop=1.0)
    both = sample_latents(tiny_pipe, prompts, [1, 2], guides=[guide], **options)
    for i in range(2):
        alone = EmbeddingGuide(head, clip, 1.0, texts=prompts[i], start=0.0, stop=1.0)
        one = sample_latents(tiny_pipe, [prompts[i]], [i + 1], guides=[alone], **options)
        torch.testing.assert_close(both[i : i + 1], one, atol=1e-3, rtol=1e-3)
    plain = sample_latents(tiny_pipe, prompts, [1, 2], **options)
    assert not torch.equal(both, plain)
    off = EmbeddingGuide(head, clip, 0.0, texts=prompts[0])
    assert torch.equal(sample_latents(tiny_pipe, prompts, [1, 2], guides=[off], **options), plain)


def test_what_does_not_fit_gets_a_sentence(trained, tiny_pipe, clip, tmp_path) -> None:
    head = load_head(trained)
    own, options = EmbeddingGuide(head, clip), {"num_steps": 1, "guide_prompts": ["one"]}
    with pytest.raises(UserError, match="got none; pass texts or images"), apply_guidance(tiny_pipe, [own]):
        pass
    with pytest.raises(UserError, match="of the 2 samples, got 1 prompts"):
        sample_latents(tiny_pipe, ["one", "two"], [1, 2], guides=[own.within(0.0, 1.0)], **options)
    with pytest.raises(UserError, match="use MidBlockGuide"):
        EmbeddingGuide(build_head(HeadConfig("conv", 64)), clip)
    with pytest.raises(UserError, match="EmbeddingGuide"):
        build_objective(head.config)
    save_head(head, tmp_path / "other")
    other = load_head(tmp_path / "other")
    other.config.clip_fingerprint = "0" * 12
    with pytest.raises(UserError, match="load that one"):
        EmbeddingGuide(other, clip)
