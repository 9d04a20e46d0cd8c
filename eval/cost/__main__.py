"""What guidance costs: seconds, memory and FLOPs of a denoiser step under each method, against an unguided one.

    python -m eval.cost                       # Stable Diffusion 2.1's shape, random weights, 512 px: 20 minutes
    python -m eval.cost latent_size=32 repeats=9 'methods=[mid-u, amortised]'                             # 256 px
    python -m eval.cost model=random:sdxl latent_size=64 'methods=[mid-u, full graph]' repeats=3
    python -m eval.cost model=testbed batch_size=32 'guides=[aesthetic, "aesthetic:every=2"]' methods=[mid-u]
    python -m eval.cost device=cuda dtype=bfloat16 channels_last=true compile=true batch_size=4    # untested

Runs alternate, and each is compared with the mean of the unguided runs before and after it, so that a drifting machine
hits all of them alike; seconds are CPU time of the process on a CPU and wall time on an accelerator.  The floor is
counted: FLOPs of the guided step over those of the unguided one.  A guide with an interval or every=k is charged what
its steps cost on average over a run of 25.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guidance.utils.config import option, parse_config
from guidance.utils.errors import UserError, friendly_errors, nearest

if TYPE_CHECKING:
    Built = Mapping[str, tuple[str | None, Callable[[Bench], Method]]]
    from eval.cost.methods import Bench, Method


@dataclasses.dataclass
class CostConfig:
    """What is timed."""

    model: str = option(
        "random:sd-2.1-base", "random:NAME for random weights, the testbed, a folder or a hub id"
    )
    latent_size: int = option(0, "side of the latents, 64 for 512 px in Stable Diffusion; 0: the model's own")
    batch_size: int = option(1, "images a step; each is two samples with classifier-free guidance")
    methods: list[str] = option([], "those to time, and what they are compared with; empty: all")
    guides: list[str] = option(
        [], "guides NAME:key=value,... to time beside them, as sample.guided takes them"
    )
    clip: str = option(
        "random", "CLIP of the methods that need one: random (ViT-B/32), testbed, a folder or id"
    )
    repeats: int = option(5, "alternating repeats of each method, after warm-ups")
    device: str = option("cpu", "cpu or cuda")
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "precision of the model")
    channels_last: bool = option(False, "keep the denoiser's weights channels-last")
    compile: bool = option(False, "compile the denoiser's repeated blocks")
    output: str = option("runs/cost", "folder of MODEL-SIZE.json and .png")

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.batch_size < 1 or self.latent_size < 0:
            raise UserError(
                "Expected repeats and batch_size of at least 1 and a latent_size of at least 0, got "
                f"{self.repeats}, {self.batch_size} and {self.latent_size}."
            )


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step takes under a method.

    Attributes:
        median, min, max: Seconds of a step over the repeats.
        tflop: Counted.
        peak_gb: Most memory in use during a step, weights included; None where that cannot be told.
        saved_gb: Activations kept for a backward pass, over all of a step.
        against: The method it is compared with.
        ratio, ratio_min, ratio_max: Seconds over the mean of that method's runs before and after: median and range.
        floor: FLOPs over its FLOPs.
        peak_ratio: Peak memory over its peak memory.
        runs: Seconds of each run, in their order.
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


def measure_cost(config: CostConfig) -> dict[str, Any]:
    """Measure a denoiser step under every method that is asked for.

    Returns:
        ``{"config": ..., "threads": ..., "rows": {method: fields of a Cost}}``; the same is written as JSON, and a plot
        beside it.

    Raises:
        UserError: If there is no such method, guide or model.
    """
    import torch

    from guidance.utils.io import write_json

    built = _choose(config)
    bench = _bench(config)
    rows = {name: dataclasses.asdict(cost) for name, cost in _measure(bench, built, config).items()}
    side = config.latent_size or bench.denoiser.config.sample_size
    result = {"config": dataclasses.asdict(config), "threads": torch.get_num_threads(), "rows": rows}
    file = Path(config.output) / f"{Path(config.model).name.replace(':', '-')}-{side}.json"
    write_json(file, result)
    plot_cost(result, file.with_suffix(".png"))
    return result


def _choose(config: CostConfig) -> Built:
    """The methods that are asked for, with what they are compared with before them."""
    from eval.cost.methods import METHODS, given_method

    if unknown := [name for name in config.methods if name not in METHODS]:
        raise UserError(f"Expected methods, got '{unknown[0]}'.{nearest(unknown[0], METHODS)}")
    wanted = set(config.methods or METHODS)
    wanted |= {against for name in wanted if (against := METHODS[name][0])}
    wanted |= {"unguided"} if config.guides else set()
    return {name: METHODS[name] for name in METHODS if name in wanted} | {
        text: given_method(text) for text in config.guides
    }


def _bench(config: CostConfig) -> Bench:
    import torch

    from eval.cost.methods import Bench
    from guidance.models.pipelines import DENOISER, load_pipeline

    needs_vae = not config.methods or any("VAE" in name for name in config.methods)
    parts = None if config.guides else (*DENOISER, "vae") if needs_vae else DENOISER
    dtype = getattr(torch, config.dtype)
    pipe = load_pipeline(config.model, device=config.device, dtype=dtype, parts=parts)
    bench = Bench(pipe, config.batch_size, config.latent_size or None, config.clip)
    if config.channels_last:
        bench.denoiser.to(memory_format=torch.channels_last)
    if config.compile:
        bench.denoiser.compile_repeated_blocks()
    return bench


def _measure(bench: Bench, built: Built, config: CostConfig) -> dict[str, Cost]:
    from tqdm.auto import tqdm

    from eval.cost.meters import count_flops, count_saved, peak_memory, time_run

    methods, counted, saved, peaks = {}, {}, {}, {}
    for name in tqdm(
        built, desc="count FLOPs and memory"
    ):  # what is heavy is built late: earlier peaks lack it
        methods[name] = method = built[name][1](bench)
        counted[name] = _over(method, count_flops)  # warms up, too
        saved[name] = 0.0
        if method.gradient:
            saved[name] = max(_each(method, lambda run: count_saved(run, list(bench.networks()))))
        peaks[name] = _each(method, lambda run: peak_memory(run, config.device))
    seconds: dict[str, list[float]] = {name: [] for name in methods}

    def time(name: str) -> None:
        seconds[name].append(_over(methods[name], lambda run: time_run(run, config.device)))

    for _ in tqdm(range(config.repeats), desc="repeat"):
        for name in methods:
            time(name)
    for name in {base for base, _ in built.values() if base is not None}:
        time(name)  # the run after the last ones
    costs: dict[str, Cost] = {}
    for name in methods:
        known = [peak for peak in peaks[name] if peak is not None]
        own = Cost(
            statistics.median(seconds[name]),
            min(seconds[name]),
            max(seconds[name]),
            counted[name] / 1e12,
            max(known) / 1e9 if known else None,
            saved[name] / 1e9,
            runs=seconds[name],
        )
        base = built[name][0]
        if base is not None:
            around = itertools.pairwise(seconds[base])
            ratios = [
                2 * run / (before + after) for run, (before, after) in zip(seconds[name], around, strict=True)
            ]
            own = dataclasses.replace(
                own,
                against=base,
                ratio=statistics.median(ratios),
                ratio_min=min(ratios),
                ratio_max=max(ratios),
                floor=counted[name] / counted[base],
                peak_ratio=_quotient(own.peak_gb, costs[base].peak_gb),
            )
        costs[name] = own
    return costs


def _quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _each(method: Method, meter: Callable[[Callable[[], Any]], Any]) -> list[Any]:
    """What a meter says of every phase of a run."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(method.context())
        return [meter(run) for run, _ in method.phases]


