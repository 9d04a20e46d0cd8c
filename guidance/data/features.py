"""Compute features: once, into shards (:func:`cache_features`), or on the fly (:class:`LiveFeatures`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from guidance.data.cache import write_shards
from guidance.data.encoding import FeatureEncoder
from guidance.data.sources import column_array, decode_image, require_columns
from guidance.models.conditions import pick
from guidance.models.denoiser import fingerprint
from guidance.models.types import Pipeline
from guidance.utils.errors import UserError
from guidance.utils.images import fit_image

if TYPE_CHECKING:
    from datasets import Dataset

    from guidance.models.clip import Clip

ENCODING = ("tap", "noise", "caption", "timesteps", "seed")  # options of FeatureEncoder


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
        dataset: Dataset,
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


def live_features(
    pipe: Pipeline,
    dataset: Dataset,
    *,
    split: str = "train",
    embedders: Mapping[str, Clip] | None = None,
    **options: Any,
) -> LiveFeatures:
    """Compute the features of a split by options of :class:`FeatureEncoder` and of :class:`LiveFeatures`."""
    encoding = {name: options.pop(name) for name in ENCODING if name in options}
    return LiveFeatures(FeatureEncoder(pipe, split=split, **encoding), dataset, embedders=embedders, **options)


def cache_features(
    pipe: Pipeline,
    dataset: Dataset,
    folder: str | os.PathLike[str],
    *,
    target_columns: Sequence[str] = ("rating",),
    split: str = "train",
    shard_size: int = 2048,
    base_model: str | None = None,
    source: dict[str, Any] | None = None,
    state: Any = None,
    progress: bool = True,
    **options: Any,
) -> int:
    """Write the features of one split as shards; complete shards are kept.

    Call it once per split on the same folder.  A killed run continues when it is called again with the same arguments;
    others are refused.

    Args:
        pipe: Pipeline whose VAE, text encoder and encoder half of the denoiser are run.
        dataset: Examples as :func:`guidance.data.sources.load_examples` returns them.
        folder: The cache.
        target_columns: Columns to store: numbers, text (class labels by name), or equal-length vectors; and
            ``clip:NAME``, the embedding of the clean image by that CLIP, float16 (n, d).
        split: Name of the split, part of the cache and of the seed of the noise.
        shard_size: Rows per shard, rounded to full images; a kill loses at most one shard of work.
        base_model: Name of the model for the manifest; None takes the name in the pipeline's config.
        source: Further facts about the examples to record in the manifest (JSON).
        state, progress: See :func:`guidance.data.cache.write_shards`.
        **options: See :func:`live_features`.

    Returns:
        Number of rows that this process computed, without those that existed.

    Raises:
        UserError: If the cache was written with other settings, a column is missing, an image cannot be
            read, or features are not finite.
    """
    embedders = load_embedders(target_columns, pipe.unet.device)
    live = live_features(pipe, dataset, split=split, embedders=embedders, **options)
    if live.draws < 1 or live.batch_size < 1 or shard_size < 1:
        sizes = f"{live.draws}, {live.batch_size}, {shard_size}"
        raise UserError(f"Expected draws, batch_size and shard_size above 0, got {sizes}.")
    stored = [name for name in target_columns if name not in embedders]
    require_columns(dataset, [name for name in (live.image_column, live.caption_column, *stored) if name], split)
    settings = describe_features(live, base_model) | {"target_columns": list(target_columns), "source": source or {}}
    settings |= describe_embedders(embedders)
    targets = {name: live.column(name) for name in stored}

    def compute(part: range, update: Callable[[int], Any]) -> dict[str, NDArray[Any]]:
        h, t = [], []
        for i in range(0, len(part), live.batch_size):
            rows = np.asarray(part[i : i + live.batch_size])
            features, timesteps = live.read(rows)
            h.append(features.to("cpu", torch.float16))
            t.append(timesteps.cpu())
            if not h[-1].isfinite().all():
                raise UserError(
                    f"Expected finite features that fit float16, got others in rows {rows[0]} to {rows[-1]}; run "
                    "the model in float32 (dtype=float32), or check its weights."
                )
            update(len(rows))
        order = np.asarray(part)
        columns = {name: values[order] for name, values in targets.items()}
        columns |= {name: live.embed(name, order) for name in embedders}
        return {"h": torch.cat(h).numpy(), "t": torch.cat(t).numpy()} | columns

    return write_shards(
        folder,
        settings,
        split,
        len(live),
        max(1, shard_size // live.draws) * live.draws,
        compute,
        label=f"cache {split} features",
        files=["h", "t", *target_columns],
        state=state,
        progress=progress,
    )


def describe_features(live: LiveFeatures, base_model: str | None = None) -> dict[str, Any]:
    """Return what determines features: the settings in a manifest and in the config of a head."""
    encoder = live.encoder
    return {
        "base_model": base_model or str(encoder.pipe.config.get("_name_or_path") or ""),
        "base_fingerprint": fingerprint(encoder.pipe.unet),
        "prediction_type": encoder.schedule.prediction_type,
        "num_train_timesteps": encoder.schedule.num_train_timesteps,
        **{name: getattr(encoder, name) for name in ("tap", "noise", "caption")},
        "timesteps": list(encoder.timesteps),
        "image_size": encoder.image_size,
        "draws": live.draws,
        "seed": encoder.seed,
        **({"tap_channels": encoder.tap_channels} if encoder.tap_channels else {}),
    }


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
