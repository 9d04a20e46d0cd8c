"""``sample/sweep.py`` for real on a random pipeline: pairing, kills, other processes, memory, and bad input."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import make_head
from PIL import Image
from test_claims import elsewhere, set_back

from guidance.guides import MidBlockGuide
from guidance.heads import save_head
from guidance.models.denoiser import fingerprint
from guidance.runs.claims import Claims
from guidance.runs.folder import CLAIMS_FOLDER, MAX_COLUMNS, load_settings, write_sheets
from guidance.runs.records import RecordStore, audit_pairs
from guidance.runs.run import Task, UnitSampler, list_jobs
from guidance.runs.sweep import Cell
from guidance.runs.sweep_folder import LOCK
from guidance.runs.sweep_run import Divider, fill_units, find_batch_size, unit_name
from guidance.utils.errors import UserError, is_out_of_memory
from sample.sweep import SweepConfig, default_output, main, run_sweep

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["a red balloon over the sea at dusk", "a blue tree in the snow at night"]
CELLS = ["unguided", "scale=-2", "scale=1", "cfg_scale=6"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def words(tiny_pipe, tiny_folder, tmp_path_factory) -> list[str]:
    """A command line without an output: two prompts, three seeds, four cells, three batches each."""
    folder = tmp_path_factory.mktemp("heads") / "random"
    save_head(make_head(tiny_pipe, hidden=16, base_fingerprint=fingerprint(tiny_pipe.unet)), folder)
    options = ["scale=[1, -2]", "seeds_per_prompt=3", "num_steps=2", "batch_size=2", "device=cpu"]
    options += ["start=null", f"prompts={TEXTS}", f"model={tiny_folder}", f"head={folder}", "cfg_scales_matched=[6]"]
    return options


@pytest.fixture(scope="module")
def done(words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep with spaces") / "out"
    main([*words, f"output={folder}"])
    return folder


def image_hashes(folder: Path) -> dict[str, str]:
    files = sorted(f for f in (folder / "images").rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def read_image(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def stopped(words: list[str], capsys) -> str:
    """What a command that exits with 2 says."""
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_a_sweep_is_whole_and_paired(done: Path) -> None:
    records = RecordStore(done).load(check="sha256")
    assert len(records) == 24 and list(dict.fromkeys(r.arm for r in records)) == CELLS
    names = {"config.yaml", "grid.png", "images", "records.jsonl", "sheets"}
    assert {p.name for p in done.iterdir()} == names
    pairs = audit_pairs([r for r in records if r.arm != "cfg_scale=6"])
    assert set(pairs) == {"scale=1", "scale=-2"} and all(len(rows) == 6 for rows in pairs.values())
    assert {r.cfg_scale for r in records if r.arm == "cfg_scale=6"} == {6.0}
    assert {r.noise_hash for r in records if r.arm == "cfg_scale=6"} == {r.noise_hash for r in records}
    settings = load_settings(done)
    assert settings is not None and [cell["name"] for cell in settings["cells"]] == CELLS
    sheets = sorted((done / "sheets").iterdir())
    assert [s.stem for s in sheets] == sorted({r.prompt_id for r in records})
    columns, rows = read_image(sheets[0]).shape[1] // 160, read_image(sheets[0]).shape[0] // 160
    assert columns >= 4 and rows >= 3


def test_the_same_command_samples_nothing_twice(done: Path, words, monkeypatch, capsys) -> None:
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in done.rglob("*.*") if f.name != "grid.png"}
    with monkeypatch.context() as patch:
        patch.setattr("guidance.runs.run.sample_latents", None)
        main([*words, f"output={done}"])
    assert before == {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in done.rglob("*.*") if f.name != "grid.png"}
    assert f"grid: {done / 'grid.png'}" in capsys.readouterr().out


#: Loads once, forks a run and kills it, as often as asked: at a random moment, or at a random system call that writes.
KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import guidance.runs.sweep_run, guidance.runs.sweep_tracking
from guidance.models.pipelines import load_pipeline
from sample.sweep import main
kills, longest, calls, seed, folder, *words = sys.argv[1:]
load_pipeline(next(w for w in words if w.startswith("model=")).partition("=")[2])
draw = random.Random(int(seed))
def limited(left):
    for name in ("link", "replace", "fsync", "rename", "unlink", "utime"):
        def dying(*a, real=getattr(os, name), **k):
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a, **k)
        setattr(os, name, dying)
for kill in range(int(kills)):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if kill % 2:
            limited([draw.randint(1, int(calls))])
        main([*words, f"output={folder}"])
        os._exit(0)
    if kill % 2 == 0:
        while not os.path.isdir(os.path.join(folder, ".claims")) and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, float(longest)))
        os.kill(child, signal.SIGKILL)
    draw.random()
    try:
        code = os.waitpid(child, 0)[1]
    except ChildProcessError:
        code = 0
    count = sum(open(os.path.join(folder, n)).read().count(chr(10)) for n in os.listdir(folder) if "records" in n)
    print("killed" if code == signal.SIGKILL else "finished", count, flush=True)
"""


