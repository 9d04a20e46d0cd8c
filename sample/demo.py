"""The main job in one command: cache features, train an aesthetic head, sample guided and unguided, compare.

make demo        or        python -m sample.demo [key=value ...]
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from guidance.utils.config import option, parse_config
from guidance.utils.errors import friendly_errors


@dataclasses.dataclass
class DemoConfig:
    """Options of the demo."""

    output: str = option("runs/demo", "folder of images, grid, table and summary")
    head: str = option("runs/heads/testbed-aesthetic", "the head; trained first if there is none")
    num_prompts: int = option(64, "test prompts, one seed each")
    scales: list[float] = option([-2.5, 1.25, 2.5], "guidance scales besides unguided")
    start: float = option(0.1, "fraction of the steps where guidance begins")
    num_steps: int = option(25, "sampling steps")
    cfg_scale: float = option(3.0, "classifier-free guidance weight")
    cfg_matched: float = option(6.0, "plain CFG weight to show beside guidance; 0 for none")
    reference: int = option(1000, "test scenes for the Frechet distance")


def run_demo(config: DemoConfig) -> Path:
    """Run the three stages; each is skipped if its result exists.

    Returns:
        The output folder, with ``grid.png``, ``table.md``, ``eval/report.html`` and one PNG and record per image.
    """
    start = time.monotonic()

    def stage(k: int, text: str) -> None:
        print(f"\n[{k}/3 | {time.monotonic() - start:4.0f} s] {text}", flush=True)

    stage(1, "Cache mid-block features of noised testbed images, and train a rating head on them")
    _train(config.head)
    scales = ", ".join(f"{scale:g}" for scale in config.scales)
    stage(2, f"Sample {config.num_prompts} unseen captions unguided and at scales {scales}, from the same noise")
    folder = _sample(config)
    stage(3, "Judge the images by the ground truth and by networks that took no part in guiding")
    print(f"\n{_compare(config, folder)}\n")
    print(
        f"Truth: pixel formulas, in sd of training scenes; change in sd of the unguided images; paired by prompt.\n"
        f"FD-judge of {config.num_prompts} images is biased upwards (128 features): compare rows, not levels.\n"
        f"See {folder / 'grid.png'} and {folder / 'eval' / 'report.html'}. {time.monotonic() - start:.0f} s in all."
    )
    return folder


def _train(head: str) -> None:
    """Run ``train/cache_features.py`` and ``train/head.py`` as a user would."""
    from guidance.utils.io import check_writable
    from guidance.utils.processes import run_script

    if not (Path(head) / "config.json").is_file():
        check_writable(head)  # before the minutes of caching
        run_script("train.cache_features", [], processes=_processes())
    run_script("train.head", [f"output={head}"])


def _sample(config: DemoConfig) -> Path:
    """Run ``sample/sweep.py`` as a user would."""
    from guidance.utils.processes import run_script

    words = [f"scale={json.dumps(config.scales)}", f"cfg_matched={config.cfg_matched > 0}".lower()]
    words += [f"cfg_scales_matched=[{config.cfg_matched:g}]"] if config.cfg_matched > 0 else []
    words += [f"{k}={getattr(config, k)}" for k in ("start", "head", "num_prompts", "num_steps", "cfg_scale")]
    words += ["seeds_per_prompt=1", "batch_size=32", "grid_rows=10", f"output={config.output}"]
    run_script("sample.sweep", words, processes=_processes())
    return Path(config.output)


def _processes() -> int:
    """Return the number of processes: one on an accelerator, otherwise one per core, with one thread each."""
    import torch

    return 1 if torch.accelerator.is_available() else min(os.cpu_count() or 1, 4)


def _compare(config: DemoConfig, folder: Path) -> str:
    from eval.images import EvalImagesConfig, evaluate_images
    from eval.stats.tables import arm_table
    from guidance.utils.io import atomic_path

    evaluation = EvalImagesConfig([str(folder)], reference_size=config.reference, permutations=99, title="make demo")
    results = evaluate_images(evaluation, "make demo")
    assert results is not None  # one process
    table = arm_table(results)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(table + "\n")
    return table


@friendly_errors("sample.demo")
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this script."""
    run_demo(parse_config(DemoConfig, argv, prog="sample.demo", description=__doc__ or ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
