"""Studies of guides on random pipelines, conditioning and steering of arms, precision and recall."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.guides import STUDIES, main
from eval.metrics.frechet import frechet_distance, moments
from eval.metrics.precision_recall import precision_recall
from guidance.data.prompts import Prompt
from guidance.guides import EmbeddingGuide, MidBlockGuide
from guidance.heads import HeadConfig, build_head, load_head, save_head
from guidance.heads.adapter import AdapterConfig, build_adapter, save_adapter
from guidance.models.clip import load_clip
from guidance.models.denoiser import fingerprint
from guidance.runs.arms import Arm, Steering
from guidance.runs.records import RecordStore
from guidance.runs.run import Sampling, list_jobs, sample_arms
from guidance.sampling import decode_latents, sample_images
from guidance.sampling.cfg import ClassifierFree
from guidance.sampling.start import encode_images
from guidance.sampling.steering import best_of_n
from guidance.testbed.judges import load_judges
from guidance.testbed.render import render_scenes
from guidance.testbed.scenes import TIMES, scenes
from guidance.utils.errors import UserError
from guidance.utils.processes import run_script

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["a red balloon over the sea at dusk", "a blue tree in the snow at night"]


@pytest.fixture(scope="module")
def parts(tiny_pipe, tmp_path_factory) -> dict[str, Path]:
    """Random heads of every kind, and an adapter, for the tiny pipeline."""
    root, unet = tmp_path_factory.mktemp("parts"), tiny_pipe.unet
    clip = load_clip("testbed")
    base: dict[str, Any] = {"base_fingerprint": fingerprint(unet)}
    base |= {"prediction_type": tiny_pipe.scheduler.config.prediction_type}
    channels = unet.config.block_out_channels[-1]
    kinds: dict[str, dict[str, Any]] = {
        "rating": {},
        "time": {"task": "class", "target": "time", "labels": list(TIMES), "outputs": len(TIMES)},
        "real": {"task": "binary", "target": "real", "labels": [], "outputs": 1},
        "clip": {"task": "embedding", "target": "clip:testbed", "labels": [], "clip": "testbed"},
    }
    kinds["clip"] |= {"clip_fingerprint": clip.fingerprint, "outputs": clip.embed_texts(TEXTS).shape[1]}
    for name, options in kinds.items():
        torch.manual_seed(0)
        config = HeadConfig(kind="conv", in_channels=channels, hidden=16, **(base | options))
        save_head(build_head(config), root / name)
    save_adapter(build_adapter(AdapterConfig(width=8, depth=1, **base)), root / "adapter")
    return {path.name: path for path in root.iterdir()}


def words(study: str, parts: dict[str, Path]) -> list[str]:
    """Return the options of a study's smallest run."""
    rating, adapter = f"head={parts['rating']}", f"adapter={parts['adapter']}"
    heads = f"heads=[{parts['rating']}, {parts['rating']}]"
    return {
        "classes": [f"heads=[{parts['time']}]", "num_images=4", "scales=[1]"],
        "clip": [f"head={parts['clip']}", "scales=[1]", "image_scales=[1]"],
        "discriminator": [f"head={parts['real']}", "num_images=12", "cfg_scales=[1]", "blocks=2"],
        "steering": [rating, "particles=2"],
        "amortised": [rating, adapter, "samplers=[ddim-2, euler-3]"],
        "edits": [f"rating_{rating}", f"clip_head={parts['clip']}", "strengths=[0.9]", "cfg_scale=2"],
        "cfg_variants": [rating, "interval=[0.5, 1]"],
        "overoptimisation": [heads, adapter, "pessimism=[1]", "scales=[1, 2]"],
        "two_guides": [f"rating_{rating}", f"class_head={parts['time']}", "num_images=8"],
    }[study]


def untimed(row: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in row.items() if key not in ("time", "against CFG 4")}


#: Rows of each table, in the order of STUDIES.
ROWS = dict(zip(STUDIES, (2, 7, 4, 7, 10, 4, 6, 10, 7), strict=True))


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.filterwarnings("ignore")  # few images, few features
def test_a_study_runs_and_resumes(study, parts, tiny_folder, tmp_path: Path, capsys) -> None:
    options = [f"model={tiny_folder}", f"output={tmp_path}", "num_images=4", "num_steps=2"]
    command = [study, *options, "split=validation", *words(study, parts)]
    assert main(command) == 0
    table = (tmp_path / "validation" / f"{study}.md").read_text()
    result = json.loads((tmp_path / "validation" / f"{study}.json").read_text())
    assert len(result["rows"]) == len(table.splitlines()) - 2 == ROWS[study]
    assert "nan" not in table and table in capsys.readouterr().out
    images = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    for image in list(images)[:1]:  # edits, which come from images, are not records
        image.unlink()
    assert main(command) == 0
    remade = json.loads((tmp_path / "validation" / f"{study}.json").read_text())
    assert [untimed(row) for row in remade["rows"]] == [untimed(row) for row in result["rows"]]
    again = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    assert again.keys() == images.keys() and sum(again[p] != images[p] for p in images) == min(1, len(images))


