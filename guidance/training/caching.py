"""Turn a :class:`FeatureRecipe` into features: load model and examples, cache splits, open a cache."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from guidance.data.cache import FeatureCache
from guidance.data.encoding import FeatureEncoder
from guidance.data.features import (
    CLIP_PREFIX,
    LiveFeatures,
    cache_features,
    clip_name,
    describe_embedders,
    describe_features,
    load_embedders,
)
from guidance.data.sources import SPLITS, load_examples
from guidance.heads.folder import CONFIG_FILE, SavedModel
from guidance.models.denoiser import fingerprint
from guidance.models.pipelines import TESTBED, load_pipeline
from guidance.models.types import Pipeline
from guidance.training.recipes import FeatureRecipe
from guidance.utils.config import list_differences, load_config
from guidance.utils.errors import UserError

M = TypeVar("M", bound=SavedModel)

#: Options that a cache's manifest records of the examples.
RECORDED = ("dataset", "train", "validation", "test", "image_column", "caption_column", "group_column")


def with_targets(recipe: FeatureRecipe, targets: Sequence[str], rating: str | None = None) -> FeatureRecipe:
    """Return a recipe that stores the targets of heads beside the columns it was given.

    Args:
        recipe: Its target columns are kept, unless they are the default.
        targets: Columns to store.
        rating: The one among them that must hold ratings in 1..10; None for none.
    """
    given = [] if recipe.target_columns == FeatureRecipe().target_columns else recipe.target_columns
    columns = list(dict.fromkeys([*given, *targets]))
    return dataclasses.replace(recipe, target_columns=columns, rating_column=rating)


def build_cache(
    recipe: FeatureRecipe, folder: str | os.PathLike[str], *, splits: Sequence[str] = SPLITS, **share: Any
) -> int:
    """Cache splits of a recipe; resume what a killed run left.

    Args:
        recipe: Model, dataset and noise.
        folder: The cache.
        splits: Splits to cache; others can be added later.
        **share: See :func:`cache_split`.

    Returns:
        Rows this process computed.

    Raises:
        UserError: As :func:`guidance.data.features.cache_features` and :func:`guidance.data.sources.load_examples`.
    """
    examples = {split: load_split(recipe, split) for split in splits}  # refused before the model loads
    pipe = load_model(recipe)
    source = {name: getattr(recipe, name) for name in RECORDED}
    return sum(cache_split(pipe, recipe, examples[s], folder, split=s, source=source, **share) for s in splits)


def cache_split(
    pipe: Pipeline, recipe: FeatureRecipe, examples: Any, folder: str | os.PathLike[str], **options: Any
) -> int:
    """Cache the features of examples as a recipe says.

    Args:
        pipe: The recipe's model.
        recipe: Columns, noise, batch size and shards.
        examples: Rows of a data set.
        folder: The cache.
        **options: ``split``, ``source``, ``latents`` and the shares of processes (``process_index``,
            ``num_processes``, ``progress``) of :func:`guidance.data.features.cache_features`.
    """
    return cache_features(
        pipe,
        examples,
        folder,
        image_column=recipe.image_column,
        caption_column=recipe.caption_column,
        target_columns=recipe.target_columns,
        draws=recipe.draws,
        batch_size=recipe.batch_size,
        shard_size=recipe.shard_size,
        base_model=recipe.model,
        **options,
        **encoding_options(recipe),
    )


def open_cache(
    recipe: FeatureRecipe, folder: str | os.PathLike[str], splits: Sequence[str] = SPLITS
) -> FeatureCache | None:
    """Open a cache that has these splits, or return None where it is absent or unfinished.

    A finished cache is used as it is, so its recipe need not be repeated; but an option that was given and
    contradicts it is refused.

    Raises:
        UserError: If the recipe asks for other features than the cache holds.
    """
    try:
        cache = FeatureCache(folder)
    except UserError:
        return None
    if not set(splits) <= set(cache.splits):
        return None
    settings = cache.manifest["settings"]
    recorded = settings | settings["source"] | {"model": settings["base_model"]}
    default = FeatureRecipe()
    for field in dataclasses.fields(FeatureRecipe):
        value = getattr(recipe, field.name)
        if field.name not in recorded or value in (None, getattr(default, field.name)):
            continue
        columns = field.name == "target_columns"
        if not (set(value) <= set(cache.columns) if columns else value == recorded[field.name]):
            raise UserError(
                f"Expected {field.name}={value}, but the cache in '{folder}' was made with "
                f"{recorded[field.name]}; choose another cache folder, or delete this one."
            )
    check_current(recipe, settings["base_model"], settings["base_fingerprint"], folder)
    _check_clip(recipe, settings, folder)
    return cache


def load_finished(
    model: type[M], config: Any, decisive: Callable[[Any], dict[str, Any]], recipe: FeatureRecipe
) -> M | None:
    """Load what this config has already trained; refuse to replace what another one has.

    Args:
        model: Class of the trained model.
        config: Config of the training, with ``output`` and ``overwrite``.
        decisive: Reduces a config to the values that decide what is trained.
        recipe: Names the diffusion model.

    Raises:
        UserError: If the output folder holds something else.
    """
    folder = Path(config.output)
    model.check_replaceable(folder)
    if config.overwrite or not (folder / CONFIG_FILE).is_file():
        return None
    record = folder / "train.yaml"
    differences = ["train.yaml is missing"]
    if record.is_file():
        differences = list_differences(decisive(load_config(type(config), record)), decisive(config))
    if differences:
        raise UserError(
            f"Expected '{folder}' to be new or trained with this config, but another was used there "
            f"({min(differences)}); choose another output, or set overwrite=true."
        )
    found = model.from_pretrained(folder)
    check_current(recipe, found.config.base_model, found.config.base_fingerprint, folder)
    return found


def check_current(
    recipe: FeatureRecipe, base_model: str, base_fingerprint: str, folder: str | os.PathLike[str]
) -> None:
    """Refuse a folder that was made from other weights of the testbed than the present ones.

    Only the testbed is checked: it loads within a second, and its weights change with the package.
    """
    if recipe.model == base_model == TESTBED and fingerprint(load_model(recipe).unet) != base_fingerprint:
        raise UserError(
            f"Expected '{folder}' to be made from the testbed's present weights, but it was made from "
            "others; delete the folder to make it again."
        )


def _check_clip(recipe: FeatureRecipe, settings: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Refuse embeddings by other weights of the testbed's CLIP than the present ones."""
    column = f"{CLIP_PREFIX}{TESTBED}"
    if column not in recipe.target_columns:
        return
    present = describe_embedders(load_embedders([column], "cpu"))["clip"][TESTBED]
    if settings.get("clip", {}).get(TESTBED) != present:
        raise UserError(
            f"Expected '{folder}' to hold embeddings by the testbed's present CLIP, but it holds another's; "
            "delete the folder to make it again."
        )


