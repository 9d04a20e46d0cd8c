"""Records: whole lines only, images that are what was recorded, and pairs that are pairs."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from guidance.runs import records as module
from guidance.runs.records import Record, RecordStore, audit_pairs, noise_hash
from guidance.utils.errors import UserError

IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def make_record(arm: str = "unguided", prompt_id: str = "p-0", seed: int = 0, **changes) -> Record:
    values = {
        "prompt_id": prompt_id,
        "prompt": f"text of {prompt_id}",
        "category": "",
        "challenge": "",
        "seed": seed,
        "noise_hash": f"noise of {seed}",
        "arm": arm,
        "guides": [] if arm == "unguided" else [{"guidance_scale": 2.0}],
        "cfg_scale": 4.0,
        "scheduler": "DDIMScheduler",
        "num_steps": 25,
        "model": "testbed",
        "model_fingerprint": "abc",
        "dtype": "float32",
        "image": f"images/{arm}/{prompt_id}_seed{seed}.png",
        "sha256": "",
        "bytes": 0,
        "seconds": 0.5,
        "batch_size": 1,
        "score": None,
        "nan_skipped": 0,
        "truncated": False,
        "head": "",
        "version": "0",
    }
    return Record(**(values | changes))


def test_what_is_appended_is_loaded(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "run")
    written = store.append(make_record("scale=2", score=float("nan"), prompt="Grüße\u2028\x85 “x”\n"), IMAGE)
    store.append(make_record(), IMAGE)
    again = RecordStore(tmp_path / "run")
    assert again.load(check="sha256") == [written, store.load()[1]]
    assert written.score is None and written.scale == 2 and again.load()[1].scale == 0
    assert again.has("scale=2", "p-0", 0) and not again.has("scale=2", "p-0", 1)
    assert (tmp_path / "run" / "records.jsonl").read_text(encoding="utf-8").count("\n") == 2


def test_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    written = store.append(make_record(), IMAGE)
    values = json.loads(store.path.read_text())
    later = ("conditioning", "steering", "cfg", "start", "steps", "gradients", "pushes")
    store.path.write_text(json.dumps({key: value for key, value in values.items() if key not in later}) + "\n")
    assert RecordStore(tmp_path).load(check="sha256") == [written]
    assert (written.steps, written.gradients, written.pushes) == (0, 0, 0)


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.append(make_record(seed=0), IMAGE)
    whole = store.path.read_bytes()
    store.append(make_record(seed=1), IMAGE)
    both = store.path.read_bytes()
    store.path.write_bytes(both[:-40])
    torn = RecordStore(tmp_path)
    assert [r.seed for r in torn.load()] == [0] and not torn.has("unguided", "p-0", 1)
    assert store.path.read_bytes() == both[:-40]  # reading a folder that another process writes changes nothing
    torn.append(make_record(seed=1), IMAGE)
    assert store.path.read_bytes() == both and both.startswith(whole)


def test_a_missing_or_changed_image_is_seen(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    record = store.append(make_record(), IMAGE)
    file = tmp_path / record.image
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"\0")  # the size tells nothing: only the hash sees it
    assert store.has(*record.key) and store.load()
    with pytest.raises(UserError, match="another file now"):
        store.load(check="sha256")
    file.write_bytes(data[:-1])
    assert not store.has(*record.key)
    file.unlink()
    assert not store.has(*record.key)
    with pytest.raises(UserError, match=r"images/unguided/p-0_seed0.png', found none; run the command"):
        store.load()
    assert store.load(check=None) == [record]
    store.append(record, IMAGE)  # made anew: the later record counts, and there is one
    assert RecordStore(tmp_path).load(check="sha256") == [record]


@pytest.mark.parametrize("where", ["image", "record"])
def test_a_full_disk_leaves_whole_files(tmp_path: Path, monkeypatch, where: str) -> None:
    store = RecordStore(tmp_path)
    store.append(make_record(seed=0), IMAGE)
    before = store.path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "image":
            patch.setattr(Path, "write_bytes", full)
        else:
            patch.setattr(module.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.append(make_record(seed=1), IMAGE)
    assert store.path.read_bytes() == before and not store.has("unguided", "p-0", 1)
    names = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert names - {"p-0_seed1.png"} == {"records.jsonl", "p-0_seed0.png"}
    store.append(make_record(seed=1), IMAGE)
    assert len(RecordStore(tmp_path).load(check="sha256")) == 2


def test_pairs_are_paired() -> None:
    arms = ("unguided", "scale=2", "scale=-1")
    records = [make_record(arm, p, s) for p in ("p-0", "p-1") for s in (0, 1) for arm in arms]
    pairs = audit_pairs(reversed(records))
    assert set(pairs) == {"scale=2", "scale=-1"} and all(len(rows) == 4 for rows in pairs.values())
    assert all(a.arm == "unguided" and a.key[1:] == b.key[1:] for rows in pairs.values() for a, b in rows)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_hash", "other"),
        ("prompt", "other"),
        ("scheduler", "EulerDiscreteScheduler"),
        ("num_steps", 24),
        ("cfg_scale", 4.5),
        ("model_fingerprint", "other"),
    ],
)
def test_a_pair_that_differs_is_named(field: str, value: object) -> None:
    records = [make_record(arm, p) for p in ("p-0", "p-1") for arm in ("unguided", "scale=2")]
    records[3] = dataclasses.replace(records[3], **{field: value})
    with pytest.raises(UserError, match=f"prompt 'p-1', seed 0, their {field} differs"):
        audit_pairs(records)
    assert audit_pairs(records, vary=[field])
    assert audit_pairs(records[:2])


def test_an_image_without_a_partner_is_named() -> None:
    records = [make_record(arm, seed=s) for s in (0, 1) for arm in ("unguided", "scale=2")]
    with pytest.raises(UserError, match="'scale=2' lacks prompt 'p-0', seed 1"):
        audit_pairs(records[:3])
    with pytest.raises(UserError, match="'unguided' lacks prompt 'p-0', seed 1"):
        audit_pairs([*records[:2], records[3]])
    with pytest.raises(UserError, match="the arm 'plain', got only unguided, scale=2"):
        audit_pairs(records, "plain")


def test_noise_hash_reads_every_number() -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    other = noise.clone()
    other[0, 3, 7, 7] += 1e-6
    assert noise_hash(noise) == noise_hash(noise.clone()) != noise_hash(other)
    assert len(noise_hash(noise)) == 16
