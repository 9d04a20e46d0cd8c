"""Finish the training of a head: calibrate on validation rows, measure on test rows, write the folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from guidance.data.cache import FeatureSource
from guidance.heads.config import HeadConfig
from guidance.heads.hub import head_card
from guidance.heads.networks import Head
from guidance.heads.tasks import get_task
from guidance.training.heads import FitState, predict
from guidance.training.metrics import apply_temperatures, evaluate_head, fit_temperatures, plot_metrics, useful_range
from guidance.utils.io import atomic_dir, write_json


def measure_head(
    head: Head,
    sources: Mapping[str, FeatureSource],
    targets: Mapping[str, Tensor],
    accelerator: Any,
    *,
    calibrate: bool = True,
    compare: Sequence[str] = (),
) -> dict[str, Any]:
    """Calibrate a head on validation rows, find its useful range, and measure it; nothing is chosen on test rows.

    The config's temperature, start, stop and metrics are set.  Returns ``{"validation": ..., "test": ...}``, see
    :func:`guidance.training.metrics.evaluate_head`; ``compare`` names numeric columns to rank the score against.
    """
    config, task = head.config, get_task(head.config.task)
    config.temperature, config.metrics = [], {}
    results: dict[str, Any] = {}
    temperatures: list[float] = []
    for split in ("validation", "test"):
        outputs, t = predict(head, sources[split], accelerator)
        columns = {name: sources[split].column(name) for name in compare}
        logits = task.logits(outputs)
        if calibrate and split == "validation" and logits is not None:
            temperatures = fit_temperatures(logits, targets[split], t, config.num_train_timesteps)
        results[split] = evaluate_calibrated(outputs, targets[split], t, config, temperatures, columns)
    config.temperature = temperatures
    if config.noise == "random":  # a head on clean latents was never shown the other noise levels
        config.start, config.stop = useful_range(results["validation"], config.num_train_timesteps)
    overall = results["test"]["overall"]
    config.metrics = {name: overall[name] for name in task.headlines if name in overall}
    return results


def evaluate_calibrated(
    outputs: Float[Tensor, "n outputs"],
    target: Tensor,
    t: Float[Tensor, " n"],
    config: HeadConfig,
    temperatures: Sequence[float],
    compare: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, Any]:
    """Measure outputs with temperatures (none if empty), and the calibration error without as ``ece_uncalibrated``.

    See :func:`guidance.training.metrics.evaluate_head`.
    """
    raw = evaluate_head(outputs, target, t, config, compare)
    scaled = apply_temperatures(outputs, temperatures, t, config.num_train_timesteps)
    result = evaluate_head(scaled, target, t, config, compare)
    pairs = zip([result["overall"], *result["bins"]], [raw["overall"], *raw["bins"]], strict=True)
    for entry, before in pairs:
        if "ece" in before:
            entry["ece_uncalibrated"] = before["ece"]
    return result


def write_folder(
    head: Head,
    folder: str | os.PathLike[str],
    results: Mapping[str, Any],
    fit: FitState,
    *,
    config_yaml: str,
    trained: Mapping[str, Any],
) -> None:
    """Write weights, config, metrics, plot, model card and training config as one folder, or nothing.

    ``results`` are those of :func:`measure_head`, ``config_yaml`` becomes ``train.yaml``, and ``trained`` are facts of
    the run for the model card, for example rows and device.
    """
    head.check_replaceable(folder)
    cost = {"seconds": round(fit.seconds, 1)} | dict(trained)
    training = {k: v for k, v in dataclasses.asdict(fit).items() if k != "seconds"}
    with atomic_dir(folder) as temporary:
        head._save_pretrained(temporary)
        write_json(temporary / "metrics.json", {**results, "training": training, "cost": cost})
        config, T = head.config, head.config.num_train_timesteps
        plot_metrics(
            results,
            temporary / "metrics.png",
            title=f"{config.kind} head for '{config.target}'; shaded: where it guides; dotted: chance",
            shaded=((1 - config.stop) * T, (1 - config.start) * T),
        )
        (temporary / "train.yaml").write_text(config_yaml, encoding="utf-8")
        card = model_card(head, os.fspath(folder), results, fit, cost)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def model_card(head: Head, name: str, results: Mapping[str, Any], fit: FitState, cost: Mapping[str, Any]) -> str:
    """Return the model card of a trained head as Markdown, its test results by timestep included."""
    test = results["test"]
    fact = f"trained {fit.step} steps ({len(fit.history)} epochs); "
    fact += ", ".join(f"{key} {value}" for key, value in cost.items())
    lines = [
        "Measured on test rows; nothing was chosen on them. Skill is the lower end of a 95% interval; 0 is chance.",
        "",
        *_bins_table(test["bins"], get_task(head.config.task).headlines),
        "Overall: " + ", ".join(f"{k} {_cell(v)}" for k, v in test["overall"].items()) + ".",
    ]
    chosen = "that range is where it clearly beat chance on validation rows"
    return head_card(head, name, facts=[chosen, fact], measured="\n".join(lines))


def _bins_table(bins: Sequence[Mapping[str, Any]], headlines: Sequence[str]) -> list[str]:
    """Results by timestep; nothing where no bin has enough rows."""
    if not bins:
        return []
    columns = [c for c in ("low", "high", "rows", *headlines, "nll") if c in bins[0]]
    return [
        "| " + " | ".join(columns) + " |",
        "|" + " ---: |" * len(columns),
        *("| " + " | ".join(_cell(entry[c]) for c in columns) + " |" for entry in bins),
        "",
    ]


def _cell(value: float | int) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
