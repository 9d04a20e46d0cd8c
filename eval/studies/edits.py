"""Guides when sampling starts from an image: SDEdit and inpainting on the testbed's edit pairs."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter

from eval.stats.paired import mean_interval
from eval.stats.tables import with_interval
from eval.studies.common import StudyBench, StudyConfig, pixel_rms, share
from guidance.guides.embedding import EmbeddingGuide
from guidance.guides.midblock import MidBlockGuide
from guidance.sampling import sample_images
from guidance.sampling.start import FromImage, FromMask, Start, encode_images, encode_masks
from guidance.testbed.data import draw_edit_pairs
from guidance.testbed.scenes import ATTRIBUTES, parse_caption
from guidance.testbed.truth import truth_score
from guidance.utils.config import option
from guidance.utils.errors import UserError
from guidance.utils.images import labelled_grid
from guidance.utils.io import atomic_path

_SHOWN = 8
_CHANGED = 8  # grey levels from which a pixel counts as edited
_MARGIN = 9  # side of the square by which the mask is widened, pixels


@dataclasses.dataclass
class Config(StudyConfig):
    """Options of the study; each edit is described by the edited caption."""

    num_images: int = option(100, "edit pairs")
    strengths: list[float] = option([0.6, 0.8], "fractions of the steps that SDEdit takes")
    clip_head: str = option("runs/heads/testbed-clip", "CLIP-embedding head, towards the edited caption")
    clip_scale: float = option(0.5, "its scale")
    rating_head: str = option("runs/heads/testbed-aesthetic", "rating head")
    rating_scale: float = option(2.4, "its scale")
    cfg_scale: float = option(4.0, "weight of classifier-free guidance")


def run(bench: StudyBench, config: Config) -> list[dict[str, str]]:
    """Edit the images of edit pairs, unguided and guided, from the same noise, on one process.

    Returns:
        One row per start and arm: whether the judge classifier sees the new attribute and the old others, how far the
        pixels outside the edit moved, and the truth score.
    """
    if bench.state.num_processes > 1:
        raise UserError(f"Expected one process for edits, got {bench.state.num_processes}; omit torchrun.")
    pairs = draw_edit_pairs(config.split, config.num_images)
    source, target = (np.stack([np.asarray(image) for image in pairs[c]]) for c in ("image", "edited_image"))
    changed = np.abs(source.astype(int) - target).max(-1) > _CHANGED
    masks = maximum_filter(changed, (1, _MARGIN, _MARGIN))
    latents = encode_images(bench.pipe, source)
    starts: dict[str, Start] = {f"SDEdit {s:g}": FromImage(latents, s) for s in config.strengths}
    starts["mask"] = FromMask(latents, encode_masks(bench.pipe, [*(255 * masks.astype(np.uint8))]))
    guides: dict[str, list[Any]] = {
        "unguided": [],
        "CLIP head": [EmbeddingGuide(config.clip_head, guidance_scale=config.clip_scale)],
        "rating head": [MidBlockGuide(config.rating_head, config.rating_scale)],
    }
    shown = {"image": source, "mask": 255 * np.repeat(masks[..., None], 3, -1).astype(np.uint8)}
    shown["edited scene"] = target
    rows = [{"start": "the pair itself", "arm": ""} | _judge(bench, pairs, source, target, masks, target)]
    seeds = range(config.seed, config.seed + len(pairs))
    options: dict[str, Any] = {key: getattr(config, key) for key in ("cfg_scale", "num_steps", "batch_size")}
    for (name, start), (arm, active) in itertools.product(starts.items(), guides.items()):
        options |= {"start": start, "guides": active}
        images = sample_images(bench.pipe, pairs["edited_caption"], seeds, progress=True, **options)
        rows.append({"start": name, "arm": arm} | _judge(bench, pairs, source, target, masks, images))
        shown[f"{name}, {arm}"] = images
    _show(bench.folder / "edits.png", pairs["edited_caption"], shown)
    return rows


def _show(file: Path, captions: list[str], shown: dict[str, np.ndarray]) -> None:
    """Write a grid of the first pairs, one column per method."""
    cells = [[Image.fromarray(images[i]) for images in shown.values()] for i in range(min(_SHOWN, len(captions)))]
    with atomic_path(file) as temporary:
        labelled_grid(cells, captions[: len(cells)], list(shown), tile=96).save(temporary, format="PNG")


def _judge(
    bench: StudyBench, pairs: Any, source: np.ndarray, target: np.ndarray, masks: np.ndarray, images: np.ndarray
) -> dict[str, str]:
    before, after = ([parse_caption(text) for text in pairs[key]] for key in ("caption", "edited_caption"))
    changed = np.array(
        [[old[name] != new[name] for name in ATTRIBUTES] for old, new in zip(before, after, strict=True)]
    )
    agreement = bench.judges.agreement(images, pairs["edited_caption"])
    right = np.stack([agreement[name] for name in ATTRIBUTES], 1)
    outside = ~masks[..., None]
    moved = np.square(images.astype(np.float32) - source) * outside
    counted = np.maximum(3 * outside.sum((1, 2, 3)), 1)
    truth = truth_score(images)
    return {
        "edit seen, % [95%]": share((right | ~changed).all(1)),
        "all others kept, % [95%]": share((right | changed).all(1)),
        "moved outside the edit, grey levels": f"{np.sqrt(moved.sum((1, 2, 3)) / counted).mean():.1f}",
        "from the edited scene, grey levels": f"{pixel_rms(images, target).mean():.1f}",
        "truth [95%]": with_interval(float(truth.mean()), mean_interval(truth)),
    }
