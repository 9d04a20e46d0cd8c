"""Generate images to train a discriminator against real ones: latents are sampled once and noised like the real ones.

A folder holds ``latents/`` (float32 shards ``SPLIT/shard-00000.npy``, and a manifest) and ``features/``, an
ordinary feature cache of them.  Row i of a split has the caption, the timestep and the noise of real row i, so
that only the clean image tells them apart.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from guidance.data.cache import FeatureCache, FeatureSource, first_difference, write_shards
from guidance.data.sources import SPLITS
from guidance.models.denoiser import fingerprint
from guidance.models.types import Pipeline
from guidance.sampling.loop import sample_latents
from guidance.training.caching import RECORDED, cache_split, load_model, load_split
from guidance.training.recipes import FeatureRecipe, GenerationRecipe
from guidance.utils.errors import UserError

#: The target of a discriminator: 1 for a real image, 0 for a generated one.
REAL = "real"

_SAMPLING = ("cfg_scale", "num_steps", "scheduler")  # of a recipe, options of sample_latents


class RealAndGenerated:
    """A feature source of n real rows, label 1, followed by the n matching generated rows, label 0.

    Args:
        real: Features of real images; rows beyond those generated are left out.
        generated: Features of generated images.

    Raises:
        UserError: If the timesteps of the rows differ: they would give the generated rows away.
    """

    def __init__(self, real: FeatureSource, generated: FeatureSource) -> None:
        self.real, self.generated, self.n = real, generated, len(generated)
        if len(real) < self.n or not np.array_equal(real.column("t")[: self.n], generated.column("t")):
            raise UserError(
                "Expected generated features at the timesteps of the real ones, got others; delete the folder of "
                "the generated images (generated.folder) to make them again."
            )

    def __len__(self) -> int:
        return 2 * self.n

    def column(self, name: str) -> NDArray[Any]:
        """Return the labels ("real") or the timesteps ("t") of all rows."""
        if name == "t":
            return np.tile(self.generated.column("t"), 2)
        assert name == REAL, name
        return np.repeat(np.array([1, 0]), self.n)

    def read(
        self, rows: Sequence[int] | NDArray[np.int64], epoch: int = 0
    ) -> tuple[Float[Tensor, "b c y x"], Float[Tensor, " b"]]:
        """Read features and timesteps of rows, in the order asked for."""
        rows = np.asarray(rows, np.int64)
        is_real = rows < self.n
        h, t = zip(
            self.real.read(rows[is_real], epoch), self.generated.read(rows[~is_real] - self.n, epoch), strict=True
        )
        order = np.argsort(np.argsort(~is_real, kind="stable"))
        return torch.cat(h)[order], torch.cat(t)[order]


def pair_with_generated(
    real: Mapping[str, FeatureCache],
    recipe: FeatureRecipe,
    generation: GenerationRecipe,
    folder: str | os.PathLike[str],
    *,
    accelerator: Any,
) -> dict[str, RealAndGenerated]:
    """Put generated rows beside the real rows of every split; generate and cache them first where absent.

    Every split is generated from its own captions.  A killed run is resumed.

    The settings in the cache of the real images take precedence over the recipe's.

    Raises:
        UserError: If the folder holds images of other settings, or more are asked for than there are real ones.
    """
    settings: dict[str, Any] = real["train"].manifest["settings"]
    draws, features = settings["draws"], Path(folder) / "features"
    counts = {split: _count(generation, split, len(real[split]) // draws) for split in SPLITS}
    described = _describe(settings, {name: getattr(generation, name) for name in (*_SAMPLING, "seed")})
    try:
        manifest = FeatureCache(features).manifest
        planned = {split: plan["rows"] // draws for split, plan in manifest["splits"].items()}
        finished = manifest["settings"] == described and planned == counts
    except UserError:
        finished = False
    accelerator.wait_for_everyone()  # all have looked before any writes
    if not finished:
        _generate(recipe, generation, Path(folder), counts, settings, described, accelerator)
    cache = FeatureCache(features)
    return {split: RealAndGenerated(real[split], cache.select(split)) for split in SPLITS}


def open_generated(real: FeatureCache, folder: str | os.PathLike[str], split: str) -> RealAndGenerated:
    """Put rows of images that were generated before beside the real rows of a split.

    Raises:
        UserError: If :func:`pair_with_generated` put none into the folder, or they go with other real images or other
            features; they may be sampled in any way.
    """
    try:
        cache = FeatureCache(Path(folder) / "features", split)
    except UserError as error:
        raise UserError(
            f"Expected generated images and their features in '{folder}', found none or a part; make them with "
            f"'accelerate launch train/head.py --config configs/head/testbed-discriminator.yaml "
            f"generated.folder={folder}'."
        ) from error
    found = cache.manifest["settings"]
    sampling = found["source"].get("generated")
    key = first_difference(found, _describe(real.manifest["settings"], sampling))
    if key is not None:
        raise UserError(
            f"Expected images generated for the real ones in '{real.folder}', but '{folder}' has another {key}; "
            "choose the cache that they were made with."
        )
    return RealAndGenerated(real, cache)


def _count(generation: GenerationRecipe, split: str, available: int) -> int:
    wanted: int | None = getattr(generation, split)
    if wanted is not None and wanted > available:
        raise UserError(
            f"Expected at most as many generated images as real ones, got generated.{split}={wanted} for "
            f"{available} real images; lower it, or cache more real ones."
        )
    return available if wanted is None else wanted


def _describe(settings: Mapping[str, Any], sampling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings in the manifest of the generated features."""
    shared = {name: value for name, value in settings.items() if name != "clip"}
    return shared | {"target_columns": [], "source": settings["source"] | {"generated": sampling}}


