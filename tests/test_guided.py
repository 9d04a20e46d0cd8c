"""``sample/guided.py`` for real on a random pipeline: pairing, resuming after a kill, and bad input."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_head
from PIL import Image

from guidance.data.prompts import Prompt
from guidance.guides import MidBlockGuide
from guidance.heads import save_head
from guidance.models.denoiser import fingerprint
from guidance.runs.arms import guide_arms
from guidance.runs.records import RecordStore, audit_pairs
from guidance.runs.run import Sampling, list_jobs, sample_arms
from sample.guided import GuidedConfig, default_output, main, read_words, sample_guided

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["a red balloon over the sea at dusk", "a blue tree in the snow at night"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def head(tiny_pipe):
    return make_head(tiny_pipe, hidden=16, base_fingerprint=fingerprint(tiny_pipe.unet))


@pytest.fixture(scope="module")
def words(tiny_folder, head, tmp_path_factory) -> list[str]:
    """A command line without an output: two prompts, two seeds, three arms, two batches each."""
    folder = tmp_path_factory.mktemp("heads") / "random"
    save_head(head, folder)
    options = ["scales=[0, 1, -2]", "seeds_per_prompt=2", "num_steps=3", "batch_size=3", "device=cpu"]
    return [*TEXTS, "--model", str(tiny_folder), "--head", str(folder), *options]


@pytest.fixture(scope="module")
def done(words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run with spaces") / "out"
    main([*words, f"output={folder}"])
    return folder


def read_image(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def image_hashes(folder: Path) -> dict[str, str]:
    files = sorted((folder / "images").rglob("*.*"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_a_run_is_whole_and_paired(done: Path) -> None:
    records = RecordStore(done).load(check="sha256")
    assert len(records) == 12 and {p.name for p in done.iterdir()} == {
        "config.yaml",
        "grid.png",
        "images",
        "records.jsonl",
    }
    pairs = audit_pairs(records)
    assert set(pairs) == {"scale=1", "scale=-2"}
    for a, b in (pair for rows in pairs.values() for pair in rows):
        assert (read_image(done / a.image) != read_image(done / b.image)).any()
    assert {r.seed for r in records} == {0, 1, 1000, 1001} and len({r.noise_hash for r in records}) == 4
    for r in records:
        assert (r.score is None) == (r.arm == "unguided") and r.seconds > 0 and not r.nan_skipped
        assert r.scheduler == "DDIMScheduler" and r.num_steps == 3 and not r.truncated
        assert (r.steps, r.gradients, r.pushes) == ((3, 0, 0) if r.arm == "unguided" else (3, 3, 3))
    guide = next(r for r in records if r.arm == "scale=-2").guides[0]
    assert guide["guidance_scale"] == -2 and guide["normalize"] == "cfg" and guide["stop"] == 1.0
    assert yaml.safe_load((done / "config.yaml").read_text())["scales"] == [0.0, 1.0, -2.0]
    assert read_image(done / "grid.png").shape[2] == 3


def test_two_processes_make_the_same_bytes_and_one_goes_on(done: Path, words, tmp_path: Path) -> None:
    """Real processes; then one image of each process is lost, and a single process makes it anew."""
    folder = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "sample.guided"]
    options = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*launch, *words, f"output={folder}"], env=options, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("grid:") == 1  # one process speaks
    made = [len((folder / name).read_bytes().splitlines()) for name in ("records.jsonl", "records-1.jsonl")]
    assert sum(made) == len(RecordStore(done)) == 12 and min(made) >= 4
    assert image_hashes(folder) == image_hashes(done)
    assert np.array_equal(read_image(folder / "grid.png"), read_image(done / "grid.png"))
    for name in ("records.jsonl", "records-1.jsonl"):
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        (folder / name).write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    main([*words, f"output={folder}"])
    assert image_hashes(folder) == image_hashes(done) and len(RecordStore(folder).load(check="sha256")) == 12


def test_the_same_command_samples_nothing_twice(done: Path, words, monkeypatch, capsys) -> None:
    before = (done / "records.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("guidance.runs.run.sample_latents", None)
        main([*words, f"output={done}", "batch_size=2"])
    shown = capsys.readouterr().out
    assert (done / "records.jsonl").read_bytes() == before
    assert "scale=-2" in shown and f"grid: {done / 'grid.png'}" in shown and "x unguided" in shown


def test_another_config_is_refused_and_scales_are_added(words, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "out"
    small = [*words, f"output={folder}", "seeds_per_prompt=1", "num_steps=1"]
    main([*small, "scales=[1]"])
    before = image_hashes(folder)
    for change, shown in (("cfg_scale=3", "cfg_scale=4.0 (now 3.0)"), ("seed=7", "seed=0 (now 7)")):
        with pytest.raises(SystemExit) as stopped:
            main([*small, change])
        assert stopped.value.code == 2 and shown in capsys.readouterr().err
    assert image_hashes(folder) == before
    main([*small, "scales=[3]"])
    added = image_hashes(folder)
    assert before.items() < added.items() and len(added) == 6
    main([*small, "cfg_scale=3", "scales=[0]", "fresh=true"])
    assert len(image_hashes(folder)) == 2 and image_hashes(tmp_path / "out.old-1") == added


def test_images_made_in_another_way_are_refused(words, tmp_path: Path, capsys) -> None:
    """A prompt file or a head that changed under the same name does not show in the config."""
    file = tmp_path / "prompts.txt"
    file.write_text(TEXTS[0])
    small = [*words[2:], f"output={tmp_path / 'out'}", "num_steps=1", "scales=[0]", f"prompts={file}"]
    main(small)
    file.write_text(TEXTS[1])
    with pytest.raises(SystemExit) as stopped:
        main(small)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "prompt='a blue tree" in message and "fresh=true" in message


def test_skipped_gradients_are_counted_per_image(tiny_pipe, head, tmp_path: Path) -> None:
    class Faulty(type(head)):
        def forward(self, h, t):
            return super().forward(h, t) * torch.tensor([float("nan"), 1.0])[: len(h), None]

    faulty = Faulty(head.config)
    faulty.load_state_dict(head.state_dict())
    jobs = list_jobs([Prompt("a", TEXTS[0]), Prompt("b", TEXTS[1] + " x" * 40)], 1, 0)
    store = RecordStore(tmp_path)
    arms = guide_arms([MidBlockGuide(faulty)], [2.0])
    sample_arms(tiny_pipe, jobs, arms, store, Sampling(num_steps=3), model="x", progress=False)
    records = {r.key[:2]: r for r in store.load()}
    assert [records["scale=2", p].nan_skipped for p in "ab"] == [3, 0]
    assert [records["scale=2", p].score is None for p in "ab"] == [True, False]
    # The guided step runs the two parts of CFG apart: some CPUs then round in another order (one grey level).
    images = {key: read_image(tmp_path / record.image).astype(int) for key, record in records.items()}
    changes = [np.abs(images["unguided", p] - images["scale=2", p]).max() for p in "ab"]
    assert changes[0] <= 1 < changes[1]
    assert [records["unguided", p].truncated for p in "ab"] == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scales=[1, .nan]", "Expected a finite number for 'scales"),
        ("head=null", "Expected a head for scale 1, got none"),
        ("prompts=3", "Expected prompts as a set, a file or a list"),
        ("num_steps=0", "Expected num_steps from 1 to 1000, got 0"),
        ("batch_size=0", "Expected a batch_size of at least 1"),
        ("seeds_per_prompt=0", "Expected 1 to 1000 seeds per prompt"),
        ("scheduler=dimm", "Did you mean 'ddim'"),
        ("scale=[1]", "Did you mean 'scales'"),
        ("output=FILE/out", "Expected a folder at"),
    ],
)
def test_bad_input_gets_a_sentence(change: str, message: str, words, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    change = change.replace("FILE", str(tmp_path / "empty.txt"))
    given = words[2:] if change.startswith("prompts") else words
    with pytest.raises(SystemExit) as stopped:
        main([*given, f"output={tmp_path / 'out'}", "scales=[1]", change])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error, error
    assert {p.name for p in tmp_path.rglob("*")} == {"empty.txt"}


def test_words_become_options(tmp_path: Path, monkeypatch, capsys) -> None:
    assert read_words(["a: b #1", "seed=1 # y", "--num-steps=3", "--config", "f", "--help"]) == [
        "seed=1 # y",
        "num_steps=3",
        "--config",
        "f",
        "--help",
        'prompts=["a: b #1"]',
    ]
    # prompts that a file system or an equals sign could be taken for; a key that is nearly one is a slip
    for text in ("夕暮れの海に浮かぶ赤い風船" * 20, "steps=3 of a stair", "E=mc^2 on a blackboard"):
        assert read_words([text]) == [f"prompts={json.dumps([text], ensure_ascii=False)}"]
    assert read_words(["num_step=3 4"]) == ["num_step=3 4"]
    text = 'say "hi" \\ there: #1, ein Bär 🐻 '
    with pytest.raises(SystemExit) as stopped:
        main([text, "--print-config"])
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["prompts"] == [text]
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("x")
    for words, message in ((["mine.txt"], "write prompts=mine.txt"), (["--head"], "a value after '--head'")):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_particles_and_variants_of_cfg_from_the_command_line(words, tmp_path: Path, capsys) -> None:
    options = ["scales=[2]", "seeds_per_prompt=1", "num_steps=2", "particles=2", "cfg_rescale=0.7"]
    options += ["cfg_stop=0.5"]
    main([*words, *options, f"output={tmp_path / 'out'}"])
    records = RecordStore(tmp_path / "out").load()
    assert {r.arm for r in records} == {"unguided", "steered", "scale=2, steered"}
    assert all(r.cfg == {"rescale": 0.7, "start": 0.0, "stop": 0.5, "modulate": None} for r in records)
    assert all((r.steering is None) == (r.arm == "unguided") for r in records)
    assert {r.arm for r in records if r.guides} == {"scale=2, steered"}
    for change, message in (
        ("scales=[0]", "a scale other than 0 with particles"),
        ("particles=0", "at least 1"),
        ("eta=0", "draws noise"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*words, *options, f"output={tmp_path / 'bad'}", change])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
        assert not list((tmp_path / "bad").rglob("*.png"))


def test_the_default_folder_is_one_per_experiment() -> None:
    first = default_output(GuidedConfig(prompts=["A red boat!"]))
    assert first.parent == Path("runs/samples") and first.name.startswith("a-red-boat-")
    same = GuidedConfig(prompts=["A red boat!"], scales=[3.0], batch_size=2, fresh=True)
    assert default_output(same) == first != default_output(GuidedConfig(prompts=["A red boat!"], seed=1))


def test_the_function_runs_without_words(tiny_folder, tmp_path: Path, capsys) -> None:
    options = {"num_steps": 1, "scales": [0.0], "head": None, "scheduler": "euler", "num_prompts": 2}
    config = GuidedConfig(model=str(tiny_folder), output=str(tmp_path / "out"), **options)
    records = RecordStore(sample_guided(config, progress=False)).load()
    assert capsys.readouterr().out == "" and [r.arm for r in records] == ["unguided"] * 2
    assert records[0].prompt_id == "testbed-test-0000" and records[0].scheduler == "EulerDiscreteScheduler"
