"""Open the features that a saved head was trained for, from a cache or computed on the fly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from guidance.data.cache import FeatureCache, FeatureSource
from guidance.heads.config import HeadConfig
from guidance.heads.tasks import get_task
from guidance.training.caching import build_cache, live_splits, open_cache, with_targets
from guidance.training.discriminator import open_generated
from guidance.training.recipes import FeatureRecipe
from guidance.utils.errors import UserError

#: Settings in which features must agree with a head.
_DECISIVE = ("tap", "noise", "caption", "base_fingerprint", "prediction_type", "num_train_timesteps")


def open_features(
    heads: Mapping[str, HeadConfig],
    recipe: FeatureRecipe,
    split: str,
    *,
    cache: str | None = None,
    generated: str | None = None,
    compare: Sequence[str] = (),
) -> dict[str, tuple[FeatureSource, dict[str, Any]]]:
    """Open the features of every head, and refuse features it was not trained for.

    Args:
        heads: Config of each head, by a name for messages.
        recipe: Examples, and how their features are computed; tap, noise, caption, model and timesteps default to
            the head's.
        split: "train", "validation" or "test".
        cache: Folder of cached features, to which a missing split is added; None computes features when read.
        generated: Folder of generated images, for discriminators.
        compare: Further columns to store.

    Returns:
        By name, the features and their settings, see :func:`guidance.data.features.describe_features`.

    Raises:
        UserError: If features are missing or do not fit a head.
    """
    for name, config in heads.items():
        if get_task(config.task).generated and (cache is None or generated is None):
            raise UserError(
                f"Expected cached features of real and of generated images for the discriminator '{name}', got "
                f"cache={cache or 'null'} and generated={generated or 'null'}; give both folders; 'accelerate launch "
                "train/head.py --config configs/head/testbed-discriminator.yaml' makes them."
            )
    tasks = [(config.target, get_task(config.task)) for config in heads.values()]
    targets = [*(target for target, task in tasks if not task.generated), *compare]
    rating = next((target for target, task in tasks if task.rated), None)
    given = with_targets(recipe, targets, rating)
    recipes = {name: _head_recipe(name, config, given) for name, config in heads.items()}
    found: dict[str, tuple[FeatureSource, dict[str, Any]]] = {}
    live: dict[str, tuple[FeatureSource, dict[str, Any]]] = {}  # heads that read the same features share them
    if cache is not None:
        real = _cached(given, recipes, cache, split)
    for name, config in heads.items():
        if cache is not None:
            found[name] = real, real.manifest["settings"]
        else:
            if (key := repr(recipes[name])) not in live:
                sources, settings = live_splits(recipes[name], [split])
                live[key] = sources[split], settings
            found[name] = live[key]
        _check_fits(name, config, found[name][1], "the model" if cache is None else f"the cache '{cache}'")
        if get_task(config.task).generated:
            found[name] = open_generated(real, str(generated), split), found[name][1]
    return found


def _head_recipe(name: str, config: HeadConfig, recipe: FeatureRecipe) -> FeatureRecipe:
    """Complete a recipe with the settings a head was trained with."""
    default = FeatureRecipe()
    trained: dict[str, Any] = {key: getattr(config, key) for key in ("tap", "noise", "caption")}
    for key, value in trained.items():
        if (asked := getattr(recipe, key)) not in (getattr(default, key), value):
            raise UserError(
                f"Expected data.{key}={value}, which '{name}' was trained with, got {asked}; leave it out: it is taken "
                "from the head."
            )
    if recipe.model == default.model and config.base_model:
        trained["model"] = config.base_model
    return dataclasses.replace(recipe, **trained, timesteps=recipe.timesteps or config.timesteps)


def _cached(given: FeatureRecipe, recipes: Mapping[str, FeatureRecipe], folder: str, split: str) -> FeatureCache:
    """Open the cache, after adding the split if it is missing, for heads that read the same features."""
    if open_cache(given, folder, [split]) is None:
        first, *_ = recipes
        if other := next((name for name in recipes if recipes[name] != recipes[first]), None):
            raise UserError(
                f"Expected heads that read the same features to fill the cache '{folder}', but '{first}' and "
                f"'{other}' differ in model, tap, noise, caption or timesteps; set cache=null."
            )
        build_cache(recipes[first], folder, splits=[split])
    return FeatureCache(folder, split)


def _check_fits(name: str, config: HeadConfig, settings: Mapping[str, Any], where: str) -> None:
    """Refuse features of another model, tap, noise, caption or CLIP than a head was trained with."""
    wanted = {key: getattr(config, key) for key in _DECISIVE if getattr(config, key) != ""}
    got = {key: settings[key] for key in wanted}
    if get_task(config.task).clip_target:
        wanted["clip"], got["clip"] = config.clip_fingerprint, settings.get("clip", {}).get(config.clip)
    key = next((key for key in wanted if wanted[key] != got[key]), None)
    if key is not None:
        raise UserError(
            f"Expected features with {key}={wanted[key]}, which '{name}' ({config.base_model or 'no model'}) was "
            f"trained with, but {where} gives {key}={got[key]} of {settings['base_model']}; choose another cache "
            "or model, or train a head for this one."
        )
