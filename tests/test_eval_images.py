"""eval/images.py for real: rendered scenes as images, so that every number is known from elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from eval import images as script
from eval.comparison.arms import load_arms
from eval.comparison.bench import ImageBench
from eval.comparison.image_metrics import IMAGE_METRICS, ImageMeasure
from eval.comparison.set_metrics import SET_METRICS, SetMeasure, SetStatistic
from eval.features.extractors import Formula
from eval.images import EvalImagesConfig, evaluate_images
from eval.metrics.clip import clip_score, directional_similarity
from eval.metrics.frechet import frechet_distance, moments
from eval.stats.paired import paired_difference
from eval.stats.permutation import permutation_test
from guidance.data.edits import load_edit_pairs
from guidance.runs.records import Record, RecordStore
from guidance.testbed.judges import load_judges
from guidance.testbed.render import render, render_scenes
from guidance.testbed.scenes import scenes
from guidance.testbed.truth import truth_score

pytestmark = pytest.mark.usefixtures("one_thread")
N = 24
ROOT = Path(__file__).parent.parent


def record(arm: str, i: int, caption: str, category: str = "", **changes) -> Record:
    guides = [{"method": "midblock", "name": "aesthetic", "guidance_scale": 2.0}] if arm == "scale=2" else []
    fields = {f.name: f.default for f in dataclasses.fields(Record)}
    made = {"prompt_id": f"p{i:02}", "prompt": caption, "category": category, "challenge": "", "seed": i}
    made |= {"noise_hash": f"{i}", "arm": arm, "guides": guides, "cfg_scale": 4.0, "num_steps": 5, "bytes": 0}
    made |= {"scheduler": "DDIMScheduler", "model": "testbed", "model_fingerprint": "abc", "dtype": "float32"}
    made |= {"image": f"images/{arm}/{i}.png", "sha256": "", "seconds": 0.1, "batch_size": 4, "score": None}
    made |= {"nan_skipped": 0, "truncated": False, "head": "", "version": "test"}
    return Record(**{k: v for k, v in fields.items() if v is not dataclasses.MISSING} | made | changes)


def write_run(folder: Path, arms: dict[str, np.ndarray], captions: list[str], **changes) -> Path:
    store = RecordStore(folder)
    for arm, images in arms.items():
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            category = caption.split()[2]
            store.append(record(arm, i, caption, category, **changes.get(arm, {})), image)
    return folder


@pytest.fixture(scope="module")
def world():
    """Captions, hazy scenes and clear ones."""
    told = list(scenes("test", N, start=500))
    hazy = np.stack([render(dataclasses.replace(s, haze=0.8, saturation=0.5)) for s in told])
    clear = np.stack([render(dataclasses.replace(s, haze=0.0, saturation=1.2)) for s in told])
    return [s.caption for s in told], hazy, clear


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    captions, hazy, clear = world
    return write_run(tmp_path_factory.mktemp("a run") / "run", {"unguided": hazy, "scale=2": clear}, captions)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def evaluate(folders, output, cache, **options):
    options = {"permutations": 19, "reference_size": 60} | options
    config = EvalImagesConfig([str(f) for f in folders], str(output), cache=str(cache), **options)
    found = evaluate_images(config, progress=False)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def found(run, cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    return evaluate([run], output, cache), output


def delta(found, metric, arm="scale=2"):
    return next(d for d in found["deltas"] if (d["metric"], d["arm"]) == (metric, arm))


def value(found, metric, arm="scale=2"):
    return next(v for v in found["set_values"] if (v["metric"], v["arm"]) == (metric, arm))


def test_numbers_are_those_of_the_metrics_themselves(found, world) -> None:
    (summary, _), (captions, hazy, clear) = found, world
    judges = load_judges()
    truth = paired_difference(truth_score(hazy), truth_score(clear), captions)
    assert delta(summary, "truth")["paired"]["mean_diff"] == pytest.approx(truth.mean_diff, abs=1e-5)
    assert delta(summary, "truth")["paired"]["wins"] == N == truth.wins
    texts = judges.clip_embed_texts(captions)
    a, b = (clip_score(judges.clip_embed_images(x), texts) for x in (hazy, clear))
    assert delta(summary, "clip_score")["paired"]["mean_diff"] == pytest.approx((b - a).mean(), abs=1e-3)
    seen = judges.agreement(clear, captions)["object"].mean()
    assert delta(summary, "object")["paired"]["mean_b"] == pytest.approx(seen)
    real = moments(judges.features(render_scenes(scenes("test", 60))))
    fd = frechet_distance(*real, *moments(judges.features(clear)))
    assert value(summary, "fd")["value"] == pytest.approx(fd, rel=1e-4)
    features = np.concatenate([judges.features(x) for x in (hazy, clear)])

    def distance(rows: np.ndarray) -> float:
        return frechet_distance(*real, *moments(features[rows]))

    test = permutation_test(captions, lambda i, j: distance(j) - distance(i), two_sided=True, permutations=19)
    assert value(summary, "fd")["p"] == test.p


def test_files_hold_the_same_numbers(found) -> None:
    summary, output = found
    rows = pandas.read_parquet(output / "rows.parquet")
    assert len(rows) == 2 * N == len(pandas.read_csv(output / "rows.csv"))
    mean = rows[rows.arm == "scale=2"].truth.mean() - rows[rows.arm == "unguided"].truth.mean()
    assert mean == pytest.approx(delta(summary, "truth")["paired"]["mean_diff"])
    assert json.loads((output / "summary.json").read_text())["table"] == summary["table"]
    report = (output / "report.html").read_text()
    assert "scale=2" in report and "FD-judge" in report and len(report) < 5_000_000
    kinds = {c["kind"] for c in summary["caveats"]}
    assert "biased" in kinds and not kinds & {"unpaired", "circular", "excluded"}


def test_a_second_run_reads_what_the_first_wrote(found, run, cache, monkeypatch) -> None:
    summary, output = found
    monkeypatch.setattr(ImageBench, "compare", lambda *a: pytest.fail("computed again"))
    assert evaluate([run], output, cache)["table"] == summary["table"]
    with pytest.raises(pytest.fail.Exception):  # another option is another evaluation
        evaluate([run], output, cache, permutations=20)


def test_the_key_depends_on_files_that_options_name_and_on_no_other_path(run, tmp_path) -> None:
    def key(**options) -> str:
        return script._key(EvalImagesConfig([str(run)], **options), load_arms([run]))

    (tmp_path / "photos").mkdir()
    reference, title = {"reference": str(tmp_path / "photos")}, {"title": str(tmp_path / "photos")}
    before = key(**reference), key(**title)
    (tmp_path / "photos" / "new.png").write_bytes(b"x")
    assert key(**reference) != before[0] and key(**title) == before[1]


def test_batches_do_not_matter_and_a_kill_loses_one(found, run, tmp_path, monkeypatch) -> None:
    from eval.features.extractors import Extractor

    seen, real = [], Extractor.embed

    def embed(self, images):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Extractor, "embed", embed)
    with pytest.raises(KeyboardInterrupt):
        evaluate([run], tmp_path / "out", tmp_path / "cache", batch_size=7)
    assert not (tmp_path / "out" / "summary.json").exists()
    monkeypatch.setattr(Extractor, "embed", lambda self, images: (seen.append(len(images)), real(self, images))[1])
    again = evaluate([run], tmp_path / "out", tmp_path / "cache", batch_size=7)
    everything = 3 * 2 * N + 2 * 60  # judge's readings and features, CLIP; the reference twice
    assert sum(seen) == everything
    for metric in ("truth", "clip_score", "saturation"):
        a, b = (delta(s, metric)["paired"] for s in (found[0], again))
        assert a["interval"] == pytest.approx(b["interval"], abs=1e-4)
    assert value(again, "fd")["value"] == pytest.approx(value(found[0], "fd")["value"], rel=1e-4)


def test_two_processes_find_the_same(found, run, tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = ["eval.images", str(run), f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]
    words += ["permutations=19", "reference_size=60"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command + words, cwd=ROOT, env=env, check=True, capture_output=True, timeout=300)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    files = list((tmp_path / "cache").glob("*-embed/rows-*.bin"))
    assert {f.name.split("-")[1] for f in files} == {"0", "1"}  # both have worked
    for mine, other in zip(found[0]["deltas"], summary["deltas"], strict=True):
        assert mine["paired"]["interval"] == pytest.approx(other["paired"]["interval"], abs=1e-4, nan_ok=True)


def test_plain_folders_and_a_table_of_prompts(world, cache, tmp_path) -> None:
    captions, hazy, clear = world
    table = tmp_path / "prompts.csv"
    names = [f"{i}.png" for i in range(N)]
    pandas.DataFrame({"file_name": names, "prompt": captions}).to_csv(table, index=False)
    for name, images in (("hazy", hazy), ("clear", clear)):
        (tmp_path / name).mkdir()
        for file, image in zip(names, images, strict=True):
            Image.fromarray(image).save(tmp_path / name / file)
    folders = [tmp_path / "hazy", tmp_path / "clear"]
    summary = evaluate(folders, tmp_path / "out", cache, prompts=str(table))
    assert delta(summary, "truth", "clear")["paired"]["wins"] == N
    assert "unpaired" in {c["kind"] for c in summary["caveats"]}
    bare = evaluate(folders, tmp_path / "bare", cache, clip="judge-clip", features=None)
    assert {m["key"] for m in bare["image_metrics"]} == {"image_similarity", "saturation", "clipping"}


def test_the_clip_that_guided_is_called_circular(world, cache, tmp_path) -> None:
    from guidance.models.clip import load_clip

    captions, hazy, clear = world
    guide = {"method": "clip", "name": "clip", "guidance_scale": 1.0, "clip_fingerprint": load_clip().fingerprint}
    arms = {"unguided": hazy, "scale=2": clear}
    folder = write_run(tmp_path / "run", arms, captions, **{"scale=2": {"guides": [guide]}})
    own = evaluate([folder], tmp_path / "own", cache, clip="testbed-clip", features=None)
    assert [c["kind"] for c in own["caveats"] if c["kind"] == "circular"]
    other = evaluate([folder], tmp_path / "other", cache, features=None)
    assert not [c for c in other["caveats"] if c["kind"] == "circular"]


def test_what_happened_is_shown_and_skipped_gradients_are_a_caveat(world, cache, tmp_path) -> None:
    captions, plain, guided = world
    happened = {"steps": 5, "gradients": 9, "pushes": 9, "nan_skipped": 2}
    changes = {"scale=2": happened, "unguided": {"steps": 5}}
    folder = write_run(tmp_path / "run", {"unguided": plain, "scale=2": guided}, captions, **changes)
    found = evaluate([folder], tmp_path / "out", cache, features=None)
    said = {arm["name"]: arm["happened"] for arm in found["arms"]}
    assert said["unguided"] == "5 steps"
    assert said["scale=2"] == f"5 steps, 9 gradients, 9 pushes; {2 * N} guided steps skipped (gradient not finite)"
    notes = [c["text"] for c in found["caveats"] if c["kind"] == "skipped"]
    assert len(notes) == 1 and f"{2 * N} guided steps of {N} images" in notes[0]
    assert said["scale=2"] in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_one_arm_alone_is_scored_against_the_reference(world, cache, tmp_path) -> None:
    captions, _, clear = world
    folder = write_run(tmp_path / "classes", {"unguided": clear}, captions)
    summary = evaluate([folder], tmp_path / "out", cache)
    assert not summary["deltas"] and value(summary, "fd", "unguided")["value"] > 0
    assert "unguided" in (tmp_path / "out" / "report.html").read_text()


def test_a_heads_score_is_shown_and_circular_where_it_guided(world, cache, tmp_path, tiny_pipe, tiny_folder) -> None:
    from conftest import make_head

    from guidance.heads import save_head
    from guidance.models.denoiser import fingerprint

    head = make_head(tiny_pipe, base_model=str(tiny_folder), base_fingerprint=fingerprint(tiny_pipe.unet))
    save_head(head, tmp_path / "head")
    captions, hazy, clear = world
    weights = fingerprint(head)
    guide = {"method": "midblock", "guidance_scale": 1.0, "committee_fingerprints": [weights]}
    adapter = {"method": "amortised", "guidance_scale": 1.0, "teacher_fingerprints": [weights]}
    chosen = {"guide": "midblock:rating", "networks": [weights]}
    used = {"scale=2": {"guides": [guide]}, "adapter": {"guides": [adapter]}}
    used |= {
        "steered": {"steering": {**chosen, "particles": 2, "lam": 1.0}},
        "cfg": {"cfg": {"rescale": 0.0, "start": 0.0, "stop": 1.0, "modulate": chosen}},
        "other": {"cfg": {"rescale": 0.7, "start": 0.0, "stop": 1.0, "modulate": "midblock:rating"}},
    }
    folder = write_run(
        tmp_path / "run", {"unguided": hazy, "scale=2": clear} | dict.fromkeys(list(used)[1:], hazy), captions, **used
    )
    options = {"rating": str(tmp_path / "head"), "features": None, "clip": None}
    summary = evaluate([folder], tmp_path / "out", cache, **options)
    (metric,) = [m for m in summary["image_metrics"] if m["key"] == "rating"]
    assert set(metric["circular"]) == {"scale=2", "adapter", "steered", "cfg"}
    assert delta(summary, "rating")["paired"]["mean_a"] == pytest.approx(4, abs=4)  # an expected rating
    again = evaluate([folder], tmp_path / "again", tmp_path / "other cache", batch_size=5, **options)
    one, two = (delta(s, "rating")["paired"]["interval"] for s in (summary, again))
    assert one == pytest.approx(two, abs=1e-4)


def test_edits_are_scored_by_direction(cache, tmp_path) -> None:
    pairs = load_edit_pairs("testbed:test", 12)
    same = [np.asarray(p.image) for p in pairs]
    edited = [np.asarray(p.edited_image) for p in pairs]
    store = RecordStore(tmp_path / "edits")
    for arm, images in (("unguided", same), ("scale=2", edited)):
        for i, (pair, image) in enumerate(zip(pairs, images, strict=True)):
            store.append(record(arm, i, pair.edited_caption, prompt_id=pair.id), image)
    with pytest.raises(Exception, match=r"directional similarity.* to have a value for two or more prompts"):
        evaluate([store.folder], tmp_path / "out", cache, edits="testbed:test")  # the sources did not move
    for i, pair in enumerate(pairs):
        store.append(record("unguided", i, pair.edited_caption, prompt_id=pair.id), 255 - same[i])
    summary = evaluate([store.folder], tmp_path / "out", cache, edits="testbed:test")
    judges = load_judges()
    texts = [judges.clip_embed_texts([getattr(p, k) for p in pairs]) for k in ("caption", "edited_caption")]
    before, after = (judges.clip_embed_images(np.stack(x)) for x in (same, edited))
    wanted = directional_similarity(before, after, *texts).mean()
    got = delta(summary, "directional_similarity")["paired"]
    assert got["mean_b"] == pytest.approx(wanted, abs=1e-4) and got["mean_b"] > got["mean_a"]


@pytest.fixture
def registries():
    """Leave the registries as they are."""
    before = IMAGE_METRICS[:], SET_METRICS[:]
    yield
    IMAGE_METRICS[:], SET_METRICS[:] = before


@pytest.mark.usefixtures("registries")
def test_a_metric_is_one_record(run, cache, tmp_path) -> None:
    """Appended to its registry, a metric of images or of sets is measured, tested, tabulated and plotted."""
    redness = ImageMeasure(
        "redness",
        "redness",
        "higher",
        "Mean red channel, 0..255.",
        grader=lambda bench: Formula("redness", 1, lambda image: [float(image[..., 0].mean())]),
        values=lambda bench, features: {arm: x[:, 0] for arm, x in features.items()},
    )
    spread = SetMeasure(
        "spread",
        "spread ({label})",
        "higher",
        "Mean variance of the {width} features.",
        network=lambda bench: bench.features,
        statistic=lambda data: SetStatistic(data.rows, lambda x: float(x.var(0).mean())),
        needs="",
        tradeoff="fd",
    )
    IMAGE_METRICS.append(redness)
    SET_METRICS.append(spread)
    summary = evaluate([run], tmp_path, cache)
    assert 0 < delta(summary, "redness")["paired"]["mean_a"] < 255 and delta(summary, "redness")["p_holm"] <= 1
    assert value(summary, "spread")["p"] >= 1 / 20 and len(value(summary, "spread")["blocks"]) == 3
    assert "redness" in summary["columns"] and "spread (judge)" in summary["table"]
    report = (tmp_path / "report.html").read_text()
    for part in ("Mean red channel", "of the 128 features", "Paired differences in redness by arm"):
        assert part in report
    for plot in ("FD-judge against redness", "FD-judge against spread (judge)"):
        assert f"<figcaption>{plot}</figcaption>" in report


@pytest.mark.parametrize(
    "words", [["nowhere"], ["RUN", "clip=judge"], ["RUN", "reference=nowhere"], ["RUN", "sort_by=beauty"]]
)
def test_what_cannot_be_evaluated_is_refused(run, cache, tmp_path, words, capsys) -> None:
    words = [str(run) if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit) as stopped:
        script.main([*words, f"output={tmp_path / 'out'}", f"cache={cache}", "reference_size=60"])
    assert stopped.value.code == 2 and "Expected" in capsys.readouterr().err
    assert not (tmp_path / "out" / "summary.json").exists()
