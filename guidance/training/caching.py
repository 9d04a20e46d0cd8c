"""Turn a :class:`FeatureRecipe` into features: load model and examples, cache splits, open a cache."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from guidance.data.cache import FeatureCache
from guidance.data.features import (
    CLIP_PREFIX,
    ENCODING,
    LiveFeatures,
    cache_features,
    clip_name,
    describe_embedders,
    describe_features,
    live_features,
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
    """Return a recipe that stores the targets of heads beside the columns it was given, unless these are the default.

    The column ``rating`` among them must hold ratings in 1..10.
    """
    given = [] if recipe.target_columns == FeatureRecipe().target_columns else recipe.target_columns
    columns = list(dict.fromkeys([*given, *targets]))
    return dataclasses.replace(recipe, target_columns=columns, rating_column=rating)


def build_cache(
    recipe: FeatureRecipe, folder: str | os.PathLike[str], *, splits: Sequence[str] = SPLITS, state: Any = None
) -> FeatureCache:
    """Cache splits of a recipe; resume what a killed run left.

    Other splits can be added later.  The processes of ``state`` (accelerate's) share the work and all call this.

    Raises:
        UserError: As :func:`guidance.data.features.cache_features` and :func:`guidance.data.sources.load_examples`.
    """
    examples = {split: load_split(recipe, split) for split in splits}  # refused before the model loads
    pipe = load_model(recipe)
    source = {name: getattr(recipe, name) for name in RECORDED}
    for split in splits:
        cache_split(pipe, recipe, examples[split], folder, split=split, source=source, state=state)
    if state:
        state.wait_for_everyone()
    return FeatureCache(folder)


def cache_split(
    pipe: Pipeline, recipe: FeatureRecipe, examples: Any, folder: str | os.PathLike[str], **options: Any
) -> int:
    """Cache the features of examples as a recipe says; further options as of ``cache_features``."""
    options |= _options(recipe) | {"target_columns": recipe.target_columns, "shard_size": recipe.shard_size}
    return cache_features(pipe, examples, folder, base_model=recipe.model, **options)


def open_cache(
    recipe: FeatureRecipe, folder: str | os.PathLike[str], splits: Sequence[str] = SPLITS
) -> FeatureCache | None:
    """Open a cache that has these splits, or return None where it is absent or unfinished.

    A finished cache is used as it is, so its recipe need not be repeated; but an option that was given and
    contradicts it is refused (UserError).
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

    ``decisive`` reduces a config to the values that decide what is trained; ``recipe`` names the diffusion model.

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
    """Refuse a folder made from other weights than the present ones of the testbed, which change with the package."""
    if recipe.model == base_model == TESTBED and fingerprint(load_model(recipe).unet) != base_fingerprint:
        raise UserError(
            f"Expected '{folder}' to be made from the testbed's present weights, but it was made from "
            "others; delete the folder to make it again."
        )


def _check_clip(recipe: FeatureRecipe, settings: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Refuse embeddings by other weights of the testbed's CLIP than the present ones."""
    present = load_embedders({f"{CLIP_PREFIX}{TESTBED}"} & set(recipe.target_columns), "cpu")
    if any(clip.fingerprint != settings.get("clip", {}).get(TESTBED) for clip in present.values()):
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
    embedders = load_embedders(recipe.target_columns, pipe.unet.device)
    options = _options(recipe) | {"embedders": embedders}
    live = {split: live_features(pipe, examples[split], split=split, **options) for split in splits}
    return live, describe_features(live[splits[0]], recipe.model) | describe_embedders(embedders)


def load_model(recipe: FeatureRecipe) -> Any:
    """Load the pipeline of a recipe."""
    return load_pipeline(recipe.model, device=recipe.device, dtype=recipe.dtype, revision=recipe.revision)


def load_split(recipe: FeatureRecipe, split: str) -> Any:
    """Load the examples of a recipe's split; columns ``clip:NAME`` are computed later, from the images."""
    names = ("image_column", "caption_column", "rating_column", "group_column")
    return load_examples(
        recipe.dataset,
        split,
        getattr(recipe, split),
        target_columns=[name for name in recipe.target_columns if clip_name(name) is None],
        seed=recipe.seed if recipe.dataset != TESTBED else 0,
        **{name: getattr(recipe, name) for name in names},
    )


def _options(recipe: FeatureRecipe) -> dict[str, Any]:
    """Return the options of :func:`guidance.data.features.live_features` in a recipe."""
    names = (*ENCODING, "image_column", "caption_column", "draws", "batch_size")
    options = {name: getattr(recipe, name) for name in names}
    return options | {"timesteps": (recipe.timesteps[0], recipe.timesteps[1]) if recipe.timesteps else None}