def test_killed_anywhere_it_ends_with_the_same_bytes(done: Path, words, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-c", KILLER, "5", "0.5", "60", "1", str(folder), *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    rounds = [line.split() for line in result.stdout.splitlines() if line.startswith(("killed", "finished"))]
    assert len(rounds) == 5 and [word for word, _ in rounds].count("killed") >= 3, result.stdout
    main([*words, f"output={folder}"])
    assert image_hashes(folder) == image_hashes(done) and len(image_hashes(done)) == 24
    lines = [line for file in folder.glob("records*.jsonl") for line in file.read_bytes().splitlines()]
    assert len(lines) == 24  # nothing was recorded twice
    assert {p.name for p in folder.iterdir()} == {p.name for p in done.iterdir()}
    for file in ("grid.png", *(f"sheets/{s.name}" for s in (done / "sheets").iterdir())):
        assert np.array_equal(read_image(folder / file), read_image(done / file))


def test_two_processes_make_the_same_bytes(done: Path, words, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "sample.sweep", *words, f"output={folder}", "tracker=tensorboard"]
    options = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(launch, env=options, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("grid:") == 1  # one process speaks
    made = [len((folder / name).read_bytes().splitlines()) for name in ("records.jsonl", "records-1.jsonl")]
    assert sum(made) == 24 and min(made) >= 6
    assert image_hashes(folder) == image_hashes(done)
    assert not (folder / CLAIMS_FOLDER).exists() and list((folder / "tracking").rglob("events*"))


def test_a_second_sweep_is_refused_or_joins(done: Path, words, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "out"
    with Claims(folder / CLAIMS_FOLDER) as other:
        assert other.take(LOCK) and other.take_number("writer") == 0
        message = stopped([*words, f"output={folder}"], capsys)
        assert f"process {os.getpid()} on " in message and "since" in message and "join=true" in message
        assert "another sweep" not in message and list(folder.iterdir()) == [folder / CLAIMS_FOLDER]
        assert "got both" in stopped([*words, f"output={folder}", "--join", "--fresh"], capsys)
        (folder / "config.yaml").write_bytes((done / "config.yaml").read_bytes())
        main([*words, f"output={folder}", "--join"])
        assert image_hashes(folder) == image_hashes(done) and other.holds(LOCK)
        assert (folder / "records-1.jsonl").is_file() and not (folder / "records.jsonl").exists()
        message = stopped([*words, f"output={folder}", "join=true", "scale=[7]"], capsys)
        assert "does not fill 'scale=7'" in message
        message = stopped([*words, f"output={folder}", "fresh=true"], capsys)
        assert "at work" in message and image_hashes(folder) == image_hashes(done)


def test_the_units_of_a_stalled_process_are_redone(done: Path, words, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    other = elsewhere(Claims(folder / CLAIMS_FOLDER, 3600))
    units = tiny_units(done)
    assert other.take(LOCK) and all(other.take(unit_name(unit)) for unit in units[:2])
    for name in (LOCK, *map(unit_name, units[:2])):
        set_back(folder / CLAIMS_FOLDER, name, 3600)
    main([*words, f"output={folder}", "stalled_after=0.8"])
    assert image_hashes(folder) == image_hashes(done) and not other.holds(LOCK)


def test_recommend_evaluates_with_the_words_that_are_given(done: Path, words, monkeypatch) -> None:
    ran: list[tuple[str, list[str]]] = []
    monkeypatch.setattr("guidance.utils.processes.run_script", lambda module, words: ran.append((module, words)))
    more = ["evaluate=[clip=judge-clip, reference_size=300]", "metric=truth", "limit=[]", "--recommend"]
    main([*words, f"output={done}", *more])
    (first, asked), (second, chosen) = ran
    assert (first, second) == ("eval.images", "eval.recommend")
    assert asked[:2] == [str(done), "baseline=unguided"] and asked[-2:] == ["clip=judge-clip", "reference_size=300"]
    assert chosen == [str(done), "metric=truth", "limit=[]"]


def tiny_units(done: Path) -> list:
    """Units as the sweep of ``done`` has them, as far as their names go."""
    from guidance.data.prompts import load_prompts
    from guidance.runs.arms import Arm
    from guidance.runs.run import list_batches

    jobs = list_jobs(load_prompts(TEXTS), 3, 0)
    cells = [Cell.from_dict(values) for values in (load_settings(done) or {})["cells"]]
    return [
        tuple(Task(job, Arm(cell.name), cell.sampling) for job in batch)
        for batch in list_batches(jobs, 2)
        for cell in cells
    ]


class Fake(UnitSampler):
    """A sampler of units that takes no time."""

    def __init__(self, store: RecordStore, units: list, real: Path) -> None:
        self.store, self._records = store, {r.key: r for r in RecordStore(real).load()}
        self.sampled: list[str] = []

    def missing(self, unit) -> list:
        return [task for task in unit if not self.store.has(*task.key)]

    def images(self, unit) -> list:
        self.sampled.append(unit_name(unit))
        return [(self._records[task.key], np.zeros((8, 8, 3), np.uint8)) for task in unit]


def test_what_was_lost_while_asleep_is_not_written(done: Path, tmp_path: Path) -> None:
    """The process that took a unit over wrote it already."""
    units = tiny_units(done)[:3]
    mine, theirs = Claims(tmp_path / "c"), Claims(tmp_path / "c")
    sampler = Fake(RecordStore(tmp_path), units, done)
    other = Fake(RecordStore(tmp_path, 1), units, done)
    first = sampler.images

    def slow(unit):
        made = first(unit)
        if len(sampler.sampled) == 1:  # asleep for long: the claim is taken, the unit done
            (tmp_path / "c" / f"{unit_name(unit)}.claim").unlink()
            assert fill_units([unit], Divider(other, 2, halve=False, report=print), theirs) == 2
        return made

    sampler.images = slow  # type: ignore[method-assign]
    assert fill_units(units, Divider(sampler, 2, halve=False, report=print), mine) == 4
    assert len((tmp_path / "records.jsonl").read_bytes().splitlines()) == 4
    assert len((tmp_path / "records-1.jsonl").read_bytes().splitlines()) == 2
    assert len(RecordStore(tmp_path)) == 6


def test_a_shared_store_follows_the_others(done: Path, tmp_path: Path) -> None:
    lines = (done / "records.jsonl").read_bytes().splitlines(keepends=True)
    store = RecordStore(tmp_path)
    (tmp_path / "records-1.jsonl").write_bytes(lines[0] + lines[1][:30])
    store.refresh()
    assert len(store) == 1
    (tmp_path / "records-1.jsonl").write_bytes(b"".join(lines[:3]))
    store.refresh()
    assert len(store) == 3 and len(RecordStore(tmp_path)) == 3
    with open(tmp_path / "records-1.jsonl", "ab") as stream:
        stream.write(b"{}\n")
    with pytest.raises(UserError, match=r"records-1\.jsonl"):
        store.refresh()


def out_of_memory_above(size: int, monkeypatch, text: str = "CUDA out of memory. Tried to allocate") -> list[int]:
    from guidance.runs import run

    real, tried = run.sample_latents, []

    def limited(pipe, prompts, *arguments, **options):
        tried.append(len(prompts))
        if len(prompts) > size:
            raise RuntimeError(text)
        return real(pipe, prompts, *arguments, **options)

    monkeypatch.setattr(run, "sample_latents", limited)
    return tried


def test_out_of_memory_halves_the_batch(done: Path, words, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "out"
    small = [*words, f"output={folder}", "scale=1", "cfg_matched=false", "cfg_scales_matched=[]", "batch_size=auto"]
    tried = out_of_memory_above(1, monkeypatch, "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate")
    main(small)
    shown = capsys.readouterr()
    assert "Out of memory with 6 images at once: going on with 3." in shown.out + shown.err
    assert tried[:3] == [6, 3, 1] and set(tried[2:]) == {1}
    assert (load_settings(folder) or {})["batch_size"] == 1
    for name in image_hashes(folder):
        assert np.abs(read_image(folder / name).astype(int) - read_image(done / name)).max() <= 1
    (folder / "records.jsonl").write_bytes((folder / "records.jsonl").read_bytes()[:-200])
    tried.clear()
    main(small)
    assert tried == [1]  # what fits is remembered
    capsys.readouterr()
    message = stopped([*words, f"output={tmp_path / 'fixed'}", "batch_size=2"], capsys)
    assert "memory for a batch of 2" in message and "batch_size=auto" in message
    monkeypatch.undo()
    out_of_memory_above(0, monkeypatch)
    assert "half-precision" in stopped([*words, f"output={tmp_path / 'none'}", "batch_size=auto"], capsys)


def test_memory_that_runs_out_inside_a_guided_step_halves_the_batch(words, tmp_path: Path, monkeypatch) -> None:
    """There it is a sentence that says what to turn, with the error behind it."""
    from diffusers import UNet2DConditionModel

    real, tried = UNet2DConditionModel.forward, []

    @functools.wraps(real)  # guidance reads its signature
    def limited(self, sample, *arguments, **options):
        tried.append(len(sample))
        if len(sample) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return real(self, sample, *arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", limited)
    small = ["scale=1", "baseline=false", "cfg_matched=false", "cfg_scales_matched=[]", "cfg_scale=1"]
    main([*words, *small, "batch_size=auto", f"output={tmp_path / 'out'}"])
    assert tried[0] == 6 and max(tried[2:]) <= 2 and len(RecordStore(tmp_path / "out").load()) == 6


def test_what_fits_is_found_with_the_most_costly_cell(tiny_pipe, done: Path, tmp_path: Path) -> None:
    class Small(Fake):
        def images(self, unit) -> list:
            if len(unit) > 1:
                raise MemoryError
            return super().images(unit)

    units = tiny_units(done)[:4]
    guided = dataclasses.replace(units[1][0].arm, guides=(MidBlockGuide(make_head(tiny_pipe)),))
    units[1] = tuple(dataclasses.replace(task, arm=guided) for task in units[1])
    sampler, said = Small(RecordStore(tmp_path), units, done), []
    divider = Divider(sampler, 64, halve=True, report=lambda text, size: said.append(size))
    assert find_batch_size(divider, units) == 1 and said == [1]
    assert {r.arm for r in RecordStore(tmp_path).load()} == {"scale=-2"} and len(RecordStore(tmp_path)) == 2
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))


def test_cells_are_added_and_another_config_is_refused(words, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "out"
    small = [*words, f"output={folder}", "seeds_per_prompt=1", "cfg_matched=false", "cfg_scales_matched=[]"]
    main([*small, "scale=1"])
    before = image_hashes(folder)
    for change, shown in (("seed=7", "seed=0 (now 7)"), ("normalize=null", "normalize='cfg' (now None)")):
        message = stopped([*small, change], capsys)
        assert shown in message and "fresh=true" in message
    assert image_hashes(folder) == before
    main([*small, "scale=[1, 3]", "num_steps=[2, 3]"])
    names = [cell["name"] for cell in (load_settings(folder) or {})["cells"]]
    new = ["unguided, num_steps=3", "scale=1, num_steps=3", "scale=3, num_steps=3", "scale=3"]
    assert set(names) == {"unguided", "scale=1", *new}
    after = image_hashes(folder)
    assert before.items() < after.items() and len(after) == 12
    main([*small, "--fresh", "scale=0", "seed=7"])
    assert len(image_hashes(folder)) == 2 and image_hashes(tmp_path / "out.old-1") == after
    assert not (tmp_path / "out.old-1" / CLAIMS_FOLDER).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "it has other files" in stopped([*small, f"output={tmp_path / 'mine'}"], capsys)


def test_a_dry_run_writes_nothing(done: Path, words, tmp_path: Path, capsys) -> None:
    main([*words, f"output={tmp_path / 'out'}", "--dry-run"])
    message = capsys.readouterr().out
    assert "4 cells x 6 noises = 24 images, 0 of them done" in message and "96 forward passes" in message
    assert "guided steps to make: 24; one of midblock costs about" in message and "GB are free" in message
    assert "timed with a batch of 2 images" in message and not list(tmp_path.iterdir())
    before = {f: f.stat().st_mtime_ns for f in done.rglob("*")}
    main([*words, f"output={done}", "scale=[1, 5]", "--dry-run"])
    message = capsys.readouterr().out
    assert "5 cells x 6 noises = 30 images, 24 of them done" in message and "by the records of 24 images" in message
    assert before == {f: f.stat().st_mtime_ns for f in done.rglob("*")}


def test_tracking_that_fails_ends_nothing(words, tmp_path: Path, monkeypatch) -> None:
    from guidance.utils import tracking

    def fail(*arguments: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setitem(tracking._TABLES, "tensorboard", fail)
    options = ["scale=0", "seeds_per_prompt=1", "cfg_matched=false", "cfg_scales_matched=[]"]
    options += ["tracker=tensorboard"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main([*words, *options, f"output={tmp_path / 'out'}"])
    assert any("no route to host" in str(w.message) for w in caught)
    assert len(image_hashes(tmp_path / "out")) == 2 and list((tmp_path / "out" / "tracking").rglob("events*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scales=[1]", "Did you mean 'scale'"),
        ("scale=[]", "got an empty list"),
        ("scale=two", "Expected a number or a list of numbers for 'scale', got 'two'"),
        ("scale=[1, .nan]", "Expected a finite number for 'scale"),
        ("num_steps=[2.5]", "Expected whole numbers for 'num_steps', got 2.5"),
        ("combine=zip; start=[0, 0.1, 0.2]", "scale has 2, start has 3"),
        ("scheduler=[ddim, dimm]", "Did you mean 'ddim'"),
        ("head=null", "Expected a head for scale"),
        ("head=[a, b]; guide=midblock", "write heads as guides"),
        ("guide=[3]", "Expected guides as NAME"),
        ("batch_size=0", "batch_size of at least 1 or auto"),
        ("stalled_after=0", "stalled_after in seconds above 0"),
        ("cfg_matched=false", "Expected cfg_matched=true with cfg_scales_matched"),
        ("output=FILE/out", "Expected a folder at"),
    ],
)
def test_bad_input_gets_a_sentence(change: str, message: str, words, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    changes = change.replace("FILE", str(tmp_path / "empty.txt")).split("; ")
    error = stopped([*words, f"output={tmp_path / 'out'}", *changes], capsys)
    assert message in error.splitlines()[-1] and "Traceback" not in error
    assert {p.name for p in tmp_path.rglob("*")} == {"empty.txt"}


def test_many_cells_are_shown_on_pages(done: Path, tmp_path: Path) -> None:
    """A page is held in memory: its size must not grow with the number of cells."""
    store = RecordStore(done)
    other = RecordStore(tmp_path)
    one = next(r for r in store.load() if r.arm == "unguided")
    arms = [f"a{i}" for i in range(MAX_COLUMNS + 30)]
    for arm in arms:
        record = dataclasses.replace(one, arm=arm, image=f"images/{arm}/x.png")
        other.append(record, np.zeros((8, 8, 3), np.uint8))
    write_sheets(other, other.load(), arms)
    sheets = sorted((tmp_path / "sheets").iterdir())
    assert [s.name for s in sheets] == [f"{one.prompt_id}{end}.png" for end in ("-2", "-3", "")]
    widths = [read_image(sheet).shape[1] for sheet in sheets]
    assert widths[0] == widths[2] > widths[1]  # 24, 1 + 23 and 1 + 7 columns
    before = [sheet.stat().st_mtime_ns for sheet in sheets]
    write_sheets(other, other.load(), arms)
    assert before == [sheet.stat().st_mtime_ns for sheet in sheets]


def test_the_function_runs_without_words(tiny_folder, tmp_path: Path, capsys) -> None:
    config = SweepConfig(scale=0, num_steps=[1, 2], num_prompts=2, model=str(tiny_folder), output=str(tmp_path / "o"))
    records = RecordStore(run_sweep(config, progress=False)).load()
    assert capsys.readouterr().out == ""
    assert {r.arm for r in records} == {"unguided, num_steps=1", "unguided, num_steps=2"}
    same = SweepConfig(scale=[1, 2], batch_size=3, cfg_matched=True)
    assert default_output(same) == default_output(SweepConfig()) != default_output(SweepConfig(seed=1))
