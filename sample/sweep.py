"""Sweep: sample the same prompts and noises in every cell of a grid of guidance scales and other options.

    python -m sample.sweep 'scale=[-1, 0.5, 1, 2]'                          # and unguided, which baseline=true adds
    python -m sample.sweep 'scale=[1, 2]' 'num_steps=[15, 25]' --dry-run    # the plan: images, calls, time, disk
    python -m sample.sweep 'scale=[1, 2]' 'start=[0, 0.2]' combine=zip      # two cells beside the baseline, not four
    python -m sample.sweep 'guide=[aesthetic, "clip:cutouts=4"]' 'scale=[1, 2]' cfg_matched=true
    python -m sample.sweep 'guide=[aesthetic, "clip:cutouts=4"]' 'scale=[1, 2]' --recommend  # when that has finished

Every option that says "axis" takes one value or a list; each combination is a cell, an arm of its own with the same
prompts, seeds and initial noise as all others.  The same command goes on where a killed one stopped, to the same bytes;
further values of an axis add cells to the folder.  Several processes share the work, unit by unit:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m sample.sweep 'scale=[1, 2]'     # two cores
    accelerate launch --num_processes 8 sample/sweep.py 'scale=[1, 2]'               # eight GPUs (untested)
    python -m sample.sweep 'scale=[1, 2]' output=/shared/sweep --join                # one more machine, at any time

docs/sweeps.md says more: several nodes, Slurm, what happens when a process dies, choosing a scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guidance.utils.config import option, parse_config_and_args
from guidance.utils.errors import UserError, friendly_errors

if TYPE_CHECKING:
    from guidance.runs.arms import Arm
    from guidance.runs.run import Job
    from guidance.runs.sweep import ArmBuilder
    from guidance.runs.sweep_folder import SweepPlan

#: Options that decide which cells there are, or how they are made: no image depends on them.
INCIDENTAL = ("combine", "baseline", "cfg_matched", "cfg_scales_matched", "batch_size", "grid_rows")
INCIDENTAL_TOO = ("tracker", "output", "fresh", "join", "stalled_after", "metric", "limit", "evaluate")
PLACEMENT = ("model", "revision", "device", "dtype")
HEAD_OPTIONS = ("objective", "target", "normalize", "every", "space")


@dataclasses.dataclass
class SweepConfig:
    """Options of this script."""

    scale: Any = option([0.5, 1.0, 2.0], "axis: guidance scales; negative ones push away, 0 is unguided")
    guide: Any = option(None, "axis: guides NAME:key=value,... instead of the head; [[a, b]]: together")
    head: Any = option("runs/heads/testbed-aesthetic", "axis: folders of heads; null with scale=0 or guide")
    start: Any = option(None, "axis: fraction of the steps where guidance begins; null: the head's")
    stop: Any = option(None, "axis: fraction of the steps where guidance ends; null: the head's")
    cfg_scale: Any = option(4.0, "axis: classifier-free guidance weight; 1 is off")
    num_steps: Any = option(25, "axis: sampling steps")
    scheduler: Any = option("ddim", "axis: ddim, dpm++, euler or ddpm; null: the model's own")
    strength: Any = option(0.6, "axis, with edits: fraction of the steps taken, 1 forgets the image")
    combine: Literal["product", "zip"] = option("product", "axes: each with each, or first with first")
    baseline: bool = option(True, "add the unguided cell of each cfg_scale, num_steps and scheduler")
    cfg_matched: bool = option(False, "add plain cells of more CFG, to compare guidance with")
    cfg_scales_matched: list[float] = option([], "their weights; empty: four up to thrice cfg_scale")
    prompts: Any = option("testbed", "a named set (testbed, parti, coco, ...), a file, or a list of texts")
    num_prompts: int | None = option(8, "prompts to take of a set or file; null for all")
    edits: str | None = option(None, "edit pairs (testbed:test, a file) instead of prompts: images to change")
    category: Any = option(None, "category or challenge to take prompts of, or a list of them; null for all")
    seeds_per_prompt: int = option(1, "images per prompt and cell; draw j of prompt i has seed + 1000 i + j")
    seed: int = option(0, "first seed, and choice of the prompts")
    objective: str | None = option(None, "expected, at_least, class, regression, binary; null: the head's")
    target: str | None = option(None, "label or threshold of the objective, where it needs one")
    normalize: str | None = option("cfg", "cfg: portable scale; null: raw gradient")
    every: int = option(1, "take a gradient each so many steps")
    space: Literal["eps", "x"] = option("eps", "what is shifted: the prediction or the latents")
    model: str = option("testbed", "diffusers pipeline: testbed, a folder or a hub id")
    revision: str | None = option(None, "branch, tag or commit of the model on the hub")
    device: str | None = option(None, "cpu, cuda, mps; null picks the best there is")
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "precision of the model")
    batch_size: Any = option("auto", "images at once; auto: what fits, halved when memory is out")
    grid_rows: int = option(12, "prompts in the grid")
    tracker: Literal["none", "wandb", "tensorboard"] = option("none", "wandb is offline without account")
    output: str | None = option(None, "folder; null: runs/sweeps/NAME, by the options but the axes")
    fresh: bool = option(False, "move an existing output folder aside instead of continuing it; also --fresh")
    join: bool = option(False, "help a sweep that another launch is running in the folder; also --join")
    stalled_after: float = option(60.0, "seconds without a heartbeat after which units are redone")
    metric: str | None = option(None, "what --recommend maximises; null: truth, else the CLIP score")
    limit: list[str] = option(
        ["fd<=1.5x"], "for --recommend: fd<=1.5x of the baseline's, object>=-0.02 from it"
    )
    evaluate: list[str] = option([], "for --recommend: words of eval.images, clip=..., reference=FOLDER, ...")

    def __post_init__(self) -> None:
        texts = isinstance(self.prompts, list) and all(isinstance(text, str) for text in self.prompts)
        if not (texts or isinstance(self.prompts, str)):
            raise UserError(f"Expected prompts as a set, a file or a list of texts, got {self.prompts!r}.")
        whole = isinstance(self.batch_size, int) and not isinstance(self.batch_size, bool)
        if self.batch_size != "auto" and not (whole and self.batch_size >= 1):
            raise UserError(f"Expected a batch_size of at least 1 or auto, got {self.batch_size!r}.")
        if self.cfg_scales_matched and not self.cfg_matched:
            raise UserError(
                "Expected cfg_matched=true with cfg_scales_matched, got false; set it, or leave both out."
            )


def run_sweep(config: SweepConfig, *, progress: bool = True) -> Path:
    """Fill the grid; processes of one launch, and launches that join, share the work.

    Args:
        config: What to sample.
        progress: Show what is done, and a bar over the work of all processes.

    Returns:
        The folder: ``images/CELL/*.png``, ``records*.jsonl``, ``grid.png``, ``sheets/PROMPT.png``, ``config.yaml``.

    Raises:
        UserError: If something in the config cannot be used, or the folder is another's.
    """
    from guidance.models.pipelines import load_on
    from guidance.runs.run import check_sampling
    from guidance.runs.sweep_folder import check_free, together, working_in
    from guidance.runs.sweep_run import fill_sweep, lay_out
    from guidance.runs.sweep_tracking import SweepTracking
    from guidance.utils.processes import join_processes

    state = join_processes()
    progress = progress and state.is_main_process
    # everything that can be wrong is checked before the first file is written
    plan, jobs = _plan(config)
    if not config.join:
        together(state, lambda: check_free(plan, stalled_after=config.stalled_after))
    arms = _arms(config, plan)[1]
    tracking = SweepTracking(config.tracker if state.is_main_process else "none", plan.folder)
    _say(progress, f"Loading {config.model} ...")
    pipe = load_on(state, **{k: getattr(config, k) for k in PLACEMENT})
    for cell in plan.cells:
        options: dict[str, Any] = {"num_steps": cell.num_steps, "scheduler": cell.scheduler}
        check_sampling(pipe, [arms[cell.name]], **options, batch_size=1)
    entering: dict[str, Any] = {k: getattr(config, k) for k in ("fresh", "join", "stalled_after")}
    with working_in(plan, state, **entering, say=lambda text: _say(progress, text)) as claims:
        tracking.start(dataclasses.asdict(config))
        _say(progress, f"{len(jobs)} noises x {len(arms)} cells on {pipe.unet.device} into {plan.folder}")
        shared: dict[str, Any] = {
            "model": config.model,
            "auto": config.batch_size == "auto",
            "progress": progress,
        }
        fill_sweep(pipe, plan, jobs, arms, claims, state, **shared, log=tracking.log)
        if state.is_main_process:
            tracking.finish(lay_out(plan.folder, jobs, plan.cells, max_rows=config.grid_rows), plan.cells)
    return plan.folder


def describe_sweep(config: SweepConfig) -> str:
    """The plan of a sweep: cells, images, network calls, time and disk; nothing is written."""
    from guidance.models.pipelines import load_on
    from guidance.runs.records import RecordStore
    from guidance.runs.sweep_estimate import count_costs, describe_plan, speed_from_batch, speed_from_records
    from guidance.utils.processes import join_processes

    plan, jobs = _plan(config)
    builder, arms = _arms(config, plan)
    store = None if plan.made is None else RecordStore(plan.folder)
    costs = count_costs(plan.cells, arms, jobs, store)
    speed, where = speed_from_records(costs, store), "the same machine"
    if speed is None:
        pipe = load_on(join_processes(), **{k: getattr(config, k) for k in PLACEMENT})
        size = config.batch_size if config.batch_size != "auto" else 16
        speed, where = speed_from_batch(pipe, costs, builder, jobs, size), str(pipe.unet.device)
    specs = {spec.method: spec for cell in plan.cells for spec in builder.specs(cell)}
    floors = [f"one of {name} costs {spec.price}" for name, spec in specs.items()]
    return describe_plan(costs, speed, floors, where=where, folder=plan.folder, noises=len(jobs))


def recommend(config: SweepConfig) -> None:
    """Evaluate a finished sweep, where that has not been done, and print which cell is best within the limits."""
    from guidance.runs.sweep import varied_fields
    from guidance.runs.sweep_folder import require_finished
    from guidance.utils.processes import run_script

    plan, jobs = _plan(config)
    require_finished(plan, jobs)
    baseline = plan.cells[0].name  # unguided cells come first
    words = [str(plan.folder), f"baseline={baseline}", f"vary={json.dumps(varied_fields(plan.cells))}"]
    run_script("eval.images", [*words, *config.evaluate])
    chosen = [f"metric={config.metric}"] if config.metric else []
    run_script("eval.recommend", [str(plan.folder), *chosen, f"limit={json.dumps(config.limit)}"])


def _plan(config: SweepConfig) -> tuple[SweepPlan, list[Job]]:
    from guidance.runs.run import read_jobs
    from guidance.runs.sweep import AXES, matched_scales, read_axes
    from guidance.runs.sweep_folder import plan_sweep

    told = [getattr(config, k) for k in ("prompts", "num_prompts", "seeds_per_prompt", "seed")]
    jobs = read_jobs(*told, category=config.category, edits=config.edits)
    axes = read_axes({name: getattr(config, name) for name in AXES})
    if len(axes["strength"]) > 1 and config.edits is None:
        raise UserError("Expected edits with several strengths, got none; set edits=testbed:test or a file.")
    if any(axes["guide"]):  # guides stand instead of the head
        if len(axes["head"]) > 1:
            raise UserError(
                "Expected guide or several heads, got both; write heads as guides: midblock:head=FOLDER."
            )
        axes["head"] = [None]
    matched = config.cfg_scales_matched or matched_scales(min(axes["cfg_scale"]))
    options: dict[str, Any] = {"combine": config.combine, "baseline": config.baseline, "fresh": config.fresh}
    options |= {"matched": matched if config.cfg_matched else ()}
    options |= {"batch_size": None if config.batch_size == "auto" else config.batch_size}
    plan = plan_sweep(config.output or default_output(config), _settings(config), axes, **options)
    return plan, jobs


def _arms(config: SweepConfig, plan: SweepPlan) -> tuple[ArmBuilder, dict[str, Arm]]:
    from guidance.runs.sweep import ArmBuilder

    builder = ArmBuilder({name: getattr(config, name) for name in HEAD_OPTIONS})
    return builder, {cell.name: builder.build(cell) for cell in plan.cells}


def _settings(config: SweepConfig) -> dict[str, Any]:
    """What the folder remembers beside its cells."""
    from guidance.runs.sweep import AXES

    return {
        k: v for k, v in dataclasses.asdict(config).items() if k not in (*AXES, *INCIDENTAL, *INCIDENTAL_TOO)
    }


def default_output(config: SweepConfig) -> Path:
    """Name a folder after the prompts and a hash of the options that are the same for all cells."""
    first = config.prompts if isinstance(config.prompts, str) else config.prompts[0]
    stem = Path(first).stem if isinstance(config.prompts, str) else first
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-") or "prompts"
    digest = hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode()).hexdigest()[:6]
    return Path("runs/sweeps") / f"{name}-{digest}"


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, flush=True)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    plan = "print the plan with images, network calls, estimated time and disk, and stop"
    chosen = "evaluate a finished sweep and say which cell is best within the limits"
    texts = {
        "--dry-run": plan,
        "--recommend": chosen,
        "--fresh": "same as fresh=true",
        "--join": "same as join=true",
    }
    for flag, text in texts.items():
        parser.add_argument(flag, action="store_true", help=text)


@friendly_errors("sample/sweep.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    config, flags = parse_config_and_args(
        SweepConfig,
        argv,
        prog="python -m sample.sweep",
        description=__doc__ or "",
        default_config="configs/sweep/testbed.yaml",
        extra=_add_flags,
    )
    config = dataclasses.replace(config, fresh=config.fresh or flags.fresh, join=config.join or flags.join)
    from guidance.runs.folder import GRID_FILE, SHEETS_FOLDER, load_settings, summarise
    from guidance.runs.records import RecordStore
    from guidance.utils.processes import join_processes, leave_processes

    state = join_processes()
    if flags.dry_run or flags.recommend:
        if state.is_main_process:
            print(describe_sweep(config)) if flags.dry_run else recommend(config)
    else:
        folder = run_sweep(config)
        if state.is_main_process:
            order = {cell["name"]: i for i, cell in enumerate((load_settings(folder) or {})["cells"])}
            records = sorted(RecordStore(folder).load(), key=lambda r: order.get(r.arm, len(order)))
            print(f"\n{summarise(records)}\n\ngrid: {folder / GRID_FILE}\nsheets: {folder / SHEETS_FOLDER}")
            print("to evaluate and choose: the same command with --recommend")
    leave_processes(state)


if __name__ == "__main__":
    main()
