"""Metrics with a value an image: what they are called, which way is better, and how they are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from eval.comparison.arms import Arms
from eval.comparison.results import ImageMetric
from eval.features.extractors import Extractor, TextExtractor
from eval.metrics.clip import clip_score, directional_similarity, image_similarity
from eval.metrics.pixels import clipping, diversity, saturation
from eval.stats.paired import prompt_numbers
from guidance.models.denoiser import fingerprint
from guidance.testbed.judges import Judges
from guidance.testbed.models import IMAGE_SIZE
from guidance.testbed.scenes import ATTRIBUTES, parse_caption
from guidance.testbed.truth import truth_score
from guidance.utils.errors import UserError

#: ``features(extractor)``: arm -> what the extractor makes of its images, (n, d).
FeatureReader = Callable[[Extractor], Mapping[str, Float[np.ndarray, "n d"]]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A metric and its values.

    Attributes:
        metric: What it is.
        values: Arm -> value of each image, NaN where it has none.
    """

    metric: ImageMetric
    values: dict[str, Float[np.ndarray, " n"]]


def _formula(name: str, version: int, function: Callable[[np.ndarray], Sequence[float]]) -> Extractor:
    """A function of single images, cached like a network's features: a new version when the formula changes."""

    def features(images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.tensor([function(np.asarray(image)) for image in images])

    return Extractor(name, name, f"{name}-{version}", "", features)


PIXELS = _formula("pixels", 1, lambda image: [float(f(image[None])[0]) for f in (saturation, clipping)])

TRUTH = _formula("truth", 1, lambda image: [float(truth_score(image[None])[0])])


def judge_readings(judges: Judges) -> Extractor:
    """What the testbed's judge classifier sees: the class of each attribute, in the order of ``ATTRIBUTES``."""

    def features(images: Sequence[Image.Image]) -> torch.Tensor:
        seen = judges.classify(np.stack([np.asarray(image) for image in images]))
        return torch.tensor(np.stack([seen[name] for name in ATTRIBUTES], 1), dtype=torch.float32)

    weights = fingerprint(judges.classifier)
    return Extractor("judge classifier", "judge-readings", weights, weights, features)


def is_testbed(arms: Arms) -> bool:
    """Tell whether all images and captions are of the testbed's world, so that its truth and judges apply."""
    try:
        for row in arms.rows:
            parse_caption(row.prompt)
    except UserError:
        return False
    with Image.open(arms.rows[0].file) as image:
        return image.size == (IMAGE_SIZE, IMAGE_SIZE) and not arms.converted


def pixel_metrics(features: FeatureReader) -> list[Measured]:
    """Saturation and clipping: guidance that is too strong shows there first."""
    values = features(PIXELS)
    notes = {
        "saturation": "Mean of (max - min) / max of the channels, 0..1; drifts when guidance pushes colours.",
        "clipping": "Share of pixels in which a channel is 0 or 255, 0..1.",
    }
    return [
        Measured(ImageMetric(key, key, "", note=note), {arm: _wide(x[:, i]) for arm, x in values.items()})
        for i, (key, note) in enumerate(notes.items())
    ]


def testbed_metrics(arms: Arms, features: FeatureReader, readings: Extractor) -> list[Measured]:
    """Truth score, and whether the judge sees the object, colour and time that the caption says."""
    note = "Colourfulness, sharpness, exposure and contrast of the pixels; 0 and sd 1 over training scenes."
    truth = ImageMetric("truth", "truth", "higher", note=note)
    found = [Measured(truth, {arm: _wide(x[:, 0]) for arm, x in features(TRUTH).items()})]
    seen, told = features(readings), [parse_caption(row.prompt) for row in arms.rows]
    for column, (name, classes) in enumerate(ATTRIBUTES.items()):
        if name == "terrain":
            continue
        wanted = np.array([classes.index(caption[name]) for caption in told])
        note = f"Whether the judge classifier sees the {name} that the caption says, 0 or 1."
        metric = ImageMetric(name, f"{name} agrees", "higher", readings.name, note=note)
        found.append(Measured(metric, {arm: _wide(x[:, column] == wanted) for arm, x in seen.items()}))
    return found


def clip_metrics(
    arms: Arms, features: FeatureReader, clip: TextExtractor, circular: Sequence[str]
) -> list[Measured]:
    """CLIP score, similarity to the baseline's image and, of several seeds, diversity within a prompt.

    Args:
        arms: Whose images.
        features: Reads embeddings.
        clip: The network that scores.
        circular: Arms that this CLIP had guided.
    """
    images = features(clip)
    measured, label = [], clip.label

    def add(key: str, title: str, better: Any, note: str, values: dict[str, np.ndarray]) -> None:
        metric = ImageMetric(key, f"{title} ({label})", better, clip.name, tuple(circular), note)
        measured.append(Measured(metric, values))

    prompts = [row.prompt for row in arms.rows]
    if any(prompts):
        has = np.array([bool(p) for p in prompts])
        texts = clip.embed_texts([p for p in prompts if p])
        scores = {arm: np.full(len(has), np.nan) for arm in images}
        for arm, x in images.items():
            scores[arm][has] = clip_score(x[has], texts)
        add("clip_score", "CLIP score", "higher", "100 cos(image, prompt), -100..100, not clamped.", scores)
    base = images[arms.baseline]
    same = {arm: _wide(image_similarity(base, x)) for arm, x in images.items()}
    same[arms.baseline] = np.ones(len(base))  # rounding would be its standard deviation
    note = "cos(image, the baseline's image), -1..1: how far guidance moved the picture."
    add("image_similarity", "similarity to baseline", "", note, same)
    prompt = prompt_numbers([row.prompt_id for row in arms.rows])
    if (np.bincount(prompt) > 1).any():
        spread = {arm: diversity(x, prompt) for arm, x in images.items()}
        note = "Mean 1 - cos to the images of the same prompt and other seeds: 0 means that all seeds look alike."
        add("diversity", "diversity within a prompt", "higher", note, spread)
    return measured


def rating_metric(features: FeatureReader, rating: Extractor, circular: Sequence[str]) -> Measured:
    """The score that a head gives the finished images."""
    note = "What the head says of the finished image, read at t = 0; no judge, but what guidance pushes."
    metric = ImageMetric("rating", rating.name, "higher", rating.name, tuple(circular), note)
    return Measured(metric, {arm: _wide(x[:, 0]) for arm, x in features(rating).items()})


def edit_metrics(
    arms: Arms, features: FeatureReader, clip: TextExtractor, edits: Mapping[str, Any]
) -> list[Measured]:
    """CLIP directional similarity of edited images to their sources.

    Args:
        arms: Whose images; their prompt ids are those of the edits.
        features: Reads embeddings.
        clip: The network that scores.
        edits: Prompt id -> :class:`guidance.data.edits.EditPair`.

    Raises:
        UserError: If an image has no edit.
    """
    ids = list(dict.fromkeys(row.prompt_id for row in arms.rows))
    if lacking := [i for i in ids if i not in edits]:
        raise UserError(
            f"Expected an edit for every prompt, got none for '{lacking[0]}' and {len(lacking) - 1} more; name "
            "the same edits that the images were made from."
        )
    pairs = [edits[i] for i in ids]
    order = prompt_numbers([row.prompt_id for row in arms.rows])
    sources = [pair.image for pair in pairs]
    if None in sources:
        raise UserError(
            "Expected edits with the images they start from, got texts only; name pairs with images."
        )
    source = clip.embed(sources)[order]
    before, after = (
        clip.embed_texts([getattr(pair, name) for pair in pairs])[order]
        for name in ("caption", "edited_caption")
    )
    images = features(clip)
    directions = {arm: directional_similarity(source, x, before, after) for arm, x in images.items()}
    kept = {arm: _wide(image_similarity(source, x)) for arm, x in images.items()}
    title, kept_title = f"directional similarity ({clip.label})", f"similarity to source ({clip.label})"
    note = "cos(image - source, edited caption - caption), -1..1: whether the change is the one asked for."
    more = "cos(image, source), -1..1: how much of the source stayed."
    return [
        Measured(ImageMetric("directional_similarity", title, "higher", clip.name, (), note), directions),
        Measured(
            ImageMetric("source_similarity", kept_title, "higher", clip.name, (), more),
            kept,
        ),
    ]


def _wide(values: Any) -> Float[np.ndarray, " n"]:
    return np.asarray(values, np.float64)
