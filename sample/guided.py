"""Sample guided and unguided images of the same prompts from the same noise.

    python -m sample.guided "a red balloon over the sea at dusk"
    python -m sample.guided prompts=parti.tsv num_prompts=32 'scales=[-1, 0.5, 1]' seeds_per_prompt=4
    python -m sample.guided "a castle" --model stabilityai/stable-diffusion-2-1-base --head runs/heads/sac

    accelerate launch --num_processes 8 sample/guided.py prompts=parti.tsv        # the same images by 8 GPUs
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m sample.guided prompts=testbed # or by two cores

The same command resumes a run that was killed, with any number of processes, and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guidance.runs.options import SamplingOptions
from guidance.utils.config import incidental_options, option, parse_config_and_args
from guidance.utils.errors import UserError, friendly_errors

if TYPE_CHECKING:
    from guidance.guides.base import Guide
    from guidance.runs.arms import Arm, Steering
    from guidance.runs.run import Sampling


@dataclasses.dataclass
class GuidedConfig(SamplingOptions):
    """Options of this script; those with ``identity=False`` may differ when a folder is continued."""

    strength: float = option(0.6, "with edits: fraction of the steps taken, 1 forgets the image")
    scales: list[float] = option([1.0], "guidance scales; 0, unguided, is always sampled too", identity=False)
    head: str | None = option("runs/heads/testbed-aesthetic", "folder of the head; null with scales=[0]")
    guides: list[str] = option([], "guides instead of the head: NAME:key=value,... or a file; see --explain")
    start: float | None = option(None, "fraction of the steps where guidance begins; null: the head's")
    stop: float | None = option(None, "fraction of the steps where guidance ends; null: the head's")
    scheduler: str | None = option(
        "ddim", "ddim, dpm++, euler, heun ... or a class of diffusers; null: the model's own"
    )
    num_steps: int = option(25, "sampling steps")
    cfg_scale: float = option(4.0, "classifier-free guidance weight; 1 is off, 0 unconditional")
    cfg_rescale: float = option(0.0, "pull the deviation back to the conditional one; 0 is off, 0.7 usual")
    cfg_start: float = option(0.0, "fraction of the steps where classifier-free guidance begins")
    cfg_stop: float = option(1.0, "fraction of the steps where it ends")
    cfg_modulate: str | None = option(None, "a guide (as in guides) whose probability lowers cfg_scale")
    particles: int = option(1, "particles per image, steered by the first guide's score; 1 does not steer")
    potential: Literal["diff", "max", "sum"] = option("diff", "how their scores steer the particles")
    lam: float = option(2.0, "inverse temperature of steering; 0: the best of the particles is kept")
    eta: float = option(1.0, "noise of DDIM's steps with particles, without which copies stay equal")
    batch_size: int = option(16, "images per batch", identity=False)

    def read_guides(self) -> list[Guide]:
        """Return the guides that are named, or else the head with the options beside it."""
        from guidance.guides.registry import read_guide

        if self.guides:
            return [read_guide(text) for text in self.guides]
        return [self.head_guide(head=self.head or "", start=self.start, stop=self.stop)]

    def build_arms(self, scales: Sequence[float]) -> list[Arm]:
        """Build the unguided arm and one per other scale; with particles also those that are steered."""
        from guidance.runs.arms import guide_arms, missing_head, steered_arms

        if not self.guides and self.head is None and scales != [0]:
            raise missing_head(scales[1])
        if self.particles < 1:
            raise UserError(f"Expected particles of at least 1, got {self.particles}; 1 does not steer.")
        arms = guide_arms(self.read_guides(), scales)
        if self.particles == 1:
            return arms
        if len(arms) == 1:
            raise UserError("Expected a scale other than 0 with particles, whose guide steers them, got scales=[0].")
        return steered_arms(arms, self._steering(arms[1]))

    def _steering(self, arm: Arm) -> Steering:
        from guidance.guides.base import ScoringGuide
        from guidance.runs.arms import Steering

        guide = arm.guides[0]
        if not isinstance(guide, ScoringGuide):
            raise UserError(f"Expected a first guide with a score, by which particles are steered, got '{guide.name}'.")
        steering = Steering(guide, self.particles, self.potential, self.lam, eta=self.eta)
        return dataclasses.replace(steering, threshold=0.0) if self.lam == 0 else steering

    def build_sampling(self) -> Sampling:
        """Build the options of the sampler."""
        from guidance.guides.base import ScoringGuide
        from guidance.guides.registry import read_guide
        from guidance.runs.run import Sampling
        from guidance.sampling.cfg import ClassifierFree

        modulate = None if self.cfg_modulate is None else read_guide(self.cfg_modulate)
        if not (modulate is None or isinstance(modulate, ScoringGuide)):
            raise UserError(f"Expected a guide with a score in cfg_modulate, got '{self.cfg_modulate}'.")
        cfg = ClassifierFree(self.cfg_scale, self.cfg_rescale, self.cfg_start, self.cfg_stop, modulate)
        return Sampling(self.num_steps, cfg, self.scheduler, self.strength)


def sample_guided(config: GuidedConfig, *, progress: bool = True) -> Path:
    """Sample every prompt and seed without guidance and at every scale, from the same noise.

    Processes that ``accelerate launch`` started share the work.

    Args:
        config: What to sample.
        progress: Report what is done, and show a bar with images per second.

    Returns:
        The folder, with ``images/ARM/*.png``, ``records.jsonl``, ``grid.png`` and ``config.yaml``.

    Raises:
        UserError: If something in the config cannot be used, or the folder was made with another config.
    """
    from guidance.runs.arms import list_scales
    from guidance.runs.folder import move_aside, read_settings, write_grid, write_settings
    from guidance.runs.records import RecordStore
    from guidance.runs.run import check_sampling, sample_arms
    from guidance.utils.processes import join_processes

    state = join_processes()
    progress = progress and state.is_main_process
    # everything that can be wrong is checked before the first file is written
    scales = list_scales(config.scales)
    jobs = config.read_jobs()
    folder = Path(config.output or default_output(config))
    incidental = incidental_options(GuidedConfig)
    previous = None if config.fresh else read_settings(folder, _settings(config), free=incidental)
    scales = list_scales([*previous["scales"], *scales]) if previous else scales
    sampling, arms = config.build_sampling(), config.build_arms(scales)
    _report(progress, f"Loading {config.model} ...")
    pipe = config.load_pipeline()
    check_sampling(pipe, arms, sampling, config.batch_size)

    if state.is_main_process:
        if config.fresh and (aside := move_aside(folder)):
            _report(progress, f"Moved {folder} to {aside}.")
        write_settings(folder, _settings(config) | {"scales": scales})
    state.wait_for_everyone()
    store = RecordStore(folder, state.process_index)
    _report(progress, f"{len(arms)} arms of {len(jobs)} images on {pipe.unet.device} into {folder}")
    sample_arms(
        pipe,
        jobs,
        arms,
        store,
        sampling,
        model=config.model,
        batch_size=config.batch_size,
        process_index=state.process_index,
        num_processes=state.num_processes,
        progress=progress,
    )
    state.wait_for_everyone()
    if state.is_main_process:
        store, order = RecordStore(folder), {job.prompt.id: i for i, job in enumerate(jobs)}
        records = sorted(store.load(), key=lambda r: (order.get(r.prompt_id, len(order)), r.seed))
        write_grid(store, records, [arm.name for arm in arms], max_rows=config.grid_rows)
    return folder


def default_output(config: GuidedConfig) -> Path:
    """Name a folder after the prompts and a hash of the options on which the images depend."""
    from guidance.runs.folder import folder_name

    incidental = incidental_options(GuidedConfig)
    identity = {key: value for key, value in _settings(config).items() if key not in incidental}
    return Path("runs/samples") / folder_name(config.prompts, identity)


def _settings(config: GuidedConfig) -> dict[str, Any]:
    """Return the options that the folder records: all but where it is and how it was opened."""
    omitted = {"output", "fresh"}
    # folders made before these options existed keep their name and config
    omitted |= set() if config.category else {"category"}
    omitted |= set() if config.edits else {"edits", "strength"}
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in omitted}


def _report(progress: bool, text: str) -> None:
    if progress:
        print(text, flush=True)


def _is_override(word: str) -> bool:
    """Tell ``key=value`` from a prompt with an equals sign: several words behind a key that is like none there is."""
    key = re.match(r"([\w.]+)=", word)
    known = {field.name for field in dataclasses.fields(GuidedConfig)}
    return key is not None and (" " not in word or bool(difflib.get_close_matches(key[1], known, 1, cutoff=0.8)))


def read_words(argv: Sequence[str]) -> list[str]:
    """Turn words without a key into the option `prompts`, and ``--name value`` of an option into an override.

    >>> read_words(["a red boat", "--head", "my/head", "seed=1"])
    ['head=my/head', 'seed=1', 'prompts=["a red boat"]']
    """
    words, options, texts, guides = iter(argv), [], [], []
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name not in ("config", "print-config", "help", "explain"):
            value = value if equals else next(words, "")
            if not value:
                raise UserError(f"Expected a value after '{word}', got none.")
            if name == "guide":
                guides.append(value)
                continue
            options.append(f"{name.replace('-', '_')}={value}")
        elif word == "--config":
            options += [word, *itertools.islice(words, 1)]
        elif word.startswith("-") or _is_override(word):
            options.append(word)
        elif len(word) < 200 and Path(word).is_file():
            raise UserError(f"Expected a prompt, got the file '{word}'; write prompts={word} to read it.")
        else:
            texts.append(word)
    # YAML reads this JSON as it is
    lists = {"prompts": texts, "guides": guides}
    return options + [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in lists.items() if value]


def _explain(config: GuidedConfig) -> str:
    from guidance.guides.registry import explain

    scales = ", ".join(f"{s:g}" for s in config.scales)
    scheduler = config.scheduler or "the model's scheduler"
    return (
        f"{config.num_steps} steps of {scheduler}, CFG {config.cfg_scale:g}, "
        f"unguided and at scale {scales}, multiplied by each guide's guidance_scale:\n"
        f"{explain(config.read_guides(), config.num_steps)}"
    )


@friendly_errors("sample/guided.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    config, arguments = parse_config_and_args(
        GuidedConfig,
        read_words(sys.argv[1:] if argv is None else argv),
        prog="python -m sample.guided",
        description="Sample guided and unguided images from the same noise. Words without '=' are prompts; "
        "--NAME VALUE works for every option, and --guide can be given several times.",
        default_config="configs/sample/testbed.yaml",
        extra=lambda parser: parser.add_argument(
            "--explain", action="store_true", help="describe what each guide reads and costs, and stop"
        ),
    )
    if arguments.explain:
        print(_explain(config))
        return
    folder = sample_guided(config)
    from guidance.runs.folder import GRID_FILE, summarise
    from guidance.runs.records import RecordStore
    from guidance.utils.processes import join_processes, leave_processes

    state = join_processes()
    if state.is_main_process:
        print(f"\n{summarise(RecordStore(folder).load())}\n\ngrid: {folder / GRID_FILE}")
    leave_processes(state)


if __name__ == "__main__":
    main()
