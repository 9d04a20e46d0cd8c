"""Measure saved heads by noise level, on any dataset: accuracy, ranking and calibration.

    python -m eval.heads runs/heads/testbed-aesthetic                                # features on the fly
    python -m eval.heads runs/heads/testbed-aesthetic cache=runs/cache/testbed       # cached, as in training
    python -m eval.heads runs/heads/a runs/heads/b data.test=500 data.draws=4        # two in one table
    python -m eval.heads runs/heads/mine data.dataset=other.parquet data.image_column=file
    python -m eval.heads runs/heads/testbed-discriminator cache=runs/cache/testbed-up \
        generated=runs/generated/testbed-up

Tap, noise, caption, model and timesteps are taken from each head; features that do not fit it are refused.
A table by timestep goes to the terminal; metrics.json, metrics.png and, where a head has classes, reliability.png
go to the output folder.  Numbers in brackets are 95% intervals over images; ece is the calibration error with the
head's temperatures, ece_uncalibrated that without; skill is the lower end of an interval, 0 is chance.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guidance.training.recipes import FeatureRecipe
from guidance.utils.config import list_words, option, parse_config
from guidance.utils.errors import UserError, friendly_errors

if TYPE_CHECKING:
    from guidance.data.cache import FeatureSource
    from guidance.heads import Head


@dataclasses.dataclass
class EvalHeadsConfig:
    """Options of this script."""

    heads: list[str] = option([], "folders of heads; words without '=' are added")
    output: str = option("runs/eval/heads", "folder of the results")
    split: Literal["test", "validation", "train"] = option("test", "rows to measure on")
    cache: str | None = option(None, "folder of cached features, made when absent; null computes them")
    generated: str | None = option(None, "folder of generated images (generated.folder), for discriminators")
    compare: list[str] = option([], "further numeric columns to rank ratings and numbers against")
    data: FeatureRecipe = option(FeatureRecipe, "where features come from")


def evaluate_heads(config: EvalHeadsConfig) -> dict[str, Any]:
    """Measure heads and write the results.

    Returns:
        Head -> ``{"folder", "task", "target", "features", "overall", "bins"}`` and, where it has classes,
        ``"reliability"``; see :func:`guidance.training.metrics.evaluate_head`.
    """
    from accelerate import Accelerator

    from eval.heads.features import open_features
    from eval.heads.tables import plot_reliability
    from guidance.heads import load_head
    from guidance.training.metrics import plot_metrics
    from guidance.utils.io import check_writable, write_json

    if not config.heads:
        raise UserError("Expected the folder of a head, got none; write 'python -m eval.heads FOLDER'.")
    accelerator = Accelerator()
    folders = _names(config.heads)
    heads = {name: load_head(path, accelerator.device) for name, path in folders.items()}
    output = Path(config.output)
    check_writable(output / "metrics.json")
    configs = {name: head.config for name, head in heads.items()}
    options: dict[str, Any] = {key: getattr(config, key) for key in ("cache", "generated", "compare")}
    features = open_features(configs, config.data, config.split, **options)
    results = {}
    for name, (source, settings) in features.items():
        found = measure(heads[name], source, settings["draws"], accelerator, config.compare, f"measure {name}")
        results[name] = {"folder": folders[name], "features": settings} | found
    curves = {name: r["reliability"] for name, r in results.items() if "reliability" in r}
    title = f"{config.split} rows; bands: 95% over images; dotted: chance"
    plot_metrics(results, output / "metrics.png", title=title)
    (output / "reliability.png").unlink(missing_ok=True)  # of heads measured before
    if curves:
        plot_reliability(curves, output / "reliability.png")
    write_json(output / "metrics.json", {"config": dataclasses.asdict(config), "heads": results})
    return results


def measure(
    head: Head, source: FeatureSource, draws: int, accelerator: Any, compare: Sequence[str], progress: str
) -> dict[str, Any]:
    """Measure one head on all rows of a source, with and without its temperatures.

    Args:
        head: As loaded; its temperatures are removed for the pass and put back.
        source: Features; for a discriminator the real rows followed by as many generated ones.
        draws: Rows per image.
        compare: Columns to rank ratings and numbers against.
        progress: Label of the progress bar.
    """
    import numpy as np

    from eval.heads.intervals import head_intervals
    from eval.heads.tables import reliability
    from guidance.heads.tasks import get_task
    from guidance.training.heads import predict
    from guidance.training.metrics import apply_temperatures
    from guidance.training.report import evaluate_calibrated

    config, temperatures, task = head.config, head.config.temperature, get_task(head.config.task)
    target = task.encode(source.column(config.target), config.labels, config.target)
    columns = {name: source.column(name) for name in compare if task.ranked}
    config.temperature = []
    try:
        outputs, t = predict(head, source, accelerator, progress=progress)
    finally:
        config.temperature = temperatures
    result = evaluate_calibrated(outputs, target, t, config, temperatures, columns)
    scaled = apply_temperatures(outputs, temperatures, t, config.num_train_timesteps)
    originals = len(source) // 2 if task.generated else len(source)
    image = np.arange(len(source)) % originals // draws
    intervals = head_intervals(scaled, target, t, config, image)
    result["overall"].update(intervals["overall"])
    for entry, more in zip(result["bins"], intervals["bins"], strict=True):
        entry.update(more)
    found = {"task": config.task, "target": config.target} | result
    if task.logits(outputs) is not None:
        curves = {"without temperatures": outputs} | ({"with temperatures": scaled} if temperatures else {})
        index = task.class_index(target)
        found["reliability"] = {label: reliability(task.logits(x), index) for label, x in curves.items()}
    return found


def _names(folders: Sequence[str]) -> dict[str, str]:
    """Name each head by the end of its path, as far as is needed to tell them apart.

    >>> _names(["/a/colour", "/b/colour", "/b/colour/"])
    {'a/colour': '/a/colour', 'b/colour': '/b/colour/'}
    """
    unique = {Path(folder).resolve(): folder for folder in folders}
    depth = next(k for k in itertools.count(1) if len({p.parts[-k:] for p in unique}) == len(unique))
    return {"/".join(path.parts[-depth:]): folder for path, folder in unique.items()}


@friendly_errors("eval.heads")
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this script."""
    words = list_words(sys.argv[1:] if argv is None else argv, "heads")
    config = parse_config(EvalHeadsConfig, words, prog="python -m eval.heads", description=__doc__ or "")
    from eval.heads.tables import head_tables

    results = evaluate_heads(config)
    print(f"\n{head_tables(results)}\n\nnumbers and plots: {config.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
