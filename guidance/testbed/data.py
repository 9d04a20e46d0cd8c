"""Draw the testbed as ``datasets`` objects: captioned and rated images, and edit pairs.

Everything is drawn in memory from seeds; nothing is stored or downloaded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from guidance.testbed.render import render
from guidance.testbed.scenes import Scene, combinations, edit_scene, sample_scene
from guidance.testbed.truth import rating, truth_score
from guidance.utils.processes import is_main

_CHUNK = 100

_BAR_FROM = 500

_ATTRIBUTES = ("time", "terrain", "object", "colour", "place", "second_object", "second_colour")

_HIDDEN = ("haze", "defocus", "exposure", "saturation", "tilt")

_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "rating": datasets.Value("int64"),
        "truth": datasets.Value("float64"),
        **{name: datasets.Value("string") for name in _ATTRIBUTES},
        **{name: datasets.Value("float64") for name in _HIDDEN},
        "scene_seed": datasets.Value("int64"),
    }
)

_EDIT_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "instruction": datasets.Value("string"),
        "edited_caption": datasets.Value("string"),
        "edited_image": datasets.Image(),
        "scene_seed": datasets.Value("int64"),
    }
)


def load_testbed(split: str, n: int, *, seed: int = 0, start: int = 0, workers: int = 1) -> datasets.Dataset:
    """Draw ``n`` scenes of a split as a dataset.

    Splits share neither a scene seed nor a combination of time, terrain, object and colour.  A row depends on
    (split, seed, its index) alone, so ``load_testbed(s, 100)`` is the beginning of ``load_testbed(s, 200)``.

    Args:
        split: "train", "validation" or "test".
        n: Number of scenes (about 130 a second and process).
        seed: Seed of the world.
        start: Index of the first scene.
        workers: Number of processes that draw; 1 draws in this process.

    Returns:
        Columns ``image`` (64x64 RGB), ``caption``, ``rating`` (one noisy vote, 1..10), ``truth``
        (standardised score of the pixels), the captioned attributes ``time, terrain, object, colour, place,
        second_object, second_colour`` ("" for none), the hidden factors ``haze, defocus, exposure,
        saturation, tilt`` (units in `scenes.HIDDEN`) and ``scene_seed``.

    Raises:
        UserError: If there is no such split.
    """
    combinations(split)  # refuses an unknown split
    assert n > 0 and seed >= 0 and start >= 0 and workers > 0
    jobs = [(split, i, min(_CHUNK, start + n - i), seed) for i in range(start, start + n, _CHUNK)]
    columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    silent = n <= _BAR_FROM or not is_main()
    with tqdm(total=n, desc=f"draw {split} scenes", unit="scene", disable=silent) as bar:
        for chunk in _map(jobs, workers):
            for name, values in chunk.items():
                columns[name] += values
            bar.update(len(chunk["caption"]))
    return datasets.Dataset.from_dict(columns, features=_FEATURES)


def draw_edit_pairs(split: str, n: int, seed: int = 0) -> datasets.Dataset:
    """Draw ``n`` edit pairs: one captioned attribute changed, layout and hidden factors kept.

    An edited scene stays in its split (scenes without such an edit in ten tries are skipped), so that no test
    combination is an edit of a training scene.

    Returns:
        Columns ``image, caption, instruction, edited_caption, edited_image`` and ``scene_seed``.
    """
    combinations(split)  # refuses an unknown split
    assert n > 0 and seed >= 0
    columns: dict[str, list[Any]] = {name: [] for name in _EDIT_FEATURES}
    pairs = _edits(split, seed)
    silent = n <= _BAR_FROM or not is_main()
    for _ in tqdm(range(n), desc=f"draw {split} edit pairs", unit="pair", disable=silent):
        scene, instruction, edited = next(pairs)
        columns["image"].append(_png(render(scene)))
        columns["caption"].append(scene.caption)
        columns["instruction"].append(instruction)
        columns["edited_caption"].append(edited.caption)
        columns["edited_image"].append(_png(render(edited)))
        columns["scene_seed"].append(scene.seed)
    return datasets.Dataset.from_dict(columns, features=_EDIT_FEATURES)


def _edits(split: str, seed: int) -> Iterator[tuple[Scene, str, Scene]]:
    index = 0
    while True:
        scene = sample_scene(split, index, seed)
        rng = np.random.default_rng([scene.seed, 13])
        for _ in range(10):
            instruction, edited = edit_scene(scene, rng)
            if edited.split == split:
                yield scene, instruction, edited
                break
        index += 1


def vote(scene: Scene, truth: float) -> int:
    """Return the vote on a scene: its noise depends on the scene's seed alone."""
    return int(rating(truth, np.random.default_rng([scene.seed, 11])))


def _rows(job: tuple[str, int, int, int]) -> dict[str, list[Any]]:
    split, start, count, seed = job
    found = [sample_scene(split, i, seed) for i in range(start, start + count)]
    images = np.stack([render(s) for s in found])
    truth = truth_score(images)
    return {
        "image": [_png(image) for image in images],
        "caption": [s.caption for s in found],
        "rating": [vote(s, t) for s, t in zip(found, truth, strict=True)],
        "truth": truth.tolist(),
        **{name: [getattr(s, name) for s in found] for name in (*_ATTRIBUTES, *_HIDDEN)},
        "scene_seed": [s.seed for s in found],
    }


def _map(jobs: list[tuple[str, int, int, int]], workers: int) -> Iterator[dict[str, list[Any]]]:
    if workers == 1 or len(jobs) == 1:
        yield from map(_rows, jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs))) as pool:
        yield from pool.map(_rows, jobs)


def _png(image: NDArray[np.uint8]) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
