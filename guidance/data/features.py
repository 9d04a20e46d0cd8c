"""Compute features: once, into shards (:func:`cache_features`), or on the fly (:class:`LiveFeatures`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from guidance.data.cache import FORMAT_VERSION, MANIFEST, first_difference, has_shard, shard_name
from guidance.data.encoding import FeatureEncoder
from guidance.data.sources import Examples, column_array, decode_image, require_columns
from guidance.models.conditions import pick
from guidance.models.denoiser import fingerprint
from guidance.models.types import Pipeline
from guidance.taps.hooks import MID_BLOCK
from guidance.utils.errors import UserError
from guidance.utils.images import fit_image
from guidance.utils.io import atomic_dir, read_json, write_json

if TYPE_CHECKING:
    from guidance.models.clip import Clip


class LiveFeatures:
    """Compute features when they are read, with new noise in every epoch.

    Args:
        encoder: Computes the features of one split.
        dataset: Examples as :func:`guidance.data.sources.load_examples` returns them.
        image_column, caption_column: Their columns; None for a dataset without captions.
        draws: Noise draws per example and epoch: each counts as a row.
        batch_size: Rows per forward.
        latents: Clean latents (n, c, y, x) of the examples, to be used in place of their images.
        embedders: CLIPs of columns ``clip:NAME``, see :func:`guidance.data.features.load_embedders`.
    """

    def __init__(
        self,
        encoder: FeatureEncoder,
        dataset: Examples,
        *,
        image_column: str = "image",
        caption_column: str | None = "caption",
        draws: int = 1,
        batch_size: int = 64,
        latents: NDArray[np.float32] | None = None,
        embedders: Mapping[str, Clip] | None = None,
    ) -> None:
        self.clean, self.embedders = latents, embedders or {}
        self.encoder, self.dataset, self.draws, self.batch_size = encoder, dataset, draws, batch_size
        self.image_column, self.caption_column = image_column, caption_column

    def __len__(self) -> int:
        return len(self.dataset) * self.draws

    def column(self, name: str) -> NDArray[Any]:
        """Return all values of a column, of the dataset or ``clip:NAME``, repeated for each draw, (n, ...)."""
        if name in self.embedders:
            return self.embed(name, np.arange(len(self)))
        return np.repeat(column_array(self.dataset, name), self.draws, axis=0)

    def embed(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Compute the unit-length CLIP embeddings of the clean images of rows, (b, d).

        CLIP sees the same images as the model: upright RGB, cropped to the model's size.
        """
        examples, inverse = np.unique(rows // self.draws, return_inverse=True)
        size, parts = self.encoder.image_size, []
        for i in range(0, len(examples), self.batch_size):
            images = self._images(examples[i : i + self.batch_size])
            parts.append(self.embedders[name].embed_pil([fit_image(image, size) for image in images]))
        return torch.cat(parts).to("cpu", torch.float16).numpy()[inverse]

    def _images(self, examples: NDArray[np.int64]) -> list[Image.Image]:
        cells = self.dataset[examples][self.image_column]
        return [decode_image(cell, int(i)) for i, cell in zip(examples, cells, strict=True)]

    def read(
        self, rows: Sequence[int] | NDArray[np.int64], epoch: int = 0
    ) -> tuple[Float[Tensor, "b c y x"], Float[Tensor, " b"]]:
        """Compute features and timesteps of rows, in the given order; every epoch draws new noise."""
        parts = [
            self._encode(np.asarray(rows[i : i + self.batch_size], np.int64), epoch)
            for i in range(0, len(rows), self.batch_size)
        ]
        return torch.cat([h for h, _ in parts]), torch.cat([t for _, t in parts])

    def _encode(self, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, Tensor]:
        examples, inverse = np.unique(rows // self.draws, return_inverse=True)  # each image is encoded once
        captions = [""] * len(examples)
        if self.caption_column:
            captions = self.dataset.select_columns(self.caption_column)[examples][self.caption_column]
        if self.clean is None:
            x0 = self.encoder.latents(self._images(examples))[inverse]
        else:
            x0 = torch.from_numpy(self.clean[examples]).to(self.encoder.pipe.unet.device)[inverse]
        text = pick(self.encoder.text([text or "" for text in captions]), inverse)
        keys = [(int(row // self.draws), int(epoch * self.draws + row % self.draws)) for row in rows]
        return self.encoder.encode(x0, text, keys)


def cache_features(
    pipe: Pipeline,
    dataset: Examples,
    folder: str | os.PathLike[str],
    *,
    image_column: str = "image",
    caption_column: str | None = "caption",
    target_columns: Sequence[str] = ("rating",),
    split: str = "train",
    noise: Literal["random", "none"] = "random",
    draws: int = 1,
    caption: Literal["caption", "empty"] = "caption",
    tap: str = MID_BLOCK,
    timesteps: tuple[int, int] | None = None,
    batch_size: int = 64,
    shard_size: int = 2048,
    seed: int = 0,
    base_model: str | None = None,
    source: dict[str, Any] | None = None,
    latents: NDArray[np.float32] | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = True,
) -> int:
    """Write the features of one split as shards; complete shards are kept.

    Call it once per split on the same folder.  A killed run continues when it is called again with the same arguments;
    others are refused.

    Args:
        pipe: Pipeline whose VAE, text encoder and encoder half of the denoiser are run.
        dataset: Examples as :func:`guidance.data.sources.load_examples` returns them.
        folder: The cache.
        image_column, caption_column: Columns of the dataset; None for a dataset without captions.
        target_columns: Columns to store: numbers, text (class labels by name), or equal-length vectors; and
            ``clip:NAME``, the embedding of the clean image by that CLIP, float16 (n, d).
        split: Name of the split, part of the cache and of the seed of the noise.
        noise: "random": latents noised at uniformly random t; "none": clean latents at t = 0.
        draws: Noise draws, hence rows, per image.
        caption: Condition on the "caption" or on the "empty" prompt.
        tap: Module to read, or several joined by "+".
        timesteps: Lowest and highest t, inclusive; None for all.
        batch_size: Rows per forward, without influence on the noise.
        shard_size: Rows per shard, rounded to full images; a kill loses at most one shard of work.
        seed: Seed of the noise.
        base_model: Name of the model for the manifest; None takes the name in the pipeline's config.
        source: Further facts about the examples to record in the manifest (JSON).
        latents: Clean latents of the examples in place of their images, for example generated ones.
        process_index, num_processes: This process computes every ``num_processes``-th shard.
        progress: Show a progress bar.

    Returns:
        Number of rows that this process computed, without those that existed.

    Raises:
        UserError: If the cache was written with other settings, a column is missing, an image cannot be
            read, or features are not finite.
    """
    if draws < 1 or batch_size < 1 or shard_size < 1:
        raise UserError(f"Expected draws, batch_size and shard_size above 0, got {draws}, {batch_size}, {shard_size}.")
    stored = [name for name in target_columns if clip_name(name) is None]
    columns = [image_column, *([caption_column] if caption_column else []), *stored]
    require_columns(dataset, columns, split)
    encoder = FeatureEncoder(pipe, tap=tap, noise=noise, caption=caption, timesteps=timesteps, seed=seed, split=split)
    settings = describe_features(encoder, draws=draws, base_model=base_model) | {
        "target_columns": list(target_columns),
        "source": source or {},
    }
    embedders = load_embedders(target_columns, pipe.unet.device)
    settings |= describe_embedders(embedders)
    per_shard = max(1, shard_size // draws) * draws
    live = LiveFeatures(
        encoder,
        dataset,
        image_column=image_column,
        caption_column=caption_column,
        draws=draws,
        batch_size=batch_size,
        latents=latents,
        embedders=embedders,
    )
    write_manifest(Path(folder), settings, split, len(live), per_shard, write=process_index == 0)
    targets = {name: live.column(name) for name in stored}
    starts = range(process_index * per_shard, len(live), num_processes * per_shard)
    shards = [(shard_name(split, i // per_shard), range(i, min(i + per_shard, len(live)))) for i in starts]
    todo = [(name, r) for name, r in shards if not has_shard(Path(folder) / name, len(r), target_columns)]
    rows = sum(len(part) for _, part in todo)
    with tqdm(total=rows, desc=f"cache {split} features", unit="row", disable=not progress or not rows) as bar:
        for name, part in todo:
            _write_shard(Path(folder) / name, live, np.asarray(part), targets, bar)
    return rows


def describe_features(encoder: FeatureEncoder, *, draws: int, base_model: str | None = None) -> dict[str, Any]:
    """Return what determines features: the settings in a manifest and in the config of a head."""
    pipe = encoder.pipe
    return {
        "base_model": base_model or str(pipe.config.get("_name_or_path") or ""),
        "base_fingerprint": fingerprint(pipe.unet),
        "prediction_type": encoder.schedule.prediction_type,
        "num_train_timesteps": encoder.schedule.num_train_timesteps,
        "tap": encoder.tap,
        "noise": encoder.noise,
        "caption": encoder.caption,
        "timesteps": list(encoder.timesteps),
        "image_size": encoder.image_size,
        "draws": draws,
        "seed": encoder.seed,
        **({"tap_channels": encoder.tap_channels} if encoder.tap_channels else {}),
    }


def write_manifest(
    folder: Path, settings: dict[str, Any], split: str, rows: int, per_shard: int, *, write: bool
) -> None:
    """Record the plan of a split before its first shard, or check it against the recorded plan."""
    plan = {"rows": rows, "rows_per_shard": per_shard}
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "settings": settings, "splits": {}}
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST)
        old = manifest["settings"] | manifest["splits"].get(split, {})
        new = settings | (plan if split in manifest["splits"] else {})
        key = first_difference(old, new)
        if key is not None:
            raise UserError(
                f"Expected the settings of the cache in '{folder}', got another {key}: {new.get(key)} "
                f"instead of {old.get(key)}; choose another folder, or delete this one."
            )
    if write and manifest["splits"].get(split) != plan:
        manifest["splits"][split] = plan
        write_json(folder / MANIFEST, manifest)


def _write_shard(
    path: Path, live: LiveFeatures, order: NDArray[np.int64], targets: dict[str, NDArray[Any]], bar: tqdm
) -> None:
    """Compute a shard and write it atomically."""
    h, t = [], []
    for i in range(0, len(order), live.batch_size):
        rows = order[i : i + live.batch_size]
        features, timesteps = live.read(rows)
        h.append(features.to("cpu", torch.float16))
        t.append(timesteps.cpu())
        if not h[-1].isfinite().all():
            raise UserError(
                f"Expected finite features that fit float16, got others in rows {rows[0]} to {rows[-1]}; run "
                "the model in float32 (dtype=float32), or check its weights."
            )
        bar.update(len(rows))
    with atomic_dir(path) as temporary:
        np.save(temporary / "h.npy", torch.cat(h).numpy())
        np.save(temporary / "t.npy", torch.cat(t).numpy())
        for name, values in targets.items():
            np.save(temporary / f"{name}.npy", values[order])
        for name in live.embedders:  # a hub id has a slash: its folder
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(temporary / f"{name}.npy", live.embed(name, order))


#: A target column ``clip:NAME`` is the unit-length embedding of the clean image by the CLIP of that name.
CLIP_PREFIX = "clip:"


def clip_name(column: str) -> str | None:
    """Return NAME of a target column ``clip:NAME``; None for any other column.

    >>> clip_name("clip:testbed"), clip_name("rating")
    ('testbed', None)
    """
    return column.removeprefix(CLIP_PREFIX) if column.startswith(CLIP_PREFIX) else None


def load_embedders(columns: Iterable[str], device: str | torch.device | None = None) -> dict[str, Clip]:
    """Load the CLIP of each column ``clip:NAME``, see :func:`guidance.models.clip.load_clip`: column -> CLIP."""
    wanted = [(column, name) for column in columns if (name := clip_name(column)) is not None]
    if not wanted:
        return {}
    from guidance.models.clip import load_clip

    return {column: load_clip(name, device=device) for column, name in wanted}


def describe_embedders(embedders: Mapping[str, Clip]) -> dict[str, Any]:
    """Return ``{"clip": {NAME: fingerprint}}`` for a manifest; nothing where there is no CLIP."""
    known = {str(clip_name(column)): clip.fingerprint for column, clip in embedders.items()}
    return {"clip": known} if known else {}
