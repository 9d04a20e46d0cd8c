"""Generate images to train a discriminator against real ones: latents are sampled once and noised like the real ones.

A folder holds ``latents/`` (float32 shards ``SPLIT/shard-00000.npy``, and a manifest) and ``features/``, an
ordinary feature cache of them.  Row i of a split has the caption, the timestep and the noise of real row i, so
that only the clean image tells them apart.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from guidance.data.cache import FeatureCache, FeatureSource, first_difference, shard_name
from guidance.data.features import write_manifest
from guidance.data.sources import SPLITS
from guidance.models.denoiser import fingerprint
from guidance.models.types import Pipeline
from guidance.sampling.loop import sample_latents
from guidance.training.caching import RECORDED, cache_split, load_model, load_split
from guidance.training.recipes import FeatureRecipe, GenerationRecipe
from guidance.utils.errors import UserError
from guidance.utils.io import atomic_path

#: The target of a discriminator: 1 for a real image, 0 for a generated one.
REAL = "real"


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
        order = np.argsort(np.concatenate([np.flatnonzero(is_real), np.flatnonzero(~is_real)]))
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

    Args:
        real: Caches of the real images, by split.
        recipe: Source of the real examples; the settings in their cache take precedence.
        generation: Number and sampling of the generated images.
        folder: Folder of the generated images.
        accelerator: Its processes share the work.

    Raises:
        UserError: If the folder holds images of other settings, or more are asked for than there are real ones.
    """
    settings: dict[str, Any] = real["train"].manifest["settings"]
    draws = settings["draws"]
    counts = {split: _count(generation, split, len(real[split]) // draws) for split in SPLITS}
    features = Path(folder) / "features"
    sampling = {name: getattr(generation, name) for name in ("cfg_scale", "num_steps", "scheduler", "seed")}
    described = _describe(settings, sampling)
    finished = _is_finished(features, described, {s: n * draws for s, n in counts.items()})
    accelerator.wait_for_everyone()  # all have looked before any writes
    if not finished:
        _generate(_recorded(recipe, settings), generation, Path(folder), counts, described, accelerator)
    cache = FeatureCache(features)
    return {split: RealAndGenerated(real[split], cache.select(split)) for split in SPLITS}


def open_generated(real: FeatureCache, folder: str | os.PathLike[str], split: str) -> RealAndGenerated:
    """Put rows of images that were generated before beside the real rows of a split.

    Args:
        real: Cache of the real images of the split.
        folder: Where :func:`pair_with_generated` put the generated ones, however they were sampled.
        split: Name of the split.

    Raises:
        UserError: If there are none, or they go with other real images or other features.
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


def _is_finished(folder: Path, described: Mapping[str, Any], rows: Mapping[str, int]) -> bool:
    try:
        manifest = FeatureCache(folder).manifest
    except UserError:
        return False
    planned = {split: plan["rows"] for split, plan in manifest["splits"].items()}
    return manifest["settings"] == described and planned == rows


def _recorded(recipe: FeatureRecipe, settings: Mapping[str, Any]) -> FeatureRecipe:
    """Return the recipe that the cache of the real rows was made with."""
    known = {name: settings["source"][name] for name in RECORDED}
    known |= {name: settings[name] for name in ("tap", "noise", "caption", "timesteps", "draws", "seed")}
    known |= {"model": settings["base_model"], "target_columns": [], "rating_column": None}
    return dataclasses.replace(recipe, **known)


def _generate(
    recipe: FeatureRecipe,
    generation: GenerationRecipe,
    folder: Path,
    counts: Mapping[str, int],
    described: Mapping[str, Any],
    accelerator: Any,
) -> None:
    """Sample the latents of every split and cache their features."""
    pipe = load_model(recipe)
    if fingerprint(pipe.unet) != described["base_fingerprint"]:
        raise UserError(
            f"Expected the weights that the real features were cached with ({described['base_fingerprint']}), got "
            f"others of '{recipe.model}' ({fingerprint(pipe.unet)}); delete the cache to make it again."
        )
    source = {name: described[name] for name in ("base_model", "base_fingerprint", "seed", "source")}
    share: dict[str, Any] = {"process_index": accelerator.process_index}
    share |= {"num_processes": accelerator.num_processes, "progress": accelerator.is_main_process}
    for split, n in counts.items():
        examples = load_split(recipe, split).select(range(n))
        column = recipe.caption_column
        captions = [text or "" for text in examples[column]] if column else [""] * n
        generate_latents(pipe, captions, folder / "latents", generation, split=split, source=source, **share)
        accelerator.wait_for_everyone()
        latents = load_latents(folder / "latents", split, n)
        options = share | {"split": split, "source": described["source"], "latents": latents}
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
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = True,
) -> int:
    """Sample one image per caption and save its latents in shards; existing shards are kept.

    The seed of an image is a function of (seed, split, row) alone.

    Args:
        pipe: The diffusion model.
        captions: Prompts.
        folder: Folder of the latents.
        recipe: Sampling, batch size and shard size.
        split: Part of the folder, and of the seeds.
        source: Everything else that decides the images, for the manifest.
        process_index, num_processes: This process takes every ``num_processes``-th shard.
        progress: Show a progress bar.

    Returns:
        Images this process sampled.
    """
    size, n = recipe.shard_size, len(captions)
    write_manifest(Path(folder), dict(source or {}), split, n, size, write=process_index == 0)
    paths = [(Path(folder) / f"{shard_name(split, k)}.npy", i) for k, i in enumerate(range(0, n, size))]
    todo = [(p, i) for p, i in paths[process_index::num_processes] if not _has(p, min(size, n - i))]
    total = sum(min(size, n - i) for _, i in todo)
    with tqdm(total=total, desc=f"sample {split}", unit="image", disable=not progress or not todo) as bar:
        for path, first in todo:
            parts = []
            last = min(first + size, n)
            for i in range(first, last, recipe.batch_size):
                rows = range(i, min(i + recipe.batch_size, last))
                parts.append(_sample(pipe, captions, rows, recipe, split))
                bar.update(len(rows))
            with atomic_path(path) as temporary:
                np.save(temporary, torch.cat(parts).numpy())
    return total


def _sample(
    pipe: Pipeline, captions: Sequence[str], rows: range, recipe: GenerationRecipe, split: str
) -> Float[Tensor, "b c y x"]:
    salt = zlib.crc32(f"generated {split}".encode())  # differs from that of the features' noise
    states = [np.random.SeedSequence([recipe.seed, salt, i]).generate_state(1, np.uint64)[0] for i in rows]
    latents = sample_latents(
        pipe,
        [captions[i] for i in rows],
        [int(state >> 1) for state in states],
        num_steps=recipe.num_steps,
        cfg_scale=recipe.cfg_scale,
        scheduler=recipe.scheduler,
    )
    if not latents.isfinite().all():
        raise UserError(
            f"Expected finite latents, got others in rows {rows[0]} to {rows[-1]} of {split}; run the model in "
            "float32 (data.dtype=float32), or check its weights."
        )
    return latents.float().cpu()


def _has(path: Path, rows: int) -> bool:
    """Tell whether a shard is complete; remove what a killed run left of it."""
    for leftover in path.parent.glob(f".{path.stem}.tmp-*"):
        leftover.unlink(missing_ok=True)
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False)) == rows
    except (FileNotFoundError, ValueError, EOFError):
        return False


def load_latents(folder: str | os.PathLike[str], split: str, rows: int) -> Float[np.ndarray, "n c y x"]:
    """Load the latents of a split.

    Raises:
        UserError: If some of them are missing.
    """
    files = sorted((Path(folder) / split).glob("shard-*.npy"))
    latents = [np.load(file, allow_pickle=False) for file in files]
    if sum(map(len, latents)) != rows:
        raise UserError(
            f"Expected {rows} latents of {split} in '{folder}', got {sum(map(len, latents))}; run the same command "
            "again, or delete the folder."
        )
    return np.concatenate(latents)