@pytest.mark.filterwarnings("ignore")  # few images, few features
def test_the_clip_head_may_rest_between_gradients(parts, tiny_folder, tmp_path: Path) -> None:
    options = ["num_images=2", "every=[1, 3]", "image_scales=[]"]
    rows_of("clip", tmp_path, tiny_folder, *words("clip", parts), *options)
    records = RecordStore(tmp_path / "test" / "clip").load()
    every = {r.arm: r.guides[0]["every"] for r in records if r.arm.startswith("CLIP head")}
    assert every == {"CLIP head, scale=1": 1, "CLIP head, every 3, scale=1": 3}


def vae_floors(pipe: Any, n: int) -> dict[str, list[float]]:
    """Return Frechet distances of other scenes, raw and through the VAE, to scenes, raw and through the VAE."""
    judges, pictures = load_judges(), [render_scenes(scenes("test", n, start=s)) for s in (0, 100_000)]
    rebuilt = [decode_latents(pipe, encode_images(pipe, p)) for p in pictures]
    real, other, real_rebuilt, other_rebuilt = (moments(judges.features(x)) for x in (*pictures, *rebuilt))
    arms = {"other scenes": other, "other scenes through the VAE": other_rebuilt}
    return {name: [frechet_distance(*base, *m) for base in (real, real_rebuilt)] for name, m in arms.items()}


@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_a_study(tiny_pipe, parts, tiny_folder, tmp_path: Path, capfd) -> None:
    options = [f"model={tiny_folder}", "num_steps=2", "num_images=9", "batch_size=2", f"head={parts['real']}"]
    command = ["discriminator", *options, "cfg_scales=[1]", "blocks=2"]
    run_script("eval.guides", [*command, f"output={tmp_path}/two"], processes=2)
    shared = (tmp_path / "two" / "test" / "discriminator.md").read_text()
    assert capfd.readouterr().out.count(shared) == 1
    records = RecordStore(tmp_path / "two" / "test" / "discriminator" / "cfg1").folder.glob("records*.jsonl")
    lines = {path.name: len(path.read_text().splitlines()) for path in records}
    assert lines.keys() == {"records.jsonl", "records-1.jsonl"} and sum(lines.values()) == 36
    assert min(lines.values()) >= 12  # each did its part, nothing twice
    assert main([*command, f"output={tmp_path}/one"]) == 0
    alone, both = (
        json.loads((tmp_path / name / "test" / "discriminator.json").read_text())["rows"] for name in ("one", "two")
    )
    assert [untimed(row) for row in alone] == [untimed(row) for row in both]
    floors = vae_floors(tiny_pipe, 9)
    assert [row["arm"] for row in alone[2:]] == list(floors)
    for row, expected in zip(alone[2:], floors.values(), strict=True):
        found = [float(row[name]) for name in ("FD-judge", "to scenes through the VAE")]
        assert found == pytest.approx(expected, rel=0.02, abs=0.06)
    with pytest.raises(UserError):
        run_script("eval.guides", ["edits", *options[:-1], f"output={tmp_path}/two"], processes=2)


def rows_of(study: str, tmp_path: Path, tiny_folder: Path, *options: str) -> list[dict[str, str]]:
    """Return the rows of a tiny run, whose images are in ``tmp_path/test``."""
    assert main([study, f"model={tiny_folder}", f"output={tmp_path}", "num_steps=2", *options]) == 0
    name = next((f"-{Path(o.split('=')[1]).name}" for o in options if o.startswith("class_head=")), "")
    return json.loads((tmp_path / "test" / f"{study}{name}.json").read_text())["rows"]