def _generate(
    recipe: FeatureRecipe,
    generation: GenerationRecipe,
    folder: Path,
    counts: Mapping[str, int],
    settings: Mapping[str, Any],
    described: Mapping[str, Any],
    accelerator: Any,
) -> None:
    """Sample the latents of every split and cache their features, by the recipe of the cache of the real rows."""
    known = {name: settings["source"][name] for name in RECORDED}
    known |= {name: settings[name] for name in ("tap", "noise", "caption", "timesteps", "draws", "seed")}
    known |= {"model": settings["base_model"], "target_columns": [], "rating_column": None}
    recipe = dataclasses.replace(recipe, **known)
    pipe = load_model(recipe)
    if fingerprint(pipe.unet) != described["base_fingerprint"]:
        raise UserError(
            f"Expected the weights that the real features were cached with ({described['base_fingerprint']}), got "
            f"others of '{recipe.model}' ({fingerprint(pipe.unet)}); delete the cache to make it again."
        )
    source = {name: described[name] for name in ("base_model", "base_fingerprint", "seed", "source")}
    for split, n in counts.items():
        examples = load_split(recipe, split).select(range(n))
        column = recipe.caption_column
        captions = [text or "" for text in examples[column]] if column else [""] * n
        options = {"split": split, "state": accelerator}
        generate_latents(pipe, captions, folder / "latents", generation, source=source, **options)
        accelerator.wait_for_everyone()
        options |= {"source": described["source"], "latents": load_latents(folder / "latents", split, n)}
        cache_split(pipe, recipe, examples, folder / "features", **options)
        accelerator.wait_for_everyone()


def generate_latents(
    pipe: Pipeline,
    captions: Sequence[str],
    folder: str | os.PathLike[str],
    recipe: GenerationRecipe,
    *,
    split: str,
    source: Mapping[str, Any] | None = None,
    state: Any = None,
    progress: bool = True,
) -> int:
    """Sample one image per caption and save its latents in shards; existing shards are kept.

    The seed of an image is a function of (seed, split, row) alone.

    ``source`` is for the manifest: everything else that decides the images.  ``state``, ``progress`` and the result
    are those of :func:`guidance.data.cache.write_shards`.
    """
    options = {name: getattr(recipe, name) for name in _SAMPLING}
    salt = zlib.crc32(f"generated {split}".encode())  # differs from that of the features' noise

    def compute(part: range, update: Callable[[int], Any]) -> dict[str, NDArray[Any]]:
        found = []
        for first in range(0, len(part), recipe.batch_size):
            rows = part[first : first + recipe.batch_size]
            states = [np.random.SeedSequence([recipe.seed, salt, i]).generate_state(1, np.uint64)[0] for i in rows]
            seeds = [int(state >> 1) for state in states]
            found.append(sample_latents(pipe, [captions[i] for i in rows], seeds, **options).float().cpu())
            if not found[-1].isfinite().all():
                raise UserError(
                    f"Expected finite latents, got others in rows {rows[0]} to {rows[-1]} of {split}; run the model in "
                    "float32 (data.dtype=float32), or check its weights."
                )
            update(len(rows))
        return {"latents": torch.cat(found).numpy()}

    size, n = recipe.shard_size, len(captions)
    words: dict[str, Any] = {"label": f"sample {split}", "unit": "image", "state": state, "progress": progress}
    return write_shards(folder, source or {}, split, n, size, compute, **words)


def load_latents(folder: str | os.PathLike[str], split: str, rows: int) -> Float[np.ndarray, "n c y x"]:
    """Load the latents of a split; UserError if some of them are missing."""
    latents = [np.load(file, allow_pickle=False) for file in sorted((Path(folder) / split).glob("shard-*.npy"))]
    if sum(map(len, latents)) != rows:
        raise UserError(
            f"Expected {rows} latents of {split} in '{folder}', got {sum(map(len, latents))}; run the same command "
            "again, or delete the folder."
        )
    return np.concatenate(latents)