def live_splits(
    recipe: FeatureRecipe, splits: Sequence[str] = SPLITS
) -> tuple[dict[str, LiveFeatures], dict[str, Any]]:
    """Return features that are computed when read, by split, and the settings for a manifest."""
    examples = {split: load_split(recipe, split) for split in splits}
    pipe = load_model(recipe)
    encoders = {split: FeatureEncoder(pipe, split=split, **encoding_options(recipe)) for split in splits}
    embedders = load_embedders(recipe.target_columns, pipe.unet.device)
    live = {
        split: LiveFeatures(
            encoders[split],
            examples[split],
            image_column=recipe.image_column,
            caption_column=recipe.caption_column,
            draws=recipe.draws,
            batch_size=recipe.batch_size,
            embedders=embedders,
        )
        for split in splits
    }
    settings = describe_features(encoders[splits[0]], draws=recipe.draws, base_model=recipe.model)
    return live, settings | describe_embedders(embedders)


def load_model(recipe: FeatureRecipe) -> Any:
    """Load the pipeline of a recipe."""
    return load_pipeline(recipe.model, device=recipe.device, dtype=recipe.dtype, revision=recipe.revision)


def load_split(recipe: FeatureRecipe, split: str) -> Any:
    """Load the examples of a recipe's split; columns ``clip:NAME`` are computed later, from the images."""
    return load_examples(
        recipe.dataset,
        split,
        getattr(recipe, split),
        image_column=recipe.image_column,
        caption_column=recipe.caption_column,
        target_columns=[name for name in recipe.target_columns if clip_name(name) is None],
        rating_column=recipe.rating_column,
        group_column=recipe.group_column,
        seed=recipe.seed if recipe.dataset != TESTBED else 0,
    )


def encoding_options(recipe: FeatureRecipe) -> dict[str, Any]:
    """Return the options of :class:`FeatureEncoder` in a recipe."""
    return {
        "tap": recipe.tap,
        "noise": recipe.noise,
        "caption": recipe.caption,
        "timesteps": (recipe.timesteps[0], recipe.timesteps[1]) if recipe.timesteps else None,
        "seed": recipe.seed,
    }
