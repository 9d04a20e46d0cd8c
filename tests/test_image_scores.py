"""Scores of single images, and of the images of one prompt, as functions and as torchmetrics metrics."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics import MetricCollection

from eval.features.extractors import Extractor
from eval.metrics.pixels import (
    Clipping,
    Diversity,
    HeadRating,
    Saturation,
    TruthScore,
    clipping,
    diversity,
    saturation,
)
from guidance.testbed.truth import truth_score
from guidance.utils.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 12, 10, 3), np.uint8)
EMBEDDINGS = RNG.normal(size=(20, 6)) + 1
PROMPT = np.repeat(np.arange(8), [4, 3, 3, 3, 3, 2, 1, 1])[RNG.permutation(20)]


def test_saturation_and_clipping_of_known_images() -> None:
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0] = [[(100, 50, 50), (255, 9, 9)], [(7, 7, 7), (0, 1, 2)]]
    assert saturation(image)[0] == pytest.approx((0.5 + 246 / 255 + 0 + 1) / 4)
    assert clipping(image)[0] == 0.5
    assert saturation(np.zeros_like(image))[0] == 0


def test_saturation_is_that_of_hsv() -> None:
    ours = saturation(IMAGES)
    pil = [np.asarray(Image.fromarray(x).convert("HSV"))[..., 1].mean() / 255 for x in IMAGES]
    assert ours == pytest.approx(pil, abs=1 / 255)


def test_diversity_ignores_length_and_needs_company() -> None:
    x = RNG.normal(size=(6, 4))
    found = diversity(x * RNG.uniform(1, 9, (6, 1)), np.array([0, 0, 0, 1, 1, 2]))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert found[0] == pytest.approx(1 - (unit[0] @ unit[1] + unit[0] @ unit[2]) / 2)
    assert found[3] == found[4] and np.isnan(found[5])


def _rating() -> Extractor:
    def features(images):
        return torch.tensor([[float(np.asarray(image).mean())] for image in images])

    return Extractor("mean grey", "grey", "1", "", features)


def _fill(build, rows: slice, batch: int):
    metric = build()
    for at in range(*rows.indices(len(IMAGES))[:2], batch):
        part = slice(at, min(at + batch, rows.indices(len(IMAGES))[1]))
        if build is Diversity:
            metric.update(EMBEDDINGS[part], PROMPT[part])
        elif build is _head_rating:
            metric.update([Image.fromarray(x) for x in IMAGES[part]])
        else:
            metric.update(torch.as_tensor(IMAGES[part]) if batch % 2 else IMAGES[part])
    return metric


def _head_rating() -> HeadRating:
    return HeadRating(_rating())


EXPECTED = {
    TruthScore: truth_score(IMAGES).mean(),
    Saturation: saturation(IMAGES).mean(),
    Clipping: clipping(IMAGES).mean(),
    _head_rating: IMAGES.mean(),
    Diversity: np.nanmean(diversity(EMBEDDINGS, PROMPT)),
}


@pytest.mark.parametrize("build", EXPECTED)
def test_batches_merging_and_processes_change_nothing(build) -> None:
    merged, synced, other = (_fill(build, *x) for x in ((slice(12), 5), (slice(12), 12), (slice(12, 20), 4)))
    merged.merge_state(other)
    states = iter([getattr(other, state) for state in other._reductions])

    def gather(x, group=None):
        more = next(states)
        return [x, torch.cat(more) if isinstance(more, list) else more]

    synced.dist_sync_fn, synced.distributed_available_fn = gather, lambda: True
    for metric in (merged, synced, _fill(build, slice(20), 20), _fill(build, slice(20), 1)):
        found = metric.compute()
        assert float(found["mean"]) == pytest.approx(EXPECTED[build], rel=1e-6)
        alone = np.bincount(PROMPT)[PROMPT] == 1 if build is Diversity else np.zeros(20)
        assert (found["pairs"], found["excluded"]) == (20 - alone.sum(), alone.sum())


def test_metrics_of_images_form_a_collection() -> None:
    metrics = MetricCollection([TruthScore(), Saturation(), Clipping()], compute_groups=False)
    metrics.update(IMAGES)
    found = metrics.compute()
    assert sum("mean" in name for name in found) == 3


def test_bad_images_and_prompts_get_one_sentence() -> None:
    for bad in (IMAGES[0], IMAGES / 255, IMAGES[..., :1]):
        for build in (TruthScore, Saturation, Clipping):
            with pytest.raises(UserError, match="uint8 images"):
                build().update(bad)
    with pytest.raises(UserError, match="prompt of each of 20"):
        Diversity().update(EMBEDDINGS, PROMPT[:3])
    with pytest.raises(UserError, match="prompt of each of 20"):
        diversity(EMBEDDINGS, PROMPT[:3])
    with pytest.raises(UserError, match="got none"):
        Diversity().compute()
