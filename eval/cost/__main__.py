"""Measure what guidance costs: time, memory and FLOPs of a denoiser step, against an unguided one.

    python -m eval.cost                       # Stable Diffusion 2.1's shape, random weights, 512 px: 20 minutes
    python -m eval.cost latent_size=32 repeats=9 'methods=[mid-u, amortised]'                             # 256 px
    python -m eval.cost model=random:sdxl latent_size=64 'methods=[mid-u, full graph]' repeats=3
    python -m eval.cost model=testbed batch_size=32 'guides=[aesthetic, "aesthetic:every=2"]' methods=[mid-u]
    python -m eval.cost device=cuda dtype=bfloat16 'methods=[mid-u, "mid-u, no CFG"]' repeats=7

Methods take turns, and each run is compared with the mean of the baseline's runs before and after it, so that a
drifting machine affects all of them alike.  Times are CPU time of the process on a CPU and wall time on an accelerator.
The floor is counted: FLOPs of the guided step over those of its baseline.  A guide with an interval or every=k is
charged the average cost of its steps over a run of 25.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guidance.utils.config import option, parse_config
from guidance.utils.errors import UserError, friendly_errors, nearest

if TYPE_CHECKING:
    from eval.cost.methods import Builder, CostBench


@dataclasses.dataclass
class CostConfig:
    """Options of the measurement."""

    model: str = option("random:sd-2.1-base", "random:NAME for random weights, testbed, a folder or a hub id")
    latent_size: int = option(0, "side of the latents, 64 for 512 px in Stable Diffusion; 0: the model's default")
    batch_size: int = option(1, "images per step; each is two samples with classifier-free guidance")
    methods: list[str] = option([], "methods to time; their baselines are added; empty: all")
    guides: list[str] = option([], "guides NAME:key=value,... to time as well, as sample.guided takes them")
    clip: str = option("random", "CLIP of the methods that need one: random (ViT-B/32), testbed, a folder or id")
    repeats: int = option(5, "repeats of each method, in turns, after a warm-up")
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


def measure_cost(config: CostConfig) -> dict[str, Any]:
    """Measure a denoiser step under every selected method.

    Returns:
        ``{"config": ..., "threads": ..., "rows": {method: fields of a Cost}}``; the same is written as JSON, with a
        plot beside it.

    Raises:
        UserError: If a method, guide or model is unknown.
    """
    import torch

    from eval.cost.measure import measure_steps
    from guidance.utils.io import write_json

    methods = _select(config)
    bench = _build_bench(config)
    costs = measure_steps(bench, methods, config.repeats, config.device)
    rows = {name: dataclasses.asdict(cost) for name, cost in costs.items()}
    side = config.latent_size or bench.denoiser.config.sample_size
    result = {"config": dataclasses.asdict(config), "threads": torch.get_num_threads(), "rows": rows}
    file = Path(config.output) / f"{Path(config.model).name.replace(':', '-')}-{side}.json"
    write_json(file, result)
    plot_cost(result, file.with_suffix(".png"))
    return result


def _select(config: CostConfig) -> dict[str, tuple[str | None, Builder]]:
    """Select methods and their baselines, which come first."""
    from eval.cost.methods import METHODS, guide_method

    if unknown := [name for name in config.methods if name not in METHODS]:
        raise UserError(f"Expected methods, got '{unknown[0]}'.{nearest(unknown[0], METHODS)}")
    names = set(config.methods or METHODS)
    names |= {baseline for name in names if (baseline := METHODS[name][0])}
    names |= {"unguided"} if config.guides else set()
    methods = {name: method for name, method in METHODS.items() if name in names}
    return methods | {text: guide_method(text) for text in config.guides}


def _build_bench(config: CostConfig) -> CostBench:
    import torch

    from eval.cost.methods import CostBench
    from guidance.models.pipelines import DENOISER, load_pipeline

    needs_vae = not config.methods or any("VAE" in name for name in config.methods)
    parts = None if config.guides else (*DENOISER, "vae") if needs_vae else DENOISER
    pipe = load_pipeline(config.model, device=config.device, dtype=config.dtype, parts=parts)
    bench = CostBench(pipe, config.batch_size, config.latent_size or None, config.clip)
    if config.channels_last:
        bench.denoiser.to(memory_format=torch.channels_last)
    if config.compile:
        bench.denoiser.compile_repeated_blocks()
    return bench


def cost_table(result: Mapping[str, Any]) -> str:
    """Format the result of :func:`measure_cost` as a Markdown table."""
    lines = [
        "| method | seconds (min .. max) | against | ratio (range) | floor | TFLOP | peak GB | ratio | saved GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in result["rows"].items():
        seconds = f"{r['median']:.3g} ({r['min']:.3g} .. {r['max']:.3g})"
        ratio = "-"
        if r["ratio"] is not None:
            ratio = f"{r['ratio']:.3f} ({r['ratio_min']:.3f} .. {r['ratio_max']:.3f})"
        floor, *peak = ("-" if r[k] is None else f"{r[k]:.3f}" for k in ("floor", "peak_gb", "peak_ratio"))
        saved = f"{r['saved_gb']:.3g}" if r["saved_gb"] else "-"
        cells = (name, seconds, r["against"] or "-", ratio, floor, f"{r['tflop']:.3g}", *peak, saved)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_cost(result: Mapping[str, Any], file: Path) -> None:
    """Plot the measured ratios as bars with their ranges, and the counted floors as marks."""
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
    """Run the command line."""
    config = parse_config(CostConfig, argv, prog="eval.cost", description=__doc__ or "")
    print(cost_table(measure_cost(config)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