@pytest.mark.filterwarnings("ignore")  # few images, few features
def test_variants_of_guidance_are_set_beside_plain_guidance(tiny_pipe, tiny_folder, parts, tmp_path: Path) -> None:
    options = [f"head={parts['rating']}", "num_images=4", "interval=[0, 1]", "target=6"]
    rows = rows_of("cfg_variants", tmp_path, tiny_folder, *options)
    names = ["plain 3", "plain 6", "6, rescale 0.7", "6, steps 0 to 1", "6, modulated by rating 6"]
    assert [row["CFG"] for row in rows[::2]] == [row["CFG"] for row in rows[1::2]] == names
    assert [row["arm"] for row in rows] == 5 * ["unguided", "scale=2.5"]
    base, high, full = rows[0], rows[2], rows[6]
    assert base["truth, sd [95%]"] == "+0.00 [+0.00, +0.00]" and base["drift, grey levels"] == "0.0"
    assert untimed(high) == untimed(full) | {"CFG": high["CFG"]}  # the interval is all of the steps
    assert all(float(row["drift, grey levels"]) > 0 for row in rows[1:])

    rating = MidBlockGuide(load_head(parts["rating"]), objective="at_least", target=6)
    expected = {"plain 3": 3.0, "plain 6": 6.0, names[4]: ClassifierFree(6.0, modulate=rating)}
    folders = {}
    for name, cfg in expected.items():
        store = RecordStore(tmp_path / "test" / "cfg_variants" / "rating" / name)
        records = sorted((r for r in store.load() if r.arm == "unguided"), key=lambda r: r.seed)
        images = sample_images(
            tiny_pipe, [r.prompt for r in records], [r.seed for r in records], num_steps=2, cfg_scale=cfg
        )
        folders[name] = np.stack([read(store, record) for record in records])
        assert np.abs(folders[name] - images).max() <= 1
    assert np.abs(folders["plain 6"] - folders[names[4]]).max() > 1  # the modulated weight is another


@pytest.mark.filterwarnings("ignore")
def test_particles_are_steered_to_each_class_of_a_head(tiny_pipe, tiny_folder, parts, tmp_path: Path) -> None:
    options = [f"class_head={parts['time']}", "particles=2", "num_images=8", "scale=1"]
    rows = rows_of("steering", tmp_path, tiny_folder, *options)
    alone = ["best of 2", "steered, lam 2"]
    pushed = [f"gradients, {name}" for name in alone]
    assert [row["arm"] for row in rows] == ["unguided", *alone, "gradients", *pushed]
    # every class starts from the same noises, so that each unguided image is right for one of the four
    agrees, against = "judge agrees on the time, % [95%]", "against best of 2, points [95%]"
    assert rows[0][agrees].startswith("25.0 [")
    assert rows[1][against] == "+0.0 [+0.0, +0.0]"
    shares = [float(row[agrees].split()[0]) for row in rows]
    assert [float(row[against].split()[0]) for row in rows] == pytest.approx([s - shares[1] for s in shares])
    assert [row["denoiser calls an image"] for row in rows] == ["1x", "2x", "2x", "1x", "2x", "2x"]

    store = RecordStore(tmp_path / "test" / "steering-2-time")
    best = [r for r in store.load() if r.arm == "best of 2"]
    assert {r.prompt_id for r in best} == {f"time-{label}" for label in TIMES}
    assert {r.conditioning for r in best} == {""} and {r.cfg_scale for r in best} == {1.0}
    for label in TIMES:
        guide = MidBlockGuide(load_head(parts["time"]), objective="class", target=label)
        steered = best_of_n(tiny_pipe, ["", ""], [0, 1], guide, particles=2, eta=1.0, num_steps=2, cfg_scale=1.0)
        expected = decode_latents(tiny_pipe, steered.latents).astype(int)
        for record in (r for r in best if r.prompt_id == f"time-{label}"):
            assert np.abs(read(store, record) - expected[record.seed]).max() <= 1


def test_mistakes_are_refused(parts, tmp_path: Path, capsys) -> None:
    for command in (
        ["steer"],
        ["classes", "heads=[none]"],
        ["steering", f"class_head={parts['rating']}"],
        ["amortised", "samplers=[ddim]"],
        ["cfg_variants", f"head={parts['rating']}", "interval=[0.5]"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*command, f"output={tmp_path}"])
        assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert main(["--help"]) == 0 and "python -m eval.guides clip" in capsys.readouterr().out


def test_an_unconditional_arm_shows_the_denoiser_nothing(tiny_pipe, tmp_path: Path) -> None:
    """The guides see the prompt, the denoiser the arm's conditioning."""
    seen = []

    class Watching(MidBlockGuide):
        needs_prompts = True

        def score(self, h, t, prompts):
            seen.append(prompts)
            return h.flatten(1).sum(1).double()

    config = HeadConfig("conv", in_channels=64, hidden=8, prediction_type="v_prediction")
    guide = Watching(build_head(config), 1e-9)
    jobs = list_jobs([Prompt(f"p{i}", text) for i, text in enumerate(TEXTS)], 1, 0)
    arms = [Arm("unguided", conditioning=""), Arm("guided", (guide,), ({"guidance_scale": 1e-9},), conditioning="")]
    store = RecordStore(tmp_path)
    sample_arms(tiny_pipe, jobs, arms, store, Sampling(2, 1.0), model="x", progress=False)
    expected = sample_images(tiny_pipe, ["", ""], [job.seed for job in jobs], num_steps=2, cfg_scale=1.0)
    for record in store.load():
        i = int(record.prompt_id[1])
        assert record.conditioning == "" and record.prompt == TEXTS[i]
        assert np.abs(read(store, record) - expected[i].astype(int)).max() <= 1
    assert set(seen) == {tuple(TEXTS)}
    conditional = [dataclasses.replace(arm, conditioning=None) for arm in arms[:1]]
    with pytest.raises(UserError, match="conditioning"):
        sample_arms(tiny_pipe, jobs, conditional, store, Sampling(2, 1.0), model="x", progress=False)


