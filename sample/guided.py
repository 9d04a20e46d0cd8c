"""Sample guided and unguided images of the same prompts from the same noise.

    python -m sample.guided "a red balloon over the sea at dusk"
    python -m sample.guided prompts=parti.tsv num_prompts=32 'scales=[-1, 0.5, 1]' seeds_per_prompt=4
    python -m sample.guided "a castle" --model stabilityai/stable-diffusion-2-1-base --head runs/heads/sac

    accelerate launch --num_processes 8 sample/guided.py prompts=parti.tsv        # the same images by 8 GPUs
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m sample.guided prompts=testbed # or by two cores

Goes on where a killed run stopped when the same command is given again, to the same bytes and with any number of
processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guidance.utils.config import option, parse_config_and_args
from guidance.utils.errors import UserError, friendly_errors

if TYPE_CHECKING:
    from guidance.runs.arms import Arm
    from guidance.sampling.cfg import ClassifierFree

#: Options that may change when a folder is continued: no image depends on them; new scales are added.
FREE = ("scales", "batch_size", "grid_rows")


@dataclasses.dataclass
class GuidedConfig:
    """Options of this script."""

    prompts: Any = option("testbed", "a named set (testbed, parti, coco, ...), a file, or a list of texts")
    num_prompts: int | None = option(8, "prompts to take of a set or file; null for all")
    category: Any = option(None, "category or challenge to take prompts of, or a list of them; null for all")
    edits: str | None = option(None, "edit pairs (testbed:test, a file) instead of prompts: images to change")
    strength: float = option(0.6, "with edits: fraction of the steps taken, 1 forgets the image")
    seeds_per_prompt: int = option(1, "images per prompt and arm; draw j of prompt i has seed + 1000 i + j")
    seed: int = option(0, "first seed, and choice of the prompts")
    scales: list[float] = option([1.0], "guidance scales; 0, unguided, is always sampled too")
    head: str | None = option("runs/heads/testbed-aesthetic", "folder of the head; null with scales=[0]")
    guides: list[str] = option([], "guides instead of the head: NAME:key=value,... or a file; see --explain")
    objective: str | None = option(None, "expected, at_least, class, regression, binary; null: the head's")
    target: str | None = option(None, "label or threshold of the objective, where it needs one")
    normalize: str | None = option("cfg", "cfg: portable scale; null: raw gradient")
    start: float | None = option(None, "fraction of the steps where guidance begins; null: the head's")
    stop: float | None = option(None, "fraction of the steps where guidance ends; null: the head's")
    every: int = option(1, "take a gradient each so many steps")
    space: Literal["eps", "x"] = option("eps", "what is shifted: the prediction or the latents")
    model: str = option("testbed", "diffusers pipeline: testbed, a folder or a hub id")
    revision: str | None = option(None, "branch, tag or commit of the model on the hub")
    scheduler: str | None = option("ddim", "ddim, dpm++, euler or ddpm; null: the model's own")
    num_steps: int = option(25, "sampling steps")
    cfg_scale: float = option(4.0, "classifier-free guidance weight; 1 is off")
    cfg_rescale: float = option(0.0, "pull the deviation back to the conditional one; 0 is off, 0.7 usual")
    cfg_start: float = option(0.0, "fraction of the steps where classifier-free guidance begins")
    cfg_stop: float = option(1.0, "fraction of the steps where it ends")
    cfg_modulate: str | None = option(None, "a guide (as guides) whose probability turns cfg_scale down")
    particles: int = option(1, "particles an image, steered by the first guide's score; 1 does not steer")
    potential: Literal["diff", "max", "sum"] = option("diff", "what of their scores steers the particles")
    lam: float = option(2.0, "inverse temperature of steering; 0: the best of the particles is kept")
    eta: float = option(1.0, "noise of DDIM's steps with particles, without which copies stay equal")
    batch_size: int = option(16, "images per batch")
    device: str | None = option(None, "cpu, cuda, mps; null picks the best there is")
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "precision of the model")
    grid_rows: int = option(12, "prompts in the grid")
    output: str | None = option(None, "folder; null: runs/samples/NAME, a name made of the options")
    fresh: bool = option(False, "move an existing output folder aside instead of continuing it")

    def __post_init__(self) -> None:
        texts = isinstance(self.prompts, list) and all(isinstance(text, str) for text in self.prompts)
        if not (texts or isinstance(self.prompts, str)):
            raise UserError(f"Expected prompts as a set, a file or a list of texts, got {self.prompts!r}.")
        names = self.category if isinstance(self.category, list) else [self.category or ""]
        if not all(isinstance(name, str) for name in names):
            raise UserError(f"Expected a category or a list of categories, got {self.category!r}.")


def sample_guided(config: GuidedConfig, *, progress: bool = True) -> Path:
    """Sample every prompt and seed without guidance and at every scale, from the same noise.

    Processes that ``accelerate launch`` started share the work.

    Args:
        config: What to sample.
        progress: Show what is done, and a bar with images per second.

    Returns:
        The folder, with ``images/ARM/*.png``, ``records.jsonl``, ``grid.png`` and ``config.yaml``.

    Raises:
        UserError: If something in the config cannot be used, or the folder belongs to another config.
    """
    from guidance.heads import load_head
    from guidance.models.pipelines import load_on
    from guidance.runs.arms import guide_arms, list_scales, midblock_arms
    from guidance.runs.folder import move_aside, read_settings, write_grid, write_settings
    from guidance.runs.records import RecordStore
    from guidance.runs.run import Sampling, check_sampling, read_jobs, sample_arms
    from guidance.runs.specs import read_guide
    from guidance.utils.processes import join_processes

    state = join_processes()
    progress = progress and state.is_main_process
    # everything that can be wrong is checked before the first file is written
    scales = list_scales(config.scales)
    told = [getattr(config, k) for k in ("prompts", "num_prompts", "seeds_per_prompt", "seed")]
    strength = Sampling(strength=config.strength).strength
    jobs = read_jobs(*told, category=config.category, edits=config.edits)
    folder = Path(config.output or default_output(config))
    made = None if config.fresh else read_settings(folder, _settings(config), free=FREE)
    scales = list_scales([*made["scales"], *scales]) if made else scales
    options = {k: getattr(config, k) for k in ("objective", "target", "normalize", "start", "stop")}
    options |= {"every": config.every, "space": config.space, "head_path": config.head or ""}
    if config.guides:
        arms = guide_arms([read_guide(text) for text in config.guides], scales)
    else:
        head = load_head(config.head) if config.head and scales != [0] else None
        arms = midblock_arms(head, scales, **options)
    arms, cfg = _steered(config, arms), _classifier_free(config)
    _say(progress, f"Loading {config.model} ...")
    pipe = load_on(state, **{k: getattr(config, k) for k in ("model", "revision", "device", "dtype")})
    sampling = {k: getattr(config, k) for k in ("num_steps", "scheduler", "batch_size")}
    check_sampling(pipe, arms, **sampling)
    if cfg.modulate is not None:
        cfg.modulate.prepare(pipe)

    if state.is_main_process:
        if config.fresh and (aside := move_aside(folder)):
            _say(progress, f"Moved {folder} to {aside}.")
        write_settings(folder, _settings(config) | {"scales": scales})
    state.wait_for_everyone()
    store = RecordStore(folder, state.process_index)
    sampling |= {"process_index": state.process_index, "num_processes": state.num_processes}
    _say(progress, f"{len(jobs)} noises x {len(arms)} arms on {pipe.unet.device} into {folder}")
    sampling |= {"cfg_scale": cfg, "strength": strength, "model": config.model, "progress": progress}
    sample_arms(pipe, jobs, arms, store, **sampling)
    state.wait_for_everyone()
    if state.is_main_process:
        store, order = RecordStore(folder), {job.prompt.id: i for i, job in enumerate(jobs)}
        records = sorted(store.load(), key=lambda r: (order.get(r.prompt_id, len(order)), r.seed))
        write_grid(store, records, [arm.name for arm in arms], max_rows=config.grid_rows)
    return folder


def _steered(config: GuidedConfig, arms: list[Arm]) -> list[Arm]:
    """Add steering by the first guide's score, if there are particles."""
    from guidance.runs.arms import Steering, steered_arms

    if config.particles < 1:
        raise UserError(f"Expected particles of at least 1, got {config.particles}; 1 does not steer.")
    if config.particles == 1:
        return arms
    if len(arms) == 1:
        raise UserError(
            "Expected a scale other than 0 with particles, whose guide steers them, got scales=[0]."
        )
    names = ("particles", "potential", "lam", "eta")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    options |= {"threshold": 0.0} if config.lam == 0 else {}
    return steered_arms(arms, Steering(arms[1].guides[0], **options))


def _classifier_free(config: GuidedConfig) -> ClassifierFree:
    from guidance.runs.specs import read_guide
    from guidance.sampling.cfg import ClassifierFree

    modulate = None if config.cfg_modulate is None else read_guide(config.cfg_modulate).build(1.0)
    return ClassifierFree(config.cfg_scale, config.cfg_rescale, config.cfg_start, config.cfg_stop, modulate)


def default_output(config: GuidedConfig) -> Path:
    """Name a folder after the prompts and a hash of the options that matter to the images."""
    first = config.prompts if isinstance(config.prompts, str) else config.prompts[0]
    stem = Path(first).stem if isinstance(config.prompts, str) else first
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-") or "prompts"
    kept = {key: value for key, value in _settings(config).items() if key not in FREE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:6]
    return Path("runs/samples") / f"{name}-{digest}"


def _settings(config: GuidedConfig) -> dict[str, Any]:
    """What the folder remembers: all options but where it is and how it was opened."""
    # what is not set leaves no trace: folders made before there were such options keep name and config
    unset = [
        *(["category"] if not config.category else []),
        *(["edits", "strength"] if not config.edits else []),
    ]
    left_out = ("output", "fresh", *unset)
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out}


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, flush=True)


def read_words(argv: Sequence[str]) -> list[str]:
    """Turn words without a key into the option `prompts`, and ``--name value`` of an option into an override.

    >>> read_words(["a red boat", "--head", "my/head", "seed=1"])
    ['head=my/head', 'seed=1', 'prompts=["a red boat"]']
    """
    words, rest, texts, guides = iter(argv), [], [], []
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name not in ("config", "print-config", "help", "explain"):
            value = value if equals else next(words, "")
            if not value:
                raise UserError(f"Expected a value after '{word}', got none.")
            if name == "guide":
                guides.append(value)
                continue
            rest.append(f"{name.replace('-', '_')}={value}")
        elif word == "--config":
            rest += [word, *itertools.islice(words, 1)]
        elif word.startswith("-") or re.match(r"[\w.]+=", word):
            rest.append(word)
        elif Path(word).is_file():
            raise UserError(f"Expected a prompt, got the file '{word}'; write prompts={word} to read it.")
        else:
            texts.append(word)
    # YAML reads this JSON as it is
    lists = {"prompts": texts, "guides": guides}
    return rest + [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in lists.items() if value]


def _explain(config: GuidedConfig) -> str:
    from guidance.runs.specs import MidBlockSpec, explain, read_guide

    names = ("head", "objective", "target", "normalize", "start", "stop", "every", "space")
    specs = [read_guide(text) for text in config.guides] or [
        MidBlockSpec(**{k: getattr(config, k) for k in names})
    ]
    scales = ", ".join(f"{s:g}" for s in config.scales)
    scheduler = config.scheduler or "the model's scheduler"
    return (
        f"{config.num_steps} steps of {scheduler}, CFG {config.cfg_scale:g}, "
        f"unguided and at scales {scales}, each times the guides' own:\n{explain(specs, config.num_steps)}"
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
            "--explain", action="store_true", help="say what each guide reads and costs, and stop"
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
