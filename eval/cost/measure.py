"""Measure the average denoiser step of a run under each method, against a baseline."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from eval.cost.meters import count_flops, count_saved, peak_memory, time_run
from eval.cost.methods import Builder, CostBench, Method


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a step under a method.

    Attributes:
        median, min, max: Seconds per step over the repeats.
        tflop: Counted.
        peak_gb: Peak memory during a step, weights included; None where it cannot be measured.
        saved_gb: Activations saved for a backward pass, summed over the step.
        against: The baseline.
        ratio, ratio_min, ratio_max: Seconds over the mean of the baseline's runs before and after: median and range.
        floor: FLOPs over the baseline's.
        peak_ratio: Peak memory over the baseline's.
        runs: Seconds per step of each run, in order.
    """

    median: float
    min: float
    max: float
    tflop: float
    peak_gb: float | None
    saved_gb: float
    against: str | None = None
    ratio: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    floor: float | None = None
    peak_ratio: float | None = None
    runs: Sequence[float] = ()


def measure_steps(
    bench: CostBench, methods: Mapping[str, tuple[str | None, Builder]], repeats: int, device: str
) -> dict[str, Cost]:
    """Measure every method; baselines come before the methods that are compared with them."""
    built: dict[str, Method] = {}
    flops: dict[str, float] = {}
    costs: dict[str, Cost] = {}
    for name, (_, build) in tqdm(methods.items(), desc="count FLOPs and memory"):
        # large parts are built on first use, so that the peaks of earlier methods do not include them
        built[name] = method = build(bench)
        flops[name] = method.average(count_flops)  # warms up, too
        saved = method.measure(lambda run: count_saved(run, bench.networks())) if method.gradient else [0]
        peaks = [p for p in method.measure(lambda run: peak_memory(run, device)) if p is not None]
        peak = max(peaks) / 1e9 if peaks else None
        costs[name] = Cost(0, 0, 0, flops[name] / 1e12, peak, max(saved) / 1e9)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    baselines = {baseline for baseline, _ in methods.values() if baseline is not None}
    for turn in tqdm([*itertools.repeat(methods, repeats), baselines], desc="repeat"):
        for name in turn:
            seconds[name].append(built[name].average(lambda run: time_run(run, device)))
    for name, (baseline, _) in methods.items():
        runs = seconds[name]
        costs[name] = cost = dataclasses.replace(
            costs[name], median=statistics.median(runs), min=min(runs), max=max(runs), runs=runs
        )
        if baseline is None:
            continue
        pairs = zip(runs, itertools.pairwise(seconds[baseline]), strict=True)
        ratios = [2 * run / (before + after) for run, (before, after) in pairs]
        base_peak = costs[baseline].peak_gb
        costs[name] = dataclasses.replace(
            cost,
            against=baseline,
            ratio=statistics.median(ratios),
            ratio_min=min(ratios),
            ratio_max=max(ratios),
            floor=flops[name] / flops[baseline],
            peak_ratio=cost.peak_gb / base_peak if cost.peak_gb and base_peak else None,
        )
    return costs