def test_a_steered_arm_is_the_steering_function(tiny_pipe, parts, tmp_path: Path) -> None:
    guide = MidBlockGuide(load_head(parts["rating"]))
    jobs = list_jobs([Prompt(f"p{i}", text) for i, text in enumerate(TEXTS)], 1, 0)
    arm = Arm("best", steering=Steering(guide, particles=2, lam=0.0, threshold=0.0))
    store = RecordStore(tmp_path)
    sample_arms(tiny_pipe, jobs, [arm], store, Sampling(3), model="x", progress=False)
    steered = best_of_n(tiny_pipe, TEXTS, [job.seed for job in jobs], guide, particles=2, eta=1.0, num_steps=3)
    expected = decode_latents(tiny_pipe, steered.latents)
    for i, record in enumerate(sorted(store.load(), key=lambda r: r.prompt_id)):
        assert np.array_equal(read(store, record), expected[i])
        assert record.score == pytest.approx(steered.scores[i].max().item(), abs=1e-5)
        assert record.steering is not None and record.steering["particles"] == 2
    assert sample_arms(tiny_pipe, jobs, [arm], RecordStore(tmp_path), Sampling(3), model="x", progress=False) == 0


def test_images_steered_by_another_head_or_aim_are_refused(tiny_pipe, parts, tmp_path: Path) -> None:
    jobs = list_jobs([Prompt("p", TEXTS[0])], 1, 0)
    rating = load_head(parts["rating"])
    other = load_head(parts["rating"])
    with torch.no_grad():
        next(other.parameters()).add_(1)

    def run(guide: MidBlockGuide) -> int:
        arm = Arm("best", steering=Steering(guide, particles=2, lam=0.0, threshold=0.0))
        return sample_arms(tiny_pipe, jobs, [arm], RecordStore(tmp_path), Sampling(2), model="x", progress=False)

    assert run(MidBlockGuide(rating)) == 1 and run(MidBlockGuide(rating)) == 0
    for guide in (MidBlockGuide(other), MidBlockGuide(rating, objective="at_least", target=7)):
        with pytest.raises(UserError, match="made with steering="):
            run(guide)


def test_images_steered_to_another_text_are_refused_where_records_name_it(tiny_pipe, parts, tmp_path: Path) -> None:
    """Records of earlier versions name the networks that scored, not the texts."""
    jobs = list_jobs([Prompt("p", TEXTS[0])], 1, 0)

    def run(text: str) -> int:
        guide = EmbeddingGuide(load_head(parts["clip"]), load_clip("testbed"), texts=[text])
        arm = Arm("best", steering=Steering(guide, particles=2, lam=0.0, threshold=0.0))
        return sample_arms(tiny_pipe, jobs, [arm], RecordStore(tmp_path), Sampling(2), model="x", progress=False)

    assert run(TEXTS[0]) == 1 and run(TEXTS[0]) == 0
    with pytest.raises(UserError, match="made with steering="):
        run(TEXTS[1])
    file = tmp_path / "records.jsonl"
    values = json.loads(file.read_text())
    values["steering"] = {k: v for k, v in values["steering"].items() if k not in ("texts", "images")}
    file.write_text(json.dumps(values) + "\n")
    assert run(TEXTS[1]) == 0


def read(store: RecordStore, record: Any) -> np.ndarray:
    return np.asarray(Image.open(store.folder / record.image)).astype(int)


def test_precision_and_recall_are_the_definition() -> None:
    """Against the formula written out, pair by pair (Kynkaanniemi et al. 2019, equations 1 and 2)."""
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(60, 3)), rng.normal(loc=0.7, scale=0.6, size=(50, 3))

    def covered(points: np.ndarray, centres: np.ndarray, k: int) -> float:
        radii = [np.sort(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
        hits = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return float(np.mean(hits))

    for k in (1, 3):
        found = precision_recall(real, fake, k)
        assert found.precision == pytest.approx(covered(fake, real, k))
        assert found.recall == pytest.approx(covered(real, fake, k))
    assert found.precision > found.recall  # narrow samples look real and miss most of the world
    same = precision_recall(real, real)
    assert same.precision == same.recall == 1
    with pytest.raises(UserError, match="more rows"):
        precision_recall(real, fake[:3])