def _over(method: Method, meter: Callable[[Callable[[], Any]], float]) -> float:
    """The average step of a run, by a meter."""
    found = _each(method, meter)
    return sum(value * share for value, (_, share) in zip(found, method.phases, strict=True))


def cost_table(result: Mapping[str, Any]) -> str:
    """Markdown of :func:`measure_cost`."""
    lines = [
        "| method | seconds (min .. max) | against | ratio (range) | floor | TFLOP | peak GB | ratio | saved GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in result["rows"].items():
        span = f"{r['median']:.3g} ({r['min']:.3g} .. {r['max']:.3g})"
        ratio = "-"
        if r["ratio"] is not None:
            ratio = f"{r['ratio']:.3f} ({r['ratio_min']:.3f} .. {r['ratio_max']:.3f})"
        floor, peak, more = (_number(r[k]) for k in ("floor", "peak_gb", "peak_ratio"))
        saved = f"{r['saved_gb']:.3g}" if r["saved_gb"] else "-"
        cells = (name, span, r["against"] or "-", ratio, floor, f"{r['tflop']:.3g}", peak, more, saved)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def plot_cost(result: Mapping[str, Any], file: Path) -> None:
    """Bars of the measured ratios with their range, and the counted floor of each."""
    from matplotlib.figure import Figure

    from guidance.utils.io import atomic_path

    rows = {name: r for name, r in result["rows"].items() if r["against"] == "unguided"}
    if not rows:
        return
    figure = Figure(figsize=(7, 1 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ratios = [r["ratio"] for r in rows.values()]
    below = [r["ratio"] - r["ratio_min"] for r in rows.values()]
    above = [r["ratio_max"] - r["ratio"] for r in rows.values()]
    axes.barh(list(rows), ratios, xerr=[below, above], color="#9ecae1", label="measured, with range")
    floors = [r["floor"] for r in rows.values()]
    axes.plot(floors, list(rows), "k|", markersize=14, label="counted FLOPs")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("cost of a step against an unguided one")
    axes.set_title(f"{result['config']['model']}, batch {result['config']['batch_size']}", fontsize=10)
    axes.legend(fontsize=8)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


@friendly_errors("eval.cost")
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this script."""
    config = parse_config(CostConfig, argv, prog="eval.cost", description=__doc__ or "")
    print(cost_table(measure_cost(config)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
