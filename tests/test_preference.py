"""Preference studies without a browser: queues, stored votes, statistics, simulated raters, refusals."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eval.preference import __main__ as preference
from eval.preference import votes as preference_votes
from eval.preference.analysis import (
    agreement,
    analyse,
    answer_table,
    bradley_terry,
    clustered_interval,
    krippendorff_alpha,
    metric_agreement,
    position_bias,
    preference_rate,
)
from eval.preference.config import FolderConfig, Plan, ServeConfig, SimulateConfig
from eval.preference.simulate import check_coverage, prefer, true_rate
from eval.preference.study import find_images, load_study, open_study, queue, votes_needed
from eval.preference.votes import Vote, VoteStore, count_votes, current_votes, read_lines
from eval.stats.paired import wilson
from guidance.runs.records import Record, RecordStore
from guidance.utils.config import list_words, parse_config
from guidance.utils.errors import UserError

PROMPTS = ["a fox", "<script>alert(1)</script>", "two hens & a \u202e cat", '"quoted" prompt']


def write_run(folder: Path, arms: tuple[str, ...] = ("unguided", "scale=2"), n: int = 12, size: int = 24) -> Path:
    """Write a run of noise images, each arm a little brighter than the one before."""
    store = RecordStore(folder)
    for a, arm in enumerate(arms):
        for i in range(n):
            guides = [{"method": "midblock", "name": "g", "guidance_scale": float(a)}] if a else []
            record = Record(
                prompt_id=f"p{i:02}", prompt=PROMPTS[i] if i < len(PROMPTS) else f"prompt {i}", category="",
                challenge="", seed=i, noise_hash=str(i), arm=arm, guides=guides, cfg_scale=4.0, scheduler="DDIM",
                num_steps=5, model="m", model_fingerprint="f", dtype="float32", image=f"images/{arm}/{i}.png",
                sha256="", bytes=0, seconds=0.1, batch_size=1, score=None, nan_skipped=0, truncated=False, head="",
                version="test",
            )  # fmt: skip
            noise = np.random.default_rng([a, i]).integers(0, 200, (size, size, 3), dtype=np.uint8)
            store.append(record, noise + np.uint8(20 * a))
    return folder


def vote(rater: str, trial: int, choice: str | None, **changes: object) -> Vote:
    answers = None if choice is None else {"looks": choice}
    cast = Vote("", 0.0, "s", rater, trial, "pair", f"p{trial}", 0, "a", "b", False, answers, 1.0)
    return dataclasses.replace(cast, **changes)  # type: ignore[arg-type]


def votes_of(y: list[float], raters: int = 1) -> pandas.DataFrame:
    """Tabulate votes 1 (second), 0.5 or 0, spread over the prompts of each rater."""
    names = {1.0: "right", 0.5: "tie", 0.0: "left"}
    per = len(y) // raters
    return answer_table(vote(f"r{i // per}", i % per, names[float(v)]) for i, v in enumerate(y))


def make_desk(run: Path, *options: str) -> Any:
    """Make the desk of a study as `serve` does."""
    pytest.importorskip("starlette", reason="extra ui")
    pytest.importorskip("uvicorn", reason="extra ui")
    from eval.preference.server import Desk

    config = parse_config(ServeConfig, list_words([str(run), *options], "folders"), prog="", description="")
    study = open_study(config)
    return Desk(study, find_images(config.folders, study))


# Queues


def test_a_queue_is_a_function_of_seed_and_rater() -> None:
    plan = Plan(seed=3, per_rater=40)
    assert queue(100, plan, "ann") == queue(100, plan, "ann")
    assert queue(100, plan, "ann") != queue(100, plan, "bob")
    assert queue(100, plan, "ann") != queue(100, dataclasses.replace(plan, seed=4), "ann")


@pytest.mark.parametrize("rater", ["ann", "bob", "Żółć 7"])
def test_a_queue_holds_what_the_plan_says(rater: str) -> None:
    plan = Plan(per_rater=40, shared=0.25, repeats=0.2, checks=0.1)
    trials = queue(100, plan, rater)
    kinds = Counter(t.kind for t in trials)
    assert kinds == {"pair": 40, "repeat": 8, "check": 4} and [t.index for t in trials] == list(range(52))
    first = {t.item: t.index for t in trials if t.kind == "pair"}
    assert len(first) == 40 and sum(t.swapped for t in trials if t.kind == "pair") == 20
    assert all(t.index - first[t.item] >= 5 for t in trials if t.kind == "repeat")
    shared = set.intersection(*({t.item for t in queue(100, plan, str(i)) if t.kind == "pair"} for i in range(30)))
    assert len(shared) == 10 and shared <= first.keys()


def test_all_pairs_are_asked_where_there_are_few() -> None:
    assert {t.item for t in queue(7, Plan(), "ann") if t.kind == "pair"} == set(range(7))
    assert {t.item for t in queue(300, Plan(per_rater=None), "ann") if t.kind == "pair"} == set(range(300))
    assert len(queue(1, Plan(repeats=1, checks=1), "ann")) == 2


# The store


def test_a_torn_last_line_is_dropped_and_a_broken_one_named(tmp_path: Path) -> None:
    store = VoteStore(tmp_path)
    store.append(vote("ann", 0, "left"))
    line = store.path.read_bytes()
    store.path.write_bytes(line + line[:-20])
    assert len(read_lines(tmp_path)) == 1
    again = VoteStore(tmp_path)  # another process: a file of its own
    again.append(vote("ann", 1, "tie"))
    assert len(read_lines(tmp_path)) == 2 and again.path != store.path
    store.path.write_bytes(line[:30] + b"\n" + line)
    with pytest.raises(UserError, match="in line 1 of"):
        read_lines(tmp_path)
    store.path.write_bytes(line.replace(b'"left"', b'"LEFT"'))
    with pytest.raises(UserError, match="answers among left"):
        read_lines(tmp_path)


def test_undo_and_retries(tmp_path: Path) -> None:
    store = VoteStore(tmp_path)
    assert store.append(vote("ann", 0, "left")) and not store.append(vote("ann", 0, "right"))
    assert store.append(vote("ann", 0, None)) and not store.append(vote("ann", 0, None))
    assert store.append(vote("ann", 0, "right")) and store.append(vote("bob", 0, "skip"))
    for votes in (store, VoteStore(tmp_path)):
        assert [v.answers for v in votes.votes_of("ann").values()] == [{"looks": "right"}]
    lines = read_lines(tmp_path)
    assert len(lines) == 4 and len(current_votes(lines)) == 2 and count_votes(current_votes(lines)) == 1
    times = [v.time for v in lines if v.rater == "ann"]
    assert times == sorted(set(times))


def test_threads_share_a_store(tmp_path: Path) -> None:
    store = VoteStore(tmp_path)
    work = [
        threading.Thread(target=lambda r=r: [store.append(vote(r, i, "tie")) for i in range(20)])
        for r in ("ann", "ann", "bob")
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert Counter(v.rater for v in read_lines(tmp_path)) == {"ann": 20, "bob": 20}


@pytest.mark.parametrize("half", [False, True])
def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    store = VoteStore(tmp_path)
    store.append(vote("ann", 0, "left"))
    before, write = store.path.read_bytes(), os.write

    def full(file: int, data: bytes) -> int:
        if half:
            return write(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(preference_votes.os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            store.append(vote("ann", 1, "left"))
    assert store.path.read_bytes() == before and len(store.votes_of("ann")) == 1
    assert store.append(vote("ann", 1, "left")) and len(read_lines(tmp_path)) == 2


# Statistics


def test_rates_count_ties_half_and_sides_right() -> None:
    choices = ["left"] * 3 + ["right"] * 5 + ["tie"] * 2 + ["skip"]
    votes = [vote("ann", i, c) for i, c in enumerate(choices)]
    rate = preference_rate(answer_table(votes), "a", "b")
    counts = {"wins": 5, "ties": 2, "losses": 3, "skips": 1, "prompts": 10, "raters": 1}
    assert counts.items() <= rate.items() and rate["rate"] == 0.6 and rate["vote_interval"] == wilson(6, 10)
    turned = [dataclasses.replace(v, swapped=True) for v in votes]
    assert preference_rate(answer_table(turned), "a", "b")["wins"] == 3
    others = [
        vote("bob", 0, "left", kind="check"),
        vote("bob", 0, "left", kind="repeat"),
        vote("bob", 1, "tie", first="c"),
    ]
    assert preference_rate(answer_table([*votes, *others]), "a", "b") == rate
    empty = preference_rate(answer_table(votes), "a", "c")
    assert empty["wins"] + empty["ties"] + empty["losses"] == 0 and np.isnan(empty["rate"])


def test_independent_votes_give_wilsons_interval_and_copies_give_no_more() -> None:
    y = np.array([1.0] * 130 + [0.0] * 70)
    low, high = clustered_interval(y, range(200))
    assert abs(low - wilson(130, 200)[0]) < 2e-3 and abs(high - wilson(130, 200)[1]) < 2e-3
    five = np.repeat(y, 5)
    assert clustered_interval(five, np.repeat(np.arange(200), 5).tolist()) == pytest.approx((low, high), abs=1e-12)
    assert preference_rate(votes_of(np.tile(y, 5).tolist(), raters=5), "a", "b")["design_effect"] == pytest.approx(
        5, rel=0.01
    )
    assert clustered_interval(np.ones(30), [i // 3 for i in range(30)])[0] < wilson(30, 30)[0]
    assert clustered_interval(np.ones(3), ["p"] * 3) == (0.0, 1.0)


def test_numbers_of_votes() -> None:
    # 783: Fleiss' formula, as G*Power and R's power.prop.test have it for one sample
    assert votes_needed(0.55) == 783 and votes_needed(0.6) == 194 and votes_needed(0.7) == 47
    assert votes_needed(0.45) == votes_needed(0.55)
    rng = np.random.default_rng(0)
    votes = rng.binomial(783, 0.55, 4000)
    shown = np.mean([not wilson(int(k), 783)[0] <= 0.5 <= wilson(int(k), 783)[1] for k in votes])
    assert 0.77 < shown < 0.83


def test_agreement() -> None:
    # krippendorff 0.9.0: alpha(..., level_of_measurement="interval") of the same answers is 0.42598187311178237
    units = [[0, 0], [1, 1, 1], [0.5, 1, 0.5], [1, 0.5, 1], [0, 1, 0], [0, 0], [1, 1], [1, 0]]
    assert krippendorff_alpha(units) == pytest.approx(0.42598187311178237)
    assert krippendorff_alpha([[1, 1], [0, 0], [0.5]]) == 1 and np.isnan(krippendorff_alpha([[1, 1], [1, 1]]))
    votes = votes_of([1, 0, 1, 1, 1, 0, 0, 0.5], raters=2)
    found = agreement(votes)
    assert (found["pairs"], found["same"]) == (4, 0.5) and agreement(votes, within=True)["pairs"] == 0
    twice = [vote("ann", 0, "left"), vote("ann", 9, "left", kind="repeat", prompt_id="p0", swapped=True)]
    assert agreement(answer_table(twice), within=True)["same"] == 0


def test_position_bias() -> None:
    votes = answer_table(vote("ann", i, "left" if i < 70 else "right", swapped=i % 2 == 0) for i in range(100))
    bias = position_bias(votes)
    assert (bias["left"], bias["decided"]) == (70, 100) and bias["interval"][0] > 0.5
    assert preference_rate(votes, "a", "b")["rate"] == 0.5


def test_bradley_terry_finds_the_strengths() -> None:
    strengths, rng, votes = {"a": 0.0, "b": 0.6, "c": 1.5, "d": 0.2}, np.random.default_rng(0), []
    for i, (first, second) in enumerate(itertools.islice(itertools.cycle([("a", "b"), ("b", "c"), ("c", "d")]), 3000)):
        p = 1 / (1 + np.exp(strengths[first] - strengths[second]))
        votes.append(vote("ann", i, "right" if rng.random() < p else "left", first=first, second=second))
    found = bradley_terry(answer_table(votes), ["a", "b", "c", "d", "alone"])
    assert [s["arm"] for s in found] == ["a", "b", "c", "d"]
    for s in found[1:]:
        assert s["interval"][0] < strengths[s["arm"]] < s["interval"][1]
        assert abs(s["log_odds"] - strengths[s["arm"]]) < 0.35
    two = bradley_terry(votes_of([1] * 30 + [0] * 10), ["a", "b"])
    assert two[1]["rate"] == pytest.approx(30.25 / 40.5)  # half a tie is added
    # eight copies of each vote say no more about other prompts
    half = [np.subtract(*bradley_terry(votes_of(y * 8, 8), ["a", "b"])[1]["interval"]) for y in ([1] * 30 + [0] * 10,)]
    assert half[0] == pytest.approx(np.subtract(*two[1]["interval"]), rel=0.1)
    always = bradley_terry(votes_of([1] * 1000), ["a", "b"])[1]
    assert always["rate"] == pytest.approx(1000.25 / 1000.5)


def test_metrics_are_compared_with_the_majority() -> None:
    votes = votes_of([1, 1, 0, 0.5, 1, 0, 0, 0.5, 1, 1, 1, 0.5], raters=3)
    rows = [
        {"arm": arm, "prompt_id": f"p{i}", "seed": 0, "clip": value, "blur": -value}
        for arm, values in {"a": [0.0, 0.0, 0.0, 0.0], "b": [1.0, -1.0, 1.0, 1.0]}.items()
        for i, value in enumerate(values)
    ]
    metrics = {"clip": ("CLIP", "higher"), "blur": ("Blur", "lower")}
    found = metric_agreement(votes, pandas.DataFrame(rows), metrics)
    # majorities: p0 second, p1 second, p2 first by two to one... p3 a tie, which does not count
    assert [(m["metric"], m["pairs"], m["agree"]) for m in found] == [("clip", 3, 1), ("blur", 3, 1)]
    rows[0]["clip"] = None
    assert metric_agreement(votes, pandas.DataFrame(rows), metrics)[0]["pairs"] == 2


def test_simulated_raters_vote_at_their_true_rate() -> None:
    rng, d = np.random.default_rng(0), np.random.default_rng(1).normal(0.5, 1, 200_000)
    crowd = SimulateConfig(raters=4, tie=0.5, position=0.8, random_raters=0.25)
    careless = rng.random(len(d)) < 0.25
    y = prefer(d, rng.random(len(d)) < 0.5, crowd, rng, careless)
    assert abs(y.mean() - true_rate(d, crowd)) < 0.004 and 0.1 < (y == 0.5).mean() < 0.4


def test_the_interval_over_prompts_covers_and_that_of_votes_does_not() -> None:
    d = np.random.default_rng(0).normal(0.5, 1.5, 2000)
    found = check_coverage(d, SimulateConfig(), prompts=60, per_prompt=6, studies=1000)
    assert 0.93 <= found["prompts"][0] <= 0.97 and found["votes"][0] < 0.88


# The desk


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "r")


def test_nothing_tells_which_is_which(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    file = run / "images/unguided/0.png"
    metadata = PngInfo()
    metadata.add_text("arm", "unguided")
    Image.open(file).save(tmp_path / "named.png", pnginfo=metadata)
    raw = (tmp_path / "named.png").read_bytes()
    lines = (run / "records.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first |= {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    file.write_bytes(raw)
    (run / "records.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    desk = make_desk(run, "per_rater=null", "repeats=0.5", "checks=0.5")
    ids: list[str] = []
    for rater in ("ann", "bob"):
        state = desk.state(rater)
        while state["trial"]:
            assert set(state["trial"]) == {"id", "prompt", "left", "right"}
            text = json.dumps({**state, "trial": {**state["trial"], "prompt": ""}})
            assert not any(w in text for w in ("unguided", "scale", "images/", "p00", "check", "repeat"))
            for side in ("left", "right"):
                ids.append(state["trial"][side].removeprefix("image/").removesuffix(".png"))
                png = desk.image(ids[-1])
                assert png is not None and Image.open(io.BytesIO(png)).info == {}
                assert b"tEXt" not in png and b"unguided" not in png
            state = desk.vote(rater, state["trial"]["id"], {"looks": "tie"}, 1.5)
    assert len(set(ids)) == len(ids) == 2 * 2 * 24
    assert desk.image("0" * 32) is None and desk.image("../../records.jsonl") is None


def test_a_vote_on_a_pair_that_was_not_shown_is_refused(tmp_path: Path) -> None:
    from eval.preference.server import NotShown

    desk = make_desk(write_run(tmp_path / "r"))
    mine, other = desk.state("ann")["trial"]["id"], desk.state("bob")["trial"]["id"]
    for forged in (other, "0" * 32, "", None, 3, "ü"):
        with pytest.raises(NotShown):
            desk.vote("ann", forged, {"looks": "left"}, 1)
    for answers in ({}, {"looks": "both"}, {"fits": "left"}, {"looks": "left", "fits": "left"}):
        with pytest.raises(UserError, match="for each of the questions"):
            desk.vote("ann", mine, answers, 1)
    for name in ("x" * 61, "a\u202eb", 5):
        with pytest.raises(UserError, match="name of 1 to"):
            desk.state(name)
    assert not read_lines(desk.study.folder)
    assert desk.vote(" ann ", mine, {"looks": "left"}, float("inf"))["done"] == 1
    assert desk.vote("ann", mine, {"looks": "left"}, 1)["done"] == 1  # a retry
    state = desk.vote("ann", mine, None)
    assert state["done"] == 0 and state["trial"]["id"] == mine
    assert desk.state("")["rater"] != desk.state(None)["rater"]


def test_images_that_go_are_skipped_and_come_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", n=6)
    desk = make_desk(run, "repeats=0", "checks=0")
    trials = queue(6, desk.study.options, "ann")
    gone = run / f"images/scale=2/{desk.study.items[trials[0].item].seed}.png"
    other = run / f"images/unguided/{desk.study.items[trials[1].item].seed}.png"
    content = gone.read_bytes()
    gone.unlink()
    state = desk.state("ann")
    assert (state["lost"], state["total"]) == (1, 5)
    assert state["trial"]["prompt"] == desk.study.items[trials[1].item].prompt
    other.write_bytes(content)  # another image of the same name
    urls = [state["trial"][side].split("/")[1].removesuffix(".png") for side in ("left", "right")]
    assert [desk.image(url) for url in urls].count(None) == 1
    assert desk.state("ann")["lost"] == 2
    gone.write_bytes(content)
    assert desk.state("ann")["lost"] == 1
    assert make_desk(run, "repeats=0", "checks=0").study.id == desk.study.id  # a new start does not mind


def test_a_path_outside_the_run_is_never_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "r", n=3)
    secret = tmp_path / "secret.png"
    secret.write_bytes((run / "images/unguided/0.png").read_bytes())
    records = (run / "records.jsonl").read_text()
    (run / "records.jsonl").write_text(records.replace("images/unguided/0.png", "../secret.png"))
    assert "inside the run" in refused(capsys, "serve", run)
    (run / "records.jsonl").write_text(records)
    desk = make_desk(run)
    (run / "images/unguided/0.png").unlink()
    (run / "images/unguided/0.png").symlink_to(secret)
    with pytest.raises(UserError, match="inside the run"):
        find_images([str(run)], desk.study)


def test_plain_folders_with_a_table_of_prompts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for arm in ("a", "b"):
        (tmp_path / arm).mkdir()
        for i in range(4):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / arm / f"{i}.jpg", quality=95)
    rows = [{"file_name": f"{i}.jpg", "prompt": f"prompt {i}"} for i in range(4)]
    pandas.DataFrame(rows).to_csv(tmp_path / "prompts.csv", index=False)
    desk = make_desk(tmp_path / "a", str(tmp_path / "b"), f"prompts={tmp_path / 'prompts.csv'}")
    shown = desk.state("ann")["trial"]
    assert shown["prompt"].startswith("prompt ") and "by name only" in desk.study.notes[0]
    png = desk.image(shown["left"].split("/")[1].removesuffix(".png"))
    assert png is not None and Image.open(io.BytesIO(png)).format == "PNG"


def test_two_questions_are_answered_at_once(tmp_path: Path) -> None:
    desk = make_desk(write_run(tmp_path / "r"), "questions=[looks, fits]")
    trial = desk.state("ann")["trial"]["id"]
    desk.vote("ann", trial, {"looks": "left", "fits": "skip"}, 2)
    found = analyse(desk.study)
    counted = [sum(r["wins"] + r["losses"] for r in q["rates"]) for q in found["questions"].values()]
    assert counted in ([1, 0], [0, 0])


# The script


def command(*words: object) -> None:
    preference.main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        command(*words)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "Traceback" not in error
    return error


def test_the_whole_path_with_simulated_raters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "r", ("unguided", "scale=1", "scale=2"), n=30)
    options = ("compare=adjacent", "raters=5", "per_rater=30", "random_raters=0.2", "position=0.3", "checks=0.3")
    command("simulate", run, *options)
    assert "true rate of 'scale=2' over 'scale=1'" in capsys.readouterr().out
    command("simulate", run, *options)
    assert capsys.readouterr().out.startswith("0 answers")
    command("export", run, "study=simulated")
    folder = run / "preference" / "simulated"
    table = pandas.read_csv(folder / "votes.csv")
    study = load_study(FolderConfig([str(run)], "simulated"))
    trials = sum(len(queue(60, study.options, f"simulated-{i:03}")) for i in range(5))
    assert len(table) == trials and set(table.choice) <= {"left", "right", "tie", "skip"}
    (run / "eval").mkdir()
    page = '<main>\n<section id="cost">\n<h2>Cost</h2>\n</section>\n</main>'
    (run / "eval/report.html").write_text(page)
    command("report", run, "study=simulated", "attention=0")
    summary = json.loads((folder / "summary.json").read_text())
    counted = table[(table.kind == "pair") & (table.choice != "skip")]
    assert summary["votes_cast"] == summary["votes_counted"] == len(counted)
    rates = summary["questions"]["looks"]["rates"]
    assert sum(r["wins"] + r["ties"] + r["losses"] for r in rates) == len(counted)
    assert [r["second"] for r in rates] == ["scale=1", "scale=2"]
    arms = [s["arm"] for s in summary["questions"]["looks"]["strengths"]]
    assert arms == ["unguided", "scale=1", "scale=2"]
    html = (folder / "preference.html").read_text()
    assert "are a program&#39;s" in html and "Bradley" in html and "<script" not in html
    command("report", run, "study=simulated")  # again, without a rater who answers at random
    joined = (run / "eval/report.html").read_text()
    assert joined.count('<section id="preference">') == 1 and "not counted: simulated-000" in joined
    assert joined.index("preference") < joined.index('id="cost"')


def test_votes_travel_between_machines(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "r") for name in ("here", "there")]
    for run, rater in zip(runs, ("ann", "bob"), strict=True):
        desk = make_desk(run)
        desk.vote(rater, desk.state(rater)["trial"]["id"], {"looks": "left"}, 1)
    command("export", runs[1])
    command("merge", runs[0], runs[1] / "preference/main/votes.jsonl")
    command("merge", runs[0], runs[1] / "preference/main")
    assert len(read_lines(runs[0] / "preference/main")) == 2
    command("report", runs[0])
    summary = json.loads((runs[0] / "preference/main/summary.json").read_text())
    assert [r["name"] for r in summary["raters"]] == ["ann", "bob"] and summary["answers_cast"] == 2


def test_what_cannot_be_asked_is_refused_in_a_sentence(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = write_run(tmp_path / "alone", ("unguided",), n=3)
    (tmp_path / "broken.jsonl").write_text("{}\n")
    make_desk(run)
    other = write_run(tmp_path / "other", n=3)
    desk = make_desk(other)
    desk.vote("ann", desk.state("ann")["trial"]["id"], {"looks": "left"}, 1)
    (run / "preference/simulated").mkdir()
    VoteStore(run / "preference" / "simulated").append(vote("ann", 0, "left"))
    for words in (
        ("serve", alone),
        ("serve", tmp_path / "nowhere"),
        ("serve",),
        ("sreve", run),
        *(("serve", run, option) for option in ("questions=[look]", "detect=0.5", "study=../x", "seed=1")),
        *(("serve", run, option) for option in ("repeats=1.5", "per_rater=0")),
        ("report", run, "study=never"),
        ("report", run),
        ("merge", run),
        ("merge", run, tmp_path / "broken.jsonl"),
        ("merge", run, tmp_path / "nowhere.jsonl"),
        ("merge", run, other / "preference/main"),
        ("simulate", run, "noise=0"),
    ):
        refused(capsys, *words)
    assert "without people's votes" in refused(capsys, "simulate", run)
    assert not (alone / "preference").exists()
