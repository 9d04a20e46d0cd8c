"""What guidance costs: guided against unguided steps, and encoder-only against full-forward feature capture.

    python -m eval.cost                                   # sd-2.1-base shape, random weights, 512 px, batch 1, CFG
    python -m eval.cost model=sd-1.5 pixels=256 repeats=5

Runs alternate, so that a drifting machine hits all of them; times are CPU times of the process on a CPU and wall
times on a GPU.  The floor is counted: FLOPs of the guided step over FLOPs of the unguided one.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from guidance.config import friendly_errors, option, parse_config


@dataclasses.dataclass
class CostConfig:
    """What is timed."""

    model: str = option("sd-2.1-base", "architecture with random weights, see guidance/architectures.py")
    pixels: int = option(512, "side of the image; latents are an eighth of it")
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
    from guidance.architectures import build_unet
    from guidance.guides import MidBlockGuide
    from guidance.heads import HeadConfig, build_head
    from guidance.io import write_json
    from guidance.taps import capture, encode_features

    pipe = _Parts(build_unet(config.model).to(config.device))
    unet = pipe.unet
    side = config.pixels // 8
    torch.manual_seed(0)
    x = torch.randn(2, 4, side, side, device=config.device)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, device=config.device)
    t = pipe.scheduler.timesteps[3]
    head = build_head(HeadConfig(kind="conv", in_channels=1280, time_conditioned=False)).to(config.device)
    guide = MidBlockGuide(head, 1.0)

    @torch.no_grad()
    def step() -> None:
        token = cfg_parts.set(2)
        try:
            unet(x, t, encoder_hidden_states=text)
        finally:
            cfg_parts.reset(token)

    def guided() -> None:
        with apply_guidance(pipe, [guide]):
            step()

    @torch.no_grad()
    def full_capture() -> None:
        with capture(unet):
            unet(x[:1], t, encoder_hidden_states=text[:1])

    def encoder_only() -> None:
        encode_features(unet, x[:1], t, text[:1])

    methods = {
        "unguided": step,
        "mid-u": guided,
        "capture, full": full_capture,
        "capture, encoder": encoder_only,
    }
    baselines = {"mid-u": "unguided", "capture, encoder": "capture, full"}
    flops = {name: _flops(run) for name, run in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in tqdm(range(config.repeats), desc="repeat"):
        for name, run in methods.items():
            times[name].append(_time(run, config.device))
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
    write_json(Path(config.output) / f"{config.model}-{config.pixels}.json", result)
    return result


class _Parts:
    """As much of a pipeline as guidance needs."""

    def __init__(self, unet: Any) -> None:
        from diffusers import DDIMScheduler

        self.unet = unet
        self.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.scheduler.set_timesteps(25)


class _Whole:
    """Module tracker that puts everything under one name."""

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> _Whole:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def _flops(run: Callable[[], None]) -> int:
    """Count FLOPs of one call (this is also its warm-up)."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = (
        _Whole()
    )  # the per-module tracker cannot follow autograd.grad with respect to an input
    with counter:
        run()
    return counter.get_total_flops()


def _time(run: Callable[[], None], device: str) -> float:
    import torch

    if device == "cpu":
        begun = time.process_time()
        run()
        return time.process_time() - begun
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


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
