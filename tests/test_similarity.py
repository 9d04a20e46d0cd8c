"""Similarity of image pairs: closed forms, the reference code, pairs without a direction, merging."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from eval.metrics.clip import ClipScore, DirectionalSimilarity, directional_similarity, image_similarity
from guidance.utils.errors import UserError

I1, I2, T1, T2 = torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_functions_agree_with_torch_and_the_reference_code() -> None:
    """DirectionalSimilarity of the diffusers documentation (evaluation guide): cosine of normalised differences."""
    np.testing.assert_allclose(image_similarity(I1, I2), cosine_similarity(I1, I2), rtol=1e-12)
    i1, i2, t1, t2 = (normalize(x, dim=1) for x in (I1, I2, T1, T2))
    expected = cosine_similarity(i2 - i1, t2 - t1)
    np.testing.assert_allclose(directional_similarity(I1, I2, T1, T2), expected, rtol=1e-9)
    floats = directional_similarity(*(x.float() for x in (I1, I2, T1, T2)))
    np.testing.assert_allclose(floats, expected, atol=1e-6)


def test_direction_has_a_sign_and_no_length() -> None:
    forth = directional_similarity(I1, I2, T1, T2)
    np.testing.assert_allclose(directional_similarity(I2, I1, T1, T2), -forth)
    np.testing.assert_allclose(directional_similarity(5 * I1, I2, T1, 0.1 * T2), forth)
    np.testing.assert_allclose(directional_similarity(I1, I2, I1, I2), 1)


def test_pairs_without_a_direction_are_nan_and_counted() -> None:
    after, text_after = I2.clone(), T2.clone()
    after[:3] = 2 * I1[:3]
    after[3] = I1[3] + 1e-7  # an encoder's rounding is no direction
    text_after[5] = T1[5]
    values = directional_similarity(I1, after, T1, text_after)
    assert np.flatnonzero(np.isnan(values)).tolist() == [0, 1, 2, 3, 5]
    metric = DirectionalSimilarity()
    metric.update(I1[:2], after[:2], T1[:2], text_after[:2])
    assert np.isnan(float(metric.compute()["mean"])) and metric.compute()["excluded"] == 2
    metric.update(I1[2:], after[2:], T1[2:], text_after[2:])
    found = metric.compute()
    assert (found["pairs"], found["excluded"]) == (25, 5)
    assert float(found["mean"]) == pytest.approx(np.nanmean(values))


@pytest.mark.parametrize("build", [DirectionalSimilarity, ClipScore])
def test_batches_merging_and_processes_change_nothing(build) -> None:
    def filled(rows: slice, batch: int):
        metric = build()
        tables = (I1, I2, T1, T2) if build is DirectionalSimilarity else (I1, I2)
        for parts in zip(*(x[rows].split(batch) for x in tables), strict=True):
            metric.update(*parts)
        return metric

    whole = float(filled(slice(None), 30).compute()["mean"])
    merged, synced, other = filled(slice(12), 5), filled(slice(12), 12), filled(slice(12, None), 4)
    merged.merge_state(other)
    states = iter([getattr(other, state) for state in other._reductions])
    synced.dist_sync_fn = lambda x, group=None: [x, next(states)]
    synced.distributed_available_fn = lambda: True
    for metric in (merged, synced, filled(slice(None), 1)):
        assert float(metric.compute()["mean"]) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("bad", [I2[:5], I2[0], 0 * I2, I2 * np.nan, I2[:0]])
def test_embeddings_without_a_partner_or_a_direction_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(UserError):
        image_similarity(I1, bad)
    with pytest.raises(UserError):
        directional_similarity(I1, I2, T1, bad)
