"""What guidance costs: guided against unguided steps, and encoder-only against full-forward feature capture.

    python -m eval.cost                       # sd-2.1-base shape, random weights, 512 px (64x64 latents), batch 1
    python -m eval.cost model=random:sd-1.5 latent_size=32 repeats=9
    python -m eval.cost model=testbed batch_size=32 'methods=[mid-u, amortised]'

Runs alternate, so that a drifting machine hits all of them; times are CPU times of the process on a CPU and wall
times on a GPU.  The floor is counted: FLOPs of the guided step over FLOPs of the unguided one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from guidance.config import friendly_errors, option, parse_config
from guidance.errors import UserError, nearest

#: What is timed -> what it is compared with.
METHODS: dict[str, str | None] = {
    "unguided": None,
    "mid-u": "unguided",
    "amortised": "unguided",
    "unguided, no CFG": None,
    "mid-u, no CFG": "unguided, no CFG",
    "capture, full": None,
    "capture, encoder": "capture, full",
}


@dataclasses.dataclass
class CostConfig:
    """What is timed."""

    model: str = option(
        "random:sd-2.1-base", "random:NAME for random weights, the testbed, a folder or a hub id"
    )
    latent_size: int = option(0, "side of the latents, 64 for 512 px in Stable Diffusion; 0: the model's own")
    batch_size: int = option(1, "images a step; each is two samples with classifier-free guidance")
    methods: list[str] = option([], "those to time, and what they are compared with; empty: all")
    repeats: int = option(5, "alternating repeats of each method, after one warm-up")
    device: str = option("cpu", "cpu or cuda")
    output: str = option("runs/cost", "folder of cost.json")


def measure_cost(config: CostConfig) -> dict[str, Any]:
    """Time one step unguided and guided, with CFG and without, and feature capture both ways.

    Returns:
        Per method: median, minimum and maximum seconds, ratio to its baseline (median of the ratios of
        neighbouring runs), counted FLOPs and the floor.

    Raises:
        UserError: If there is no such method.
    """
    import torch
    from tqdm.auto import tqdm

    from guidance.io import write_json

    wanted = config.methods or list(METHODS)
    if unknown := [name for name in wanted if name not in METHODS]:
        raise UserError(f"Expected methods, got '{unknown[0]}'.{nearest(unknown[0], METHODS)}")
    names = [name for name in METHODS if name in wanted or name in {METHODS[w] for w in wanted}]
    pipe = _load(config)
    side = config.latent_size or pipe.unet.config.sample_size
    built = _build_methods(pipe, config.batch_size, side, config.device)
    methods = {name: built[name] for name in names}
    flops = {name: _flops(*method) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in tqdm(range(config.repeats), desc="repeat"):
        for name, method in methods.items():
            times[name].append(_time(*method, config.device))
    rows = {}
    for name, seconds in times.items():
        base = METHODS[name]
        ratios = [a / b for a, b in zip(seconds, times[base], strict=True)] if base else []
        rows[name] = {
            "median": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "tflop": flops[name] / 1e12,
            "against": base,
            "ratio": statistics.median(ratios) if base else None,
            "floor": flops[name] / flops[base] if base else None,
        }
    result = {"config": dataclasses.asdict(config), "threads": torch.get_num_threads(), "rows": rows}
    write_json(Path(config.output) / f"{Path(config.model).name.replace(':', '-')}-{side}.json", result)
    return result


Method = tuple[Callable[[], Any], Callable[[], None]]  # a context, and what is timed in it


def _load(config: CostConfig) -> Any:
    from guidance.pipelines import DENOISER, load_pipeline

    return load_pipeline(config.model, device=config.device, parts=DENOISER)


def _build_methods(pipe: Any, b: int, side: int, device: str) -> dict[str, Method]:
    """What can be timed, for ``b`` images with latents of this side."""
    import torch

    from guidance.apply import apply_guidance, cfg_parts
    from guidance.taps import capture, encode_features

    unet = pipe.unet
    pipe.scheduler.set_timesteps(25)
    torch.manual_seed(0)
    x = torch.randn(2 * b, unet.config.in_channels, side, side, device=device)
    text = torch.randn(2 * b, 77, unet.config.cross_attention_dim, device=device)
    t = pipe.scheduler.timesteps[3]

    @torch.no_grad()
    def step(parts: int) -> None:
        token = cfg_parts.set(parts)
        try:
            unet(x[: parts * b], t, encoder_hidden_states=text[: parts * b])
        finally:
            cfg_parts.reset(token)

    @torch.no_grad()
    def full_capture() -> None:
        with capture(unet):
            unet(x[:b], t, encoder_hidden_states=text[:b])

    def encoder_only() -> None:
        encode_features(unet, x[:b], t, text[:b])

    head, adapter = _guides(pipe, device)
    plain = contextlib.nullcontext
    with_head, with_adapter = (functools.partial(apply_guidance, pipe, [guide]) for guide in (head, adapter))
    with_cfg, without = functools.partial(step, 2), functools.partial(step, 1)
    return {
        "unguided": (plain, with_cfg),
        "mid-u": (with_head, with_cfg),
        "amortised": (with_adapter, with_cfg),
        "unguided, no CFG": (plain, without),
        "mid-u, no CFG": (with_head, without),
        "capture, full": (plain, full_capture),
        "capture, encoder": (plain, encoder_only),
    }


def _guides(pipe: Any, device: str) -> tuple[Any, Any]:
    """The report's head and an adapter of the default size, both random."""
    from guidance.adapter import AdapterConfig, build_adapter
    from guidance.guides import MidBlockGuide
    from guidance.guides.amortised import AmortisedGuide
    from guidance.heads import HeadConfig, build_head
    from guidance.pipelines import latent_channels

    base = {"prediction_type": pipe.scheduler.config.prediction_type}
    config = HeadConfig(
        "conv", in_channels=pipe.unet.config.block_out_channels[-1], time_conditioned=False, **base
    )
    adapter = build_adapter(AdapterConfig(latent_channels(pipe.unet), **base)).to(device)
    return MidBlockGuide(build_head(config).to(device), 1.0, start=0, stop=1), AmortisedGuide(adapter, 1.0)


class _Whole:
    """Module tracker that puts everything under one name."""

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> _Whole:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def _flops(context: Callable[[], Any], run: Callable[[], None]) -> int:
    """Count FLOPs of one call (this is also its warm-up)."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = (
        _Whole()
    )  # the per-module tracker cannot follow autograd.grad with respect to an input
    with context(), counter:
        run()
    return counter.get_total_flops()


def _time(context: Callable[[], Any], run: Callable[[], None], device: str) -> float:
    import torch

    on_cpu = device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    with context():
        if not on_cpu:
            torch.cuda.synchronize()
        begun = clock()
        run()
        if not on_cpu:
            torch.cuda.synchronize()
        return clock() - begun


def cost_table(result: dict[str, Any]) -> str:
    """Markdown of :func:`measure_cost`."""
    lines = [
        "| method | seconds (min .. max) | TFLOP | against | ratio | counted floor |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in result["rows"].items():
        ratio, floor = (f"{r[k]:.3f}" if r[k] is not None else "-" for k in ("ratio", "floor"))
        span = f"{r['median']:.2f} ({r['min']:.2f} .. {r['max']:.2f})"
        lines.append(f"| {name} | {span} | {r['tflop']:.3f} | {r['against'] or '-'} | {ratio} | {floor} |")
    return "\n".join(lines)


@friendly_errors("eval.cost")
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this script."""
    config = parse_config(CostConfig, argv, prog="eval.cost", description=__doc__ or "")
    print(cost_table(measure_cost(config)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
