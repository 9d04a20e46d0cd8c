"""The evaluation scripts and the demo for real: on scenes of known truth, and on random pipelines."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_head

from eval import testbed as measure
from eval.images import EvalImagesConfig, evaluate_images
from eval.metrics.frechet import frechet_distance, moments
from eval.stats.tables import arm_table
from guidance.heads import save_head
from guidance.models.denoiser import fingerprint
from guidance.models.pipelines import TESTBED_FOLDER, load_pipeline
from guidance.runs.records import RecordStore
from guidance.testbed.judges import load_judges
from guidance.testbed.render import render, render_scenes
from guidance.testbed.scenes import scenes
from guidance.testbed.truth import truth_score
from sample import demo

pytestmark = pytest.mark.usefixtures("one_thread")


def save_random_head(pipe, folder: Path) -> Path:
    save_head(make_head(pipe, hidden=16, base_fingerprint=fingerprint(pipe.unet)), folder)
    return folder


def refused(main, words: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(words)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_head(tiny_pipe, tmp_path_factory) -> Path:
    return save_random_head(tiny_pipe, tmp_path_factory.mktemp("heads") / "tiny")


@pytest.fixture(scope="module")
def judges():
    return load_judges()


@pytest.fixture(scope="module")
def reference(judges):
    return moments(judges.features(render_scenes(scenes("test", 300))))


@pytest.fixture
def clear_and_hazy(tiny_pipe, tiny_head, tmp_path) -> tuple[Path, list, list]:
    """A run folder whose images are replaced: unguided ones by hazy scenes, guided ones by clear ones."""
    from guidance.data.prompts import Prompt
    from guidance.guides import MidBlockGuide
    from guidance.runs.arms import guide_arms
    from guidance.runs.run import Sampling, list_jobs, sample_arms

    clear = [dataclasses.replace(s, haze=0.0, saturation=1.2, exposure=0.0) for s in scenes("test", 24)]
    hazy = [dataclasses.replace(s, haze=0.6, saturation=0.5, exposure=-0.4) for s in clear]
    prompts = [Prompt(str(i), s.caption) for i, s in enumerate(clear)]
    store = RecordStore(tmp_path / "run")
    arms = guide_arms([MidBlockGuide(str(tiny_head))], [1.0])
    sample_arms(tiny_pipe, list_jobs(prompts, 1, 0), arms, store, Sampling(1), model="tiny", batch_size=24)
    for record in store.load():
        scene = (hazy if record.arm == "unguided" else clear)[int(record.prompt_id)]
        store.append(record, render(scene))
    return store.folder, clear, hazy


def test_the_table_of_known_images(clear_and_hazy, judges, reference, tmp_path) -> None:
    folder, clear, hazy = clear_and_hazy
    options = {"reference_size": 300, "permutations": 9, "cache": str(tmp_path / "cache")}
    found = evaluate_images(EvalImagesConfig([str(folder)], str(tmp_path / "out"), **options), progress=False)
    before, after = (truth_score(render_scenes(s)) for s in (hazy, clear))
    base, guided = (line.split(" | ") for line in arm_table(found).splitlines()[2:])
    assert base[0] == "| unguided" and base[1:4] == [f"{before.mean():+.2f}", "-", "-"]
    assert guided[1] == f"{after.mean():+.2f}"
    change = (after - before).mean() / before.std(ddof=1)
    assert guided[2].startswith(f"{change:+.2f} [")
    assert guided[3].startswith(f"{100 * np.mean(after > before):.0f}%")
    agree = judges.agreement(render_scenes(clear), [s.caption for s in clear])["object"].mean()
    assert guided[4].startswith(f"{100 * agree:.1f} / ")
    fd = frechet_distance(*reference, *moments(judges.features(render_scenes(clear))))
    assert float(guided[6]) == pytest.approx(fd, abs=0.051)


def test_prompts_of_another_seed_are_others() -> None:
    first, second = (measure._fresh_prompts(60, seed) for seed in (0, 1))
    assert len(first) == len(second) == 60 and not {p.text for p in first} & {p.text for p in second}


def test_quality_and_the_model_card(tiny_folder, tmp_path, capsys) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(TESTBED_FOLDER / "training.json", model)
    words = [f"model={model}", f"output={tmp_path}/out"]
    refused(measure.main, [*words, "part=card"], "part=quality first", capsys)
    small = ["num_images=6", "cfg_scales=[2,3]", "reference=300", "batch_size=4"]
    assert measure.main([*words, "part=quality", *small]) == 0
    result = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert [r["cfg_scale"] for r in result["rows"]] == [2, 3]
    assert result["judge_on_test_scenes"]["object"] > 0.95  # the judges are the shipped ones
    assert all(0 <= v <= 1 for r in result["rows"] for v in r["agreement"].values())
    assert 0 < result["frechet_between_halves"] < min(r["frechet"] for r in result["rows"])
    assert measure.main([*words, "part=card"]) == 0
    assert "6 test captions" in (model / "README.md").read_text()


def test_guidance_is_measured_in_every_setting_and_resumes(
    tiny_folder, tiny_head, tmp_path, capsys, monkeypatch
) -> None:
    words = [f"model={tiny_folder}", f"head={tiny_head}", f"output={tmp_path}/out", "part=guidance"]
    words += ["num_prompts=3", "steps=[25]", "schedulers=[euler]", "reference=300", "batch_size=3", "scale=2"]
    assert measure.main(words) == 0
    summary = json.loads((tmp_path / "out" / "guidance.json").read_text())
    names = {k: [a["name"] for a in v["arms"]] for k, v in summary.items()}
    assert names["euler-25"] == ["unguided", "scale=2"]
    assert set(names["ddim-25"]) == {"unguided", "scale=2", "scale=-2", "unguided, CFG 6"}
    text = (tmp_path / "out" / "guidance.md").read_text()
    monkeypatch.setattr("guidance.sampling.loop.sample_latents", None)  # nothing is sampled again
    assert measure.main(words) == 0
    assert (tmp_path / "out" / "guidance.md").read_text() == text


def test_the_demo_from_head_to_table(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "_train", lambda head: save_random_head(load_pipeline("testbed"), Path(head)))
    words = ["num_prompts=4", "num_steps=2", "scales=[1,-1]", "reference=300"]
    words += [f"output={tmp_path}/a demo", f"head={tmp_path}/head"]
    assert demo.main(words) == 0
    folder = tmp_path / "a demo"
    assert all((folder / name).is_file() for name in ("grid.png", "table.md", "eval/report.html"))
    assert len(RecordStore(folder).load(check="sha256")) == 16  # with plain CFG beside guidance
    assert (folder / "table.md").read_text().count("\n") == 6
    assert "[3/3" in capsys.readouterr().out
