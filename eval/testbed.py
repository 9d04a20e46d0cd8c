"""Measure the testbed pipeline, and mid-u guidance on it: the tables of the README and of the model card.

python -m eval.testbed part=quality          # agreement with captions by CFG weight, images/s, Frechet distance
python -m eval.testbed part=guidance         # 500 unseen prompts: scales, steps, schedulers
python -m eval.testbed part=card             # writes the last quality table into the model card
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guidance.utils.config import option, parse_config
from guidance.utils.errors import UserError, friendly_errors

if TYPE_CHECKING:
    from guidance.data.prompts import Prompt


@dataclasses.dataclass
class MeasureConfig:
    """Options of this script."""

    part: Literal["quality", "guidance", "card"] = option("quality", "quality, guidance or card")
    model: str = option("testbed", "the testbed or a folder of another one")
    head: str = option("runs/heads/testbed-aesthetic", "aesthetic head of the guidance part")
    output: str = option("runs/testbed-eval", "folder of images and results; images resume")
    num_images: int = option(1000, "quality: images per CFG weight")
    cfg_scales: list[float] = option([3.0, 4.0, 5.0], "quality: CFG weights")
    num_prompts: int = option(500, "guidance: test prompts, one seed each")
    seed: int = option(0, "guidance: which test prompts and noises; none of the seeds before it come again")
    scale: float = option(2.5, "guidance: the one portable scale; its negative is measured too")
    start: float = option(0.1, "guidance: fraction of the steps where it begins")
    cfg_scale: float = option(3.0, "guidance: CFG weight")
    steps: list[int] = option([15, 25, 50], "guidance: numbers of DDIM steps")
    cfg_matched: float = option(6.0, "guidance: plain CFG weight to show beside it, unguided; 0 for none")
    schedulers: list[str] = option(["dpm++", "euler"], "guidance: further schedulers, at 25 steps")
    reference: int = option(2000, "test scenes for Frechet distances")
    batch_size: int = option(32, "images per batch")


def measure_quality(config: MeasureConfig) -> dict[str, Any]:
    """Sample test captions at each CFG weight and judge them; a row per weight, beside the test scenes themselves."""
    from eval.metrics.frechet import frechet_distance, moments
    from guidance.models.pipelines import load_pipeline
    from guidance.sampling import sample_images
    from guidance.testbed.judges import load_judges
    from guidance.testbed.render import render_scenes
    from guidance.testbed.scenes import scenes
    from guidance.utils.io import write_json

    pipe, judges = load_pipeline(config.model), load_judges()
    reference = list(scenes("test", config.reference))
    pictures = render_scenes(reference)
    features = judges.features(pictures)
    half = len(features) // 2

    def agreement(images: Any, captions: list[str]) -> dict[str, float]:
        return {k: float(v.mean()) for k, v in judges.agreement(images, captions).items()}

    captions = [s.caption for s in scenes("test", config.num_images, start=100_000)]
    rows = []
    for cfg in config.cfg_scales:
        start = time.perf_counter()
        images = sample_images(
            pipe, captions, range(len(captions)), cfg_scale=cfg, batch_size=config.batch_size, progress=True
        )
        rows.append(
            {
                "cfg_scale": cfg,
                "images_per_second": len(images) / (time.perf_counter() - start),
                "agreement": agreement(images, captions),
                "frechet": frechet_distance(*moments(features), *moments(judges.features(images))),
            }
        )
        print(rows[-1], flush=True)
    result = {
        "rows": rows,
        "judge_on_test_scenes": agreement(pictures, [s.caption for s in reference]),
        "frechet_between_halves": frechet_distance(*moments(features[:half]), *moments(features[half:])),
        "num_images": config.num_images,
        "reference": config.reference,
    }
    write_json(Path(config.output) / "quality.json", result)
    return result


def quality_table(result: dict[str, Any]) -> str:
    """Format the result of :func:`measure_quality` as Markdown."""
    from eval.stats.tables import markdown

    def percent(shares: dict[str, float]) -> dict[str, str]:
        return {name: f"{100 * share:.1f}%" for name, share in shares.items()}

    rows = [
        {"CFG": f"{row['cfg_scale']:g}"}
        | percent(row["agreement"])
        | {"images/s": f"{row['images_per_second']:.1f}", "FD-judge": f"{row['frechet']:.1f}"}
        for row in result["rows"]
    ]
    judged = ", ".join(f"{name} {share}" for name, share in percent(result["judge_on_test_scenes"]).items())
    return (
        f"{markdown(rows)}\n\n"
        f"Agreement of the judge classifier with the caption, {result['num_images']} test captions, 25 DDIM "
        f"steps. On {result['reference']} rendered test scenes the judge itself agrees on {judged}. FD-judge: "
        f"Frechet distance on the judge's 128 features to {result['reference']} test scenes; between two halves "
        f"of them {result['frechet_between_halves']:.1f}."
    )


def measure_guidance(config: MeasureConfig, command: str = "") -> None:
    """Sample the arms of every setting into run folders, evaluate them there and write a table of each."""
    from eval.images import EvalImagesConfig, evaluate_images
    from eval.stats.tables import arm_table
    from guidance.guides import MidBlockGuide
    from guidance.models.pipelines import load_pipeline
    from guidance.runs.arms import Arm, guide_arms
    from guidance.runs.records import RecordStore
    from guidance.runs.run import Sampling, list_jobs, sample_arms
    from guidance.utils.io import atomic_path, write_json

    pipe, guide = load_pipeline(config.model), MidBlockGuide(config.head, start=config.start)
    jobs = list_jobs(_fresh_prompts(config.num_prompts, config.seed), 1, 1_000_000 * config.seed)
    settings = [("ddim", n) for n in config.steps] + [(s, 25) for s in config.schedulers]
    text, summary = [], {}
    for scheduler, steps in settings:
        main_setting = (scheduler, steps) == ("ddim", 25)
        scales = [-config.scale, config.scale] if main_setting else [config.scale]
        guided = guide_arms([guide], scales)
        runs = [(guided, config.cfg_scale)]
        if main_setting and config.cfg_matched:  # what plain CFG would have given
            runs.append(([Arm(f"unguided, CFG {config.cfg_matched:g}")], config.cfg_matched))
        store = RecordStore(Path(config.output) / f"{scheduler}-{steps}")
        for arms, cfg in runs:
            sampling = Sampling(steps, cfg, scheduler)
            sample_arms(pipe, jobs, arms, store, sampling, model=config.model, batch_size=config.batch_size)
        found = evaluate_images(EvalImagesConfig([str(store.folder)], reference_size=config.reference), command)
        assert found is not None  # one process
        text.append(f"### {scheduler}, {steps} steps\n{arm_table(found)}")
        print("\n" + text[-1], flush=True)
        summary[f"{scheduler}-{steps}"] = {k: found[k] for k in ("arms", "deltas", "set_values")}
        write_json(Path(config.output) / "guidance.json", summary)
    with atomic_path(Path(config.output) / "guidance.md") as temporary:
        temporary.write_text("\n\n".join(text) + "\n")


def _fresh_prompts(n: int, seed: int) -> list[Prompt]:
    """Load test prompts of a seed that no earlier seed has, so that what was tuned on those is tested on others."""
    from guidance.data.prompts import load_prompts

    known = {p.text for s in range(seed) for p in load_prompts("testbed", n, s)}
    return [p for p in load_prompts("testbed", 8 * n if known else n, seed) if p.text not in known][:n]


def write_card(config: MeasureConfig) -> Path:
    """Put the measured quality into the model card of the weights."""
    from guidance.models.pipelines import TESTBED_FOLDER
    from guidance.training.export import render_card
    from guidance.utils.io import atomic_path, read_json

    folder = TESTBED_FOLDER if config.model == "testbed" else Path(config.model)
    quality = Path(config.output) / "quality.json"
    if not quality.is_file():
        raise UserError(f"Expected '{quality}', found none; run python -m eval.testbed part=quality first.")
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(render_card(read_json(folder / "training.json"), quality_table(read_json(quality))))
    return folder / "README.md"


@friendly_errors("eval.testbed")
def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this script."""
    config = parse_config(MeasureConfig, argv, prog="eval.testbed", description=__doc__ or "")
    if config.part == "quality":
        print(quality_table(measure_quality(config)))
    elif config.part == "guidance":
        words = sys.argv[1:] if argv is None else argv
        measure_guidance(config, f"python -m eval.testbed {shlex.join(words)}")
    else:
        print(f"wrote {write_card(config)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
