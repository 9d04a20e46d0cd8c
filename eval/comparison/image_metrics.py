"""Metrics with a value an image.  To add one, append its record to `IMAGE_METRICS`: the report reads it there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from eval.comparison.results import Better, ImageMetric
from eval.features.extractors import Extractor, Formula
from eval.features.store import Embedder
from eval.metrics.clip import clip_score, directional_similarity, image_similarity
from eval.metrics.pixels import clipping, diversity, saturation
from eval.stats.paired import prompt_numbers
from guidance.testbed.scenes import ATTRIBUTES, parse_caption
from guidance.testbed.truth import truth_score

if TYPE_CHECKING:
    from eval.comparison.bench import ImageBench

Rows = Mapping[str, Float[np.ndarray, "n d"]]  # arm -> features of its images
Values = Mapping[str, Float[np.ndarray, " n"]]  # arm -> value of each image, NaN where it has none


@dataclasses.dataclass(frozen=True)
class ImageMeasure:
    """Everything that `eval.images` and its report know of a metric with a value an image.

    Attributes:
        key: Name in tables: "clip_score".
        title: Name for people, formatted with its ``grader``: "CLIP score ({grader.label})".
        better: Which way is better; "" for neither.
        note: One sentence of definition, with range and unit.
        grader: Picks the network or formula; None where the metric does not apply.
        values: Computes the values from what the grader says of all images; None where there are none.
        tradeoff: Key of a set metric that the report plots against this one.
    """

    key: str
    title: str
    better: Better
    note: str
    grader: Callable[[ImageBench], Embedder | None]
    values: Callable[[ImageBench, Rows], Values | None]
    tradeoff: str = ""


class Measured(NamedTuple):
    """A metric and its values."""

    metric: ImageMetric
    values: Values


def measure_images(bench: ImageBench) -> list[Measured]:
    """Compute every metric of `IMAGE_METRICS` that applies to the images of a bench."""
    measured = []
    for measure in IMAGE_METRICS:
        grader = measure.grader(bench)
        if grader is None or (values := measure.values(bench, bench.read(grader))) is None:
            continue
        network = grader if isinstance(grader, Extractor) else None
        name, circular = (network.name, bench.guided_by(network)) if network else ("", ())
        title = measure.title.format(grader=grader)
        metric = ImageMetric(measure.key, title, measure.better, name, circular, measure.note)
        measured.append(Measured(metric, {arm: np.asarray(x, np.float64) for arm, x in values.items()}))
    return measured


def _column(number: int) -> Callable[[ImageBench, Rows], Values]:
    """Take a column of the features as the values."""
    return lambda _, features: {arm: x[:, number] for arm, x in features.items()}


def _agreement(attribute: str, bench: ImageBench, features: Rows) -> Values:
    column, classes = list(ATTRIBUTES).index(attribute), ATTRIBUTES[attribute]
    wanted = np.array([classes.index(parse_caption(row.prompt)[attribute]) for row in bench.arms.rows])
    return {arm: x[:, column] == wanted for arm, x in features.items()}


def _clip_score(bench: ImageBench, features: Rows) -> Values | None:
    assert bench.clip is not None
    prompts = [row.prompt for row in bench.arms.rows]
    has = np.array([bool(p) for p in prompts])
    if not has.any():
        return None
    texts = bench.clip.embed_texts([p for p in prompts if p])
    scores = {arm: np.full(len(has), np.nan) for arm in features}
    for arm, x in features.items():
        scores[arm][has] = clip_score(x[has], texts)
    return scores


def _similarity_to_baseline(bench: ImageBench, features: Rows) -> Values:
    base = bench.arms.baseline
    values = {arm: image_similarity(features[base], x) for arm, x in features.items()}
    return values | {base: np.ones(len(features[base]))}  # exactly 1: rounding would be its standard deviation


def _diversity(bench: ImageBench, features: Rows) -> Values | None:
    prompt = prompt_numbers([row.prompt_id for row in bench.arms.rows])
    if (np.bincount(prompt) == 1).all():
        return None
    return {arm: diversity(x, prompt) for arm, x in features.items()}


def _directional_similarity(bench: ImageBench, features: Rows) -> Values:
    source, before, after = bench.edit_embeddings
    return {arm: directional_similarity(source, x, before, after) for arm, x in features.items()}


def _similarity_to_source(bench: ImageBench, features: Rows) -> Values:
    return {arm: image_similarity(bench.edit_embeddings[0], x) for arm, x in features.items()}


PIXELS = Formula("pixels", 1, lambda image: [float(f(image[None])[0]) for f in (saturation, clipping)])

TRUTH = Formula("truth", 1, lambda image: [float(truth_score(image[None])[0])])

#: In the order of tables and plots.
IMAGE_METRICS = [
    ImageMeasure(
        "truth",
        "truth",
        "higher",
        "Colourfulness, sharpness, exposure and contrast of the pixels; 0 and sd 1 over training scenes.",
        grader=lambda bench: TRUTH if bench.testbed else None,
        values=_column(0),
    ),
    *(
        ImageMeasure(
            attribute,
            f"{attribute} agrees",
            "higher",
            f"Whether the judge classifier sees the {attribute} that the caption says, 0 or 1.",
            grader=lambda bench: bench.readings,
            values=functools.partial(_agreement, attribute),
        )
        for attribute in ATTRIBUTES
        if attribute != "terrain"
    ),
    ImageMeasure(
        "clip_score",
        "CLIP score ({grader.label})",
        "higher",
        "100 cos(image, prompt), -100..100, not clamped.",
        grader=lambda bench: bench.clip,
        values=_clip_score,
        tradeoff="cmmd",
    ),
    ImageMeasure(
        "image_similarity",
        "similarity to baseline ({grader.label})",
        "",
        "cos(image, the baseline's image), -1..1: how far guidance moved the picture.",
        grader=lambda bench: bench.clip,
        values=_similarity_to_baseline,
    ),
    ImageMeasure(
        "diversity",
        "diversity within a prompt ({grader.label})",
        "higher",
        "Mean 1 - cos to the images of the same prompt and other seeds: 0 means that all seeds look alike.",
        grader=lambda bench: bench.clip,
        values=_diversity,
    ),
    ImageMeasure(
        "directional_similarity",
        "directional similarity ({grader.label})",
        "higher",
        "cos(image - source, edited caption - caption), -1..1: whether the change is the one asked for.",
        grader=lambda bench: bench.clip if bench.edits else None,
        values=_directional_similarity,
    ),
    ImageMeasure(
        "source_similarity",
        "similarity to source ({grader.label})",
        "higher",
        "cos(image, source), -1..1: how much of the source stayed.",
        grader=lambda bench: bench.clip if bench.edits else None,
        values=_similarity_to_source,
    ),
    ImageMeasure(
        "rating",
        "{grader.name}",
        "higher",
        "What the head says of the finished image, read at t = 0; no judge, but what guidance pushes.",
        grader=lambda bench: bench.rating,
        values=_column(0),
    ),
    ImageMeasure(
        "saturation",
        "saturation",
        "",
        "Mean of (max - min) / max of the channels, 0..1; drifts when guidance pushes colours.",
        grader=lambda bench: PIXELS,
        values=_column(0),
    ),
    ImageMeasure(
        "clipping",
        "clipping",
        "",
        "Share of pixels in which a channel is 0 or 255, 0..1.",
        grader=lambda bench: PIXELS,
        values=_column(1),
    ),
]
