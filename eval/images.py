"""Evaluate images: guided against unguided, or any arms of the same prompts, with intervals and a report.

    python -m eval.images runs/samples/NAME                          # a run of sample/guided.py, against unguided
    python -m eval.images runs/v1-4 runs/v1-5 'vary=[model_fingerprint]'              # two checkpoints, the same seeds
    python -m eval.images runs/ddim runs/euler 'vary=[scheduler]'                     # two schedulers
    python -m eval.images photos_a photos_b prompts=prompts.csv clip=clip:openai/clip-vit-base-patch16
    python -m eval.images runs/edits edits=testbed:test                               # directional similarity
    python -m eval.images dit_samples reference=imagenet_stats.npz features=inception # one arm: FID

Folders are runs with records, or plain folders of images, paired by file name.  Writes report.html (self-contained),
summary.json, rows.csv and rows.parquet.  Features are cached by image: a killed run resumes, and a second one is quick.
Several processes share the work: OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m eval.images ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidance.utils.config import list_words, option, parse_config
from guidance.utils.errors import friendly_errors
from guidance.utils.processes import join_processes, launched, leave_processes

if TYPE_CHECKING:
    from eval.comparison.arms import Arms

SUMMARY, REPORT = "summary.json", "report.html"
OUTPUTS = (SUMMARY, REPORT, "rows.csv", "rows.parquet")


@dataclasses.dataclass
class EvalImagesConfig:
    """Options of this script."""

    folders: list[str] = option([], "folders of runs or of images; words without '=' are added")
    output: str | None = option(None, "folder of the results; null: FOLDER/eval, or runs/eval/NAMES")
    baseline: str | None = option(None, "arm the others are compared with; null: unguided, or the first")
    arms: list[str] = option([], "arms to compare, besides the baseline; empty: all")
    vary: list[str] = option([], "record fields in which pairs differ on purpose: scheduler, num_steps, ...")
    prompts: str | None = option(None, "table with file_name and prompt, for plain folders")
    exclude: bool = option(False, "leave out, and count, pairs with a missing or broken image")
    clip: str | None = option("auto", "CLIP that scores: judge-clip, clip:NAME; null for none")
    features: str | None = option("auto", "network of set metrics: judge, vision:NAME, clip:NAME, inception; null")
    reference: str | None = option("auto", "real images: testbed:test, a folder, parquet, hub id, npz; null")
    reference_size: int | None = option(None, "images of the reference; null: all, of the testbed 2000")
    edits: str | None = option(None, "edit pairs for directional similarity: testbed:test or a file")
    rating: str | None = option(None, "folder of a head whose score of finished images is shown")
    permutations: int = option(199, "random swaps of permutation tests of set metrics")
    sort_by: str | None = option(None, "metric that picks the best and worst examples; null: truth or CLIP score")
    cache: str = option("runs/eval/cache", "folder of cached features")
    batch_size: int = option(64, "images at once")
    title: str | None = option(None, "of the report")
    wandb: bool = option(False, "log the table to Weights & Biases, offline where there is no account")


def evaluate_images(config: EvalImagesConfig, command: str = "", *, progress: bool = True) -> dict[str, Any] | None:
    """Compare arms of images and write the report, unless it is there already for the same images and options.

    Args:
        config: Folders and options.
        command: Command line, for the report.

    Returns:
        The content of summary.json; None in all but the main one of several processes.

    Raises:
        UserError: If arms are not paired, or an option cannot be used.
    """
    from eval.comparison.arms import load_arms
    from guidance.utils.io import check_writable

    output = Path(config.output or default_output(config.folders))
    check_writable(output / SUMMARY)
    options: dict[str, Any] = {key: getattr(config, key) for key in ("baseline", "vary", "prompts", "exclude")}
    arms = load_arms(config.folders, only=config.arms, **options)
    key = _key(config, arms)
    if (previous := _read_summary(output, key)) is not None:
        return previous
    from eval.comparison.bench import ImageBench
    from eval.comparison.files import log_to_wandb, write_comparison

    state = join_processes()
    bench = ImageBench(arms, config, state, progress=progress and state.is_main_process)
    bench.fill()
    if not state.is_main_process:
        return None
    title = config.title or " and ".join(Path(folder).resolve().name for folder in config.folders)
    chosen = {k: v for k, v in dataclasses.asdict(config).items() if v != getattr(EvalImagesConfig(), k)}
    comparison = bench.compare(title, command, chosen)
    found = write_comparison(comparison, output, key=key, sort_by=config.sort_by)
    if config.wandb:
        log_to_wandb(comparison, output)
    return found


def _key(config: EvalImagesConfig, arms: Arms) -> str:
    """Hash what the results depend on: images, prompts, options, and the files that options name."""
    from guidance.runs.records import toolkit_version

    images = {name: [(*i.pair, i.prompt, i.digest) for i in rows] for name, rows in arms.images.items()}
    ignored = ("folders", "output", "cache", "batch_size", "wandb")
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in ignored}
    networks = [name and name.partition(":")[2] for name in (config.clip, config.features)]
    reference = config.reference and re.sub(r"(\.parquet)@\w+$", r"\1", config.reference)
    named = [Path(name) for name in (config.prompts, *networks, reference, config.edits, config.rating) if name]
    files = [f for path in named for f in ([path] if path.is_file() else sorted(path.rglob("*"))) if f.is_file()]
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    content = (arms.baseline, arms.excluded, arms.converted, images, options, stats, toolkit_version())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read_summary(output: Path, key: str) -> dict[str, Any] | None:
    """Read the summary of an output that is complete and of this key; None if there is none."""
    if all((output / name).is_file() for name in OUTPUTS):
        with contextlib.suppress(ValueError):  # no JSON
            found = json.loads((output / SUMMARY).read_text(encoding="utf-8"))
            return found if isinstance(found, dict) and found.get("key") == key else None
    return None


def default_output(folders: Sequence[str]) -> Path:
    """Return FOLDER/eval for one run, else a folder of runs/eval named after what is compared.

    >>> default_output(["out/v1-4", "out/v1-5"]).as_posix()
    'runs/eval/v1-4-vs-v1-5'
    """
    if len(folders) == 1 and any(Path(folders[0]).glob("records*.jsonl")):
        return Path(folders[0]) / "eval"
    names = "-vs-".join(Path(folder).resolve().name for folder in folders)
    return Path("runs/eval") / (re.sub(r"[^A-Za-z0-9._-]+", "-", names)[:80] or "images")


@friendly_errors("eval.images")
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this script."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = parse_config(
        EvalImagesConfig, list_words(words, "folders"), prog="python -m eval.images", description=__doc__ or ""
    )
    found = evaluate_images(config, "python -m eval.images " + shlex.join(words))
    if found is not None:
        output = config.output or default_output(config.folders)
        print(f"\n{found['table']}\n")
        for caveat in found["caveats"]:
            print(f"{caveat['kind']}: {caveat['text']}")
        print(f"\nreport: {Path(output) / REPORT}")
    if launched() > 1:
        leave_processes(join_processes())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
