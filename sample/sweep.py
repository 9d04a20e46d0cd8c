"""Sweep: sample the same prompts and noises in every cell of a grid of guidance scales and other options.

    python -m sample.sweep 'scale=[-1, 0.5, 1, 2]'                          # and unguided, which baseline=true adds
    python -m sample.sweep 'scale=[1, 2]' 'num_steps=[15, 25]' --dry-run    # the plan: images, calls, time, disk
    python -m sample.sweep 'scale=[1, 2]' 'start=[0, 0.2]' combine=zip      # two cells beside the baseline, not four
    python -m sample.sweep 'guide=[aesthetic, "clip:cutouts=4"]' 'scale=[1, 2]' cfg_matched=true
    python -m sample.sweep 'guide=[aesthetic, "clip:cutouts=4"]' 'scale=[1, 2]' --recommend  # when that has finished

Every option called "axis" takes one value or a list; each combination is a cell, an arm with the same prompts,
seeds and initial noise as all others.  The same command resumes a sweep that was killed, to the same bytes; further
values of an axis add cells to the folder.  Several processes share the work, unit by unit:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m sample.sweep 'scale=[1, 2]'     # two cores
    accelerate launch --num_processes 8 sample/sweep.py 'scale=[1, 2]'               # eight GPUs (untested)
    python -m sample.sweep 'scale=[1, 2]' output=/shared/sweep --join                # one more machine, at any time

See docs/sweeps.md for several nodes, Slurm, processes that die, and choosing a scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guidance.runs.options import SamplingOptions
from guidance.utils.config import incidental_options, option, parse_config_and_args
from guidance.utils.errors import UserError, friendly_errors

if TYPE_CHECKING:
    from guidance.runs.run import Job
    from guidance.runs.sweep_folder import SweepPlan


@dataclasses.dataclass
class SweepConfig(SamplingOptions):
    """Options of this script; a folder accepts further values of the axes and of options with ``identity=False``."""

    scale: Any = option([0.5, 1.0, 2.0], "axis: guidance scales; negative ones push away, 0 is unguided")
    guide: Any = option(None, "axis: guides NAME:key=value,... instead of the head; [[a, b]]: together")
    head: Any = option("runs/heads/testbed-aesthetic", "axis: folders of heads; null with scale=0 or guide")
    start: Any = option(None, "axis: fraction of the steps where guidance begins; null: the head's")
    stop: Any = option(None, "axis: fraction of the steps where guidance ends; null: the head's")
    cfg_scale: Any = option(4.0, "axis: classifier-free guidance weight; 1 is off, 0 unconditional")
    num_steps: Any = option(25, "axis: sampling steps")
    scheduler: Any = option("ddim", "axis: ddim, dpm++, euler, heun ... or a class of diffusers; null: own")
    strength: Any = option(0.6, "axis, with edits: fraction of the steps taken, 1 forgets the image")
    combine: Literal["product", "zip"] = option("product", "axes: all pairs, or one by one", identity=False)
    baseline: bool = option(True, "add the unguided cell of each way of sampling", identity=False)
    cfg_matched: bool = option(False, "add plain cells of more CFG to compare guidance with", identity=False)
    cfg_scales_matched: list[float] = option([], "their weights; empty: four by cfg_scale", identity=False)
    batch_size: Any = option("auto", "images at once; auto: as many as fit in memory", identity=False)
    tracker: Literal["none", "wandb", "tensorboard"] = option("none", "where to log", identity=False)
    join: bool = option(False, "help a sweep that is running in the folder; also --join", identity=False)
    stalled_after: float = option(60.0, "seconds without heartbeat until units are redone", identity=False)
    metric: str | None = option(None, "for --recommend; null: truth, else the CLIP score", identity=False)
    limit: list[str] = option(["fd<=1.5x"], "for --recommend, e.g. object>=-0.02", identity=False)
    evaluate: list[str] = option([], "for --recommend: options of eval.images", identity=False)

    def __post_init__(self) -> None:
        is_int = isinstance(self.batch_size, int) and not isinstance(self.batch_size, bool)
        if self.batch_size != "auto" and not (is_int and self.batch_size >= 1):
            raise UserError(f"Expected a batch_size of at least 1 or auto, got {self.batch_size!r}.")
        if self.cfg_scales_matched and not self.cfg_matched:
            raise UserError("Expected cfg_matched=true with cfg_scales_matched, got false; set it, or leave both out.")


def run_sweep(config: SweepConfig, *, progress: bool = True) -> Path:
    """Fill the grid; the processes of one launch, and launches that join, share the work.

    Args:
        config: What to sample.
        progress: Report what is done, and show a bar over the work of all processes.

    Returns:
        The folder: ``images/CELL/*.png``, ``records*.jsonl``, ``grid.png``, ``sheets/PROMPT.png``, ``config.yaml``.

    Raises:
        UserError: If something in the config cannot be used, or the folder belongs to another sweep.
    """
    from guidance.runs.run import check_sampling
    from guidance.runs.sweep import ArmBuilder
    from guidance.runs.sweep_folder import check_free, together, working_in
    from guidance.runs.sweep_run import fill_sweep, lay_out
    from guidance.runs.sweep_tracking import SweepTracking
    from guidance.utils.processes import join_processes

    state = join_processes()
    progress = progress and state.is_main_process

    def report(text: str) -> None:
        if progress:
            print(text, flush=True)

    # everything that can be wrong is checked before the first file is written
    plan, jobs = _plan(config)
    if not config.join:
        together(state, lambda: check_free(plan, stalled_after=config.stalled_after))
    builder = ArmBuilder(config.head_guide())
    arms = {cell.name: builder.build(cell) for cell in plan.cells}
    tracking = SweepTracking(config.tracker if state.is_main_process else "none", plan.folder)
    report(f"Loading {config.model} ...")
    pipe = config.load_pipeline()
    for cell in plan.cells:
        check_sampling(pipe, [arms[cell.name]], cell.sampling)
    entry = {"fresh": config.fresh, "join": config.join}
    with working_in(plan, state, stalled_after=config.stalled_after, report=report, **entry) as claims:
        tracking.start(dataclasses.asdict(config))
        report(f"{len(arms)} cells of {len(jobs)} images on {pipe.unet.device} into {plan.folder}")
        fill_sweep(
            pipe,
            plan,
            jobs,
            arms,
            claims,
            state,
            model=config.model,
            auto=config.batch_size == "auto",
            progress=progress,
            log=tracking.log,
        )
        if state.is_main_process:
            tracking.finish(lay_out(plan.folder, jobs, plan.cells, max_rows=config.grid_rows), plan.cells)
    return plan.folder


def describe_sweep(config: SweepConfig) -> str:
    """Describe the plan of a sweep: cells, images, network calls, time and disk; nothing is written."""
    from guidance.runs.records import RecordStore
    from guidance.runs.sweep import ArmBuilder
    from guidance.runs.sweep_estimate import count_costs, describe_plan, speed_from_batch, speed_from_records

    plan, jobs = _plan(config)
    builder = ArmBuilder(config.head_guide())
    arms = {cell.name: builder.build(cell) for cell in plan.cells}
    store = None if plan.previous is None else RecordStore(plan.folder)
    costs = count_costs(plan.cells, arms, jobs, store)
    speed, where = speed_from_records(costs, store), "the same machine"
    if speed is None:
        pipe = config.load_pipeline()
        size = config.batch_size if config.batch_size != "auto" else 16
        speed, where = speed_from_batch(pipe, costs, builder, jobs, size), str(pipe.unet.device)
    guides = {guide.method: guide for cell in plan.cells for guide in builder.guides(cell)}
    prices = [f"one of {name} costs {guide.price}" for name, guide in guides.items()]
    return describe_plan(costs, speed, prices, where=where, folder=plan.folder, noises=len(jobs))


def recommend(config: SweepConfig) -> None:
    """Evaluate a finished sweep, unless that has been done, and print the best cell within the limits."""
    from guidance.runs.sweep import varied_fields
    from guidance.runs.sweep_folder import require_finished
    from guidance.utils.processes import run_script

    plan, jobs = _plan(config)
    require_finished(plan, jobs)
    baseline = plan.cells[0].name  # unguided cells come first
    words = [str(plan.folder), f"baseline={baseline}", f"vary={json.dumps(varied_fields(plan.cells))}"]
    run_script("eval.images", [*words, *config.evaluate])
    metric = [f"metric={config.metric}"] if config.metric else []
    run_script("eval.recommend", [str(plan.folder), *metric, f"limit={json.dumps(config.limit)}"])


def _plan(config: SweepConfig) -> tuple[SweepPlan, list[Job]]:
    from guidance.runs.sweep import AXES, matched_scales, read_axes
    from guidance.runs.sweep_folder import plan_sweep

    jobs = config.read_jobs()
    axes = read_axes({name: getattr(config, name) for name in AXES})
    if len(axes["strength"]) > 1 and config.edits is None:
        raise UserError("Expected edits with several strengths, got none; set edits=testbed:test or a file.")
    if any(axes["guide"]):  # guides take the place of the head
        if len(axes["head"]) > 1:
            raise UserError("Expected guide or several heads, got both; write heads as guides: midblock:head=FOLDER.")
        axes["head"] = [None]
    matched = config.cfg_scales_matched or matched_scales(min(axes["cfg_scale"]))
    plan = plan_sweep(
        config.output or default_output(config),
        _settings(config),
        axes,
        combine=config.combine,
        baseline=config.baseline,
        matched=matched if config.cfg_matched else (),
        batch_size=None if config.batch_size == "auto" else config.batch_size,
        fresh=config.fresh,
    )
    return plan, jobs


def _settings(config: SweepConfig) -> dict[str, Any]:
    """Return the options that the folder records besides its cells, which hold the axes."""
    from guidance.runs.sweep import AXES

    omitted = {*AXES, *incidental_options(SweepConfig)}
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in omitted}


def default_output(config: SweepConfig) -> Path:
    """Name a folder after the prompts and a hash of the options that all cells share."""
    from guidance.runs.folder import folder_name

    return Path("runs/sweeps") / folder_name(config.prompts, _settings(config))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    texts = {
        "--dry-run": "print the plan with images, network calls, estimated time and disk, and stop",
        "--recommend": "evaluate a finished sweep and name the best cell within the limits",
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
