"""The features a saved head is measured on: those it was made for, from a cache or computed on the fly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from guidance.data.cache import FeatureCache, FeatureSource
from guidance.heads.config import HeadConfig
from guidance.training.caching import build_cache, live_splits, open_cache, with_targets
from guidance.training.discriminator import open_generated
from guidance.training.recipes import FeatureRecipe
from guidance.utils.errors import UserError

#: What decides whether features are those a head was trained on, besides the timesteps.
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
    """Find the features of every head, and refuse those it was not made for.

    Args:
        heads: Config of each head, by a name for messages.
        recipe: Which examples, and how their features are computed; tap, noise, caption, model and timesteps
            are the head's where they are left alone.
        split: "train", "validation" or "test".
        cache: Folder of cached features, filled with this split where it lacks it; None computes them when
            they are read.
        generated: Folder of generated images, for discriminators.
        compare: Further columns to store.

    Returns:
        By name, the features and how they were computed, see :func:`guidance.data.features.describe_features`.

    Raises:
        UserError: If features do not fit a head, or cannot be had.
    """
    for name, config in heads.items():
        if config.task == "binary" and (cache is None or generated is None):
            raise UserError(
                f"Expected cached features of real and of generated images for the discriminator '{name}', got "
                f"cache={_word(cache)} and generated={_word(generated)}; give both folders; 'accelerate launch "
                "train/head.py --config configs/head/testbed-discriminator.yaml' makes them."
            )
    targets = [*(config.target for config in heads.values() if config.task != "binary"), *compare]
    rating = next((config.target for config in heads.values() if config.task == "rating"), None)
    given = with_targets(recipe, targets, rating)
    recipes = {name: _head_recipe(name, config, given) for name, config in heads.items()}
    found: dict[str, tuple[FeatureSource, dict[str, Any]]] = {}
    opened: list[tuple[FeatureRecipe, tuple[FeatureSource, dict[str, Any]]]] = []
    if cache is not None:
        real = _cached(given, recipes, cache, split)
    for name, config in heads.items():
        if cache is not None:
            found[name] = real, real.manifest["settings"]
        else:  # heads that read the same features share them
            same = next((features for other, features in opened if other == recipes[name]), None)
            found[name] = same or _live(recipes[name], split)
            opened.append((recipes[name], found[name]))
        _check_fits(name, config, found[name][1], "the model" if cache is None else f"the cache '{cache}'")
    for name, config in heads.items():
        if config.task == "binary":
            found[name] = open_generated(real, str(generated), split), found[name][1]
    return found


def _head_recipe(name: str, config: HeadConfig, recipe: FeatureRecipe) -> FeatureRecipe:
    """Fill what a recipe leaves open by what a head was trained on."""
    default = FeatureRecipe()
    for key in ("tap", "noise", "caption"):
        if getattr(recipe, key) not in (getattr(default, key), getattr(config, key)):
            raise UserError(
                f"Expected data.{key}={getattr(config, key)}, which '{name}' was trained with, got "
                f"{getattr(recipe, key)}; leave it out: it is taken from the head."
            )
    own: dict[str, Any] = {key: getattr(config, key) for key in ("tap", "noise", "caption")}
    if recipe.model == default.model and config.base_model:
        own["model"] = config.base_model
    return dataclasses.replace(recipe, **own, timesteps=recipe.timesteps or config.timesteps)


def _cached(
    given: FeatureRecipe, recipes: Mapping[str, FeatureRecipe], folder: str, split: str
) -> FeatureCache:
    """Open the cache, after filling it where it lacks the split; one cache can serve heads that agree only."""
    if open_cache(given, folder, [split]) is None:
        (first, recipe), *others = recipes.items()
        for name, other in others:
            if other != recipe:
                raise UserError(
                    f"Expected heads that read the same features to fill the cache '{folder}', but '{first}' and "
                    f"'{name}' differ in model, tap, noise, caption or timesteps; set cache=null."
                )
        build_cache(recipe, folder, splits=[split])
    return FeatureCache(folder, split)


def _live(recipe: FeatureRecipe, split: str) -> tuple[FeatureSource, dict[str, Any]]:
    live, settings = live_splits(recipe, [split])
    return live[split], settings


def _check_fits(name: str, config: HeadConfig, settings: Mapping[str, Any], where: str) -> None:
    """Refuse features of another model, tap, noise, caption or CLIP than a head was trained with."""
    wanted = {key: getattr(config, key) for key in _DECISIVE if getattr(config, key) != ""}
    got = {key: settings[key] for key in wanted}
    if config.task == "embedding":
        wanted["clip"], got["clip"] = config.clip_fingerprint, settings.get("clip", {}).get(config.clip)
    key = next((key for key in wanted if wanted[key] != got[key]), None)
    if key is not None:
        raise UserError(
            f"Expected features with {key}={wanted[key]}, which '{name}' ({config.base_model or 'no model'}) was "
            f"trained with, but {where} gives {key}={got[key]} of {settings['base_model']}; choose another cache "
            "or model, or train a head for this one."
        )


def _word(value: str | None) -> str:
    return "null" if value is None else value
