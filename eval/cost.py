"""What guidance costs: guided against unguided steps, and encoder-only against full-forward feature capture.

    python -m eval.cost                       # sd-2.1-base shape, random weights, 512 px (64x64 latents), batch 1
    python -m eval.cost model=sd-1.5 latent_size=32 repeats=9
    python -m eval.cost model=testbed

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


@dataclasses.dataclass
class CostConfig:
    """What is timed."""

    model: str = option("sd-2.1-base", "architecture with random weights, the testbed, a folder or a hub id")
    latent_size: int = option(0, "side of the latents, 64 for 512 px in Stable Diffusion; 0: the model's own")
    batch_size: int = option(1, "images a step; each is two samples with classifier-free guidance")
    repeats: int = option(5, "alternating repeats of each method, after one warm-up")
    device: str = option("cpu", "cpu or cuda")
    output: str = option("runs/cost", "folder of cost.json")


def measure_cost(config: CostConfig) -> dict[str, Any]:
    """Time one CFG step unguided and guided, and feature capture both ways.

    Returns:
        Per method: median, minimum and maximum seconds, ratio to its baseline (median of the ratios of
        neighbouring runs), counted FLOPs and the floor.
    """
    import torch
    from tqdm.auto import tqdm

    from guidance.apply import apply_guidance, cfg_parts
    from guidance.architectures import ARCHITECTURES, build_unet
    from guidance.guides import MidBlockGuide
    from guidance.heads import HeadConfig, build_head
    from guidance.io import write_json
    from guidance.pipelines import load_pipeline
    from guidance.taps import capture, encode_features

    if config.model in ARCHITECTURES:
        pipe = _Parts(build_unet(config.model).to(config.device))
    else:
        pipe = load_pipeline(config.model, device=config.device)
    unet, b = pipe.unet, config.batch_size
    pipe.scheduler.set_timesteps(25)
    side = config.latent_size or unet.config.sample_size
    torch.manual_seed(0)
    x = torch.randn(2 * b, unet.config.in_channels, side, side, device=config.device)
    text = torch.randn(2 * b, 77, unet.config.cross_attention_dim, device=config.device)
    t = pipe.scheduler.timesteps[3]
    channels = unet.config.block_out_channels[-1]
    predicts = pipe.scheduler.config.prediction_type
    shape = HeadConfig("conv", in_channels=channels, time_conditioned=False, prediction_type=predicts)
    head = build_head(shape).to(config.device)
    guide = MidBlockGuide(head, 1.0, start=0, stop=1)

    @torch.no_grad()
    def step() -> None:
        token = cfg_parts.set(2)
        try:
            unet(x, t, encoder_hidden_states=text)
        finally:
            cfg_parts.reset(token)

    @torch.no_grad()
    def full_capture() -> None:
        with capture(unet):
            unet(x[:b], t, encoder_hidden_states=text[:b])

    def encoder_only() -> None:
        encode_features(unet, x[:b], t, text[:b])

    guided = functools.partial(apply_guidance, pipe, [guide])
    methods: dict[str, tuple[Callable[[], Any], Callable[[], None]]] = {  # (context, what is timed in it)
        "unguided": (contextlib.nullcontext, step),
        "mid-u": (guided, step),
        "capture, full": (contextlib.nullcontext, full_capture),
        "capture, encoder": (contextlib.nullcontext, encoder_only),
    }
    baselines = {"mid-u": "unguided", "capture, encoder": "capture, full"}
    flops = {name: _flops(*method) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in tqdm(range(config.repeats), desc="repeat"):
        for name, method in methods.items():
            times[name].append(_time(*method, config.device))
    rows = {}
    for name, seconds in times.items():
        base = baselines.get(name)
        rows[name] = {
            "median": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "tflop": flops[name] / 1e12,
            "against": base,
            "ratio": statistics.median(a / b for a, b in zip(seconds, times[base], strict=True))
            if base
            else None,
            "floor": flops[name] / flops[base] if base else None,
        }
    result = {"config": dataclasses.asdict(config), "threads": torch.get_num_threads(), "rows": rows}
    write_json(Path(config.output) / f"{Path(config.model).name}-{side}.json", result)
    return result


class _Parts:
    """As much of a pipeline as guidance needs."""

    def __init__(self, unet: Any) -> None:
        from diffusers import DDIMScheduler

        self.unet = unet
        self.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


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
