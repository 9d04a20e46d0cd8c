"""Guides by name: from a command line, from a file, in records; mistakes name what there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from guidance.guides import ClipGuide, MidBlockGuide
from guidance.guides.base import GUIDES
from guidance.guides.registry import explain, read_guide
from guidance.heads import HeadConfig, build_head, save_head
from guidance.heads.adapter import AdapterConfig, build_adapter, save_adapter
from guidance.models.clip import load_clip
from guidance.runs.arms import guide_arms
from guidance.utils.errors import UserError
from sample.guided import main, read_words

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def head(tmp_path) -> Path:
    save_head(build_head(HeadConfig("conv", in_channels=8, hidden=16)), tmp_path / "head")
    return tmp_path / "head"


def test_a_guide_is_read_from_words() -> None:
    guide = read_guide("clip:texts=[a boat, the sea],weights=[1,-0.5],through=unet,every=2")
    assert isinstance(guide, ClipGuide) and guide.texts == ["a boat", "the sea"] and guide.weights == [1, -0.5]
    assert (guide.through, guide.every, guide.guidance_scale) == ("unet", 2, 1.0)
    assert read_guide("midblock").head == "runs/heads/testbed-aesthetic"


def test_a_guide_is_read_from_a_file_and_words_override_it(tmp_path, monkeypatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("guide: midblock\nhead: my/head\ntarget: '7'\nguidance_scale: -2\n")
    guide = read_guide(f"{file}:target=8,start=0.5")
    assert (guide.head, guide.target, guide.guidance_scale, guide.start) == ("my/head", "8", -2.0, 0.5)
    monkeypatch.chdir(ROOT)
    assert read_guide("colour:target=blue").target == "blue"


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "guides").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_shipped_guide_is_read_and_explained(file: Path) -> None:
    guide = read_guide(str(file))
    assert guide.method in GUIDES and guide.method in explain([guide], 25)
    assert f"--guide {file.stem}" in file.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("midblok", "Did you mean 'midblock'"),
        ("clip:text=[a]", "Did you mean 'texts'"),
        ("clip:distance=cosin", "Expected one of 'spherical', 'cosine'"),
    ],
)
def test_mistakes_name_what_there_is(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_guide(text)


def test_arms_hold_all_guides_each_by_its_own_factor(head: Path) -> None:
    guides = [
        MidBlockGuide(head=str(head)),
        MidBlockGuide(head=str(head), guidance_scale=-0.5, target="9", objective="class"),
    ]
    plain, arm = guide_arms(guides, [2.0])
    assert plain.guides == () and plain.name == "unguided" and arm.name == "scale=2"
    assert [g.guidance_scale for g in arm.guides] == [2.0, -1.0]
    assert [d["method"] for d in arm.descriptions] == ["midblock"] * 2 and arm.descriptions[1]["target"] == "9"
    assert all("head_fingerprint" in d for d in arm.descriptions) and arm.head == str(head)


def test_one_head_is_described_alike_by_options_and_by_a_guide(head: Path) -> None:
    by_options = guide_arms([MidBlockGuide(str(head), every=2)], [1.5])
    by_guide = guide_arms([read_guide(f"midblock:head={head},every=2")], [1.5])
    assert by_options[1].descriptions == by_guide[1].descriptions


#: What records say of each guide, beside its method, name and :data:`COMMON`.
COMMON = {"guidance_scale", "normalize", "start", "stop", "every", "space"}
DESCRIBED = {
    "midblock": "head objective target committee pessimism head_fingerprint committee_fingerprints",
    "embedding": "head clip texts images clip_fingerprint",
    "clip": "clip texts images weights distance through cutouts decoder seed clip_fingerprint",
    "amortised": "adapter adapter_fingerprint teacher_fingerprints",
}


@pytest.mark.parametrize("method", DESCRIBED)
def test_records_describe_guides_as_earlier_versions_did(method: str, head: Path, tmp_path: Path) -> None:
    """Folders of earlier versions go on with the same command, which compares the descriptions."""
    clip = load_clip("testbed")
    options = {"clip": clip.name, "clip_fingerprint": clip.fingerprint, "outputs": 128}
    config = HeadConfig("conv", in_channels=8, hidden=16, task="embedding", target="clip:testbed", labels=[], **options)
    save_head(build_head(config), tmp_path / "clip")
    save_adapter(build_adapter(AdapterConfig(width=8, depth=1)), tmp_path / "adapter")
    made_of = {"midblock": f":head={head}", "embedding": f":head={tmp_path / 'clip'}", "clip": ""}
    made_of["amortised"] = f":adapter={tmp_path / 'adapter'}"
    guide = read_guide(method + made_of[method]).at(2.0)
    described = guide.describe()
    assert set(described) == {"method", "name", *COMMON, *DESCRIBED[method].split()}
    assert described["guidance_scale"] == 2 and (described["start"], described["stop"]) == guide.interval
    for name in {"texts", "images", "weights"} & set(described):
        assert described[name] == []
    assert json.loads(json.dumps(described)) == described
    assert "min_size" in read_guide("clip:min_size=0.3").describe()


def test_explain_loads_nothing(capsys) -> None:
    assert read_words(["--guide", "a:b=1", "--guide=c", "--explain"]) == ["--explain", 'guides=["a:b=1", "c"]']
    main(["--explain", "--guide", "midblock:head=no/such/head", "--guide", "clip"])
    out = capsys.readouterr().out
    assert "midblock: tap" in out and "clip: tap the prediction of x0" in out and "CFG 4" in out


def test_explain_is_instant(head: Path) -> None:
    """Reading a head's description imports nothing heavy."""
    code = (
        "import sys; from guidance.guides.registry import explain, read_guide; "
        f"print(explain([read_guide('midblock:head={head}')], 4), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "(task rating);" in ran.stdout and ran.stdout.endswith("False\n")


def test_explain_says_what_will_run_without_loading_weights(head: Path, tmp_path: Path) -> None:
    config = json.loads((head / "config.json").read_text()) | {"base_model": "sd", "start": 0.25, "stop": 0.75}
    (head / "config.json").write_text(json.dumps(config))
    (head / "head.safetensors").unlink()
    said = explain([read_guide(f"midblock:head={head},every=2")], 16)
    assert "tap mid_block of sd, for rating (task rating);" in said
    assert "pushes in 8 of 16 steps, with a new direction in 4;" in said
    assert "costs about 1.19 unguided ones" in said and f"steps on average {1 + 0.19 / 4:.2f}\n" in said
    said = explain([read_guide(f"midblock:head={head},start=0,stop=1,objective=at_least,target=7")], 16)
    assert "for rating (task rating); pushes in 16 of 16 steps;" in said and "on average 1.19\n" in said
    (head / "config.json").write_text(json.dumps(config | {"tap": "mid_block+up_blocks.1"}))
    said = explain([read_guide(f"midblock:head={head}")], 16)
    assert "costs more than the 1.19 unguided ones" in said and "average" not in said
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "config.json").write_text('{"start": 0.5, "stop": 1.0}')
    assert "pushes in 8 of 16 steps;" in explain([read_guide(f"amortised:adapter={tmp_path / 'adapter'}")], 16)


OWN_GUIDE = """
import dataclasses
from guidance.guides.base import ScoringGuide, register_guide, scale_option
from guidance.utils.config import option

@register_guide("flat")
@dataclasses.dataclass
class Flat(ScoringGuide):
    level: float = option(0.0, "value of the latents")
    guidance_scale: float = scale_option()
    tap = "x0"

    def score(self, h, t):
        return -(h - self.level).square().mean((1, 2, 3))
"""


def test_a_guide_of_ones_own_is_one_file_and_one_yaml(tmp_path: Path, tiny_folder, monkeypatch, capsys) -> None:
    (tmp_path / "own_guide.py").write_text(OWN_GUIDE)
    (tmp_path / "flat.yaml").write_text("guide: own_guide.flat\nlevel: 2\nevery: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["prompts=[a red tree]", f"model={tiny_folder}", "num_steps=4", "scales=[0.5]", "output=run"]
    try:
        main(["--explain", "--guide", "flat.yaml", *command])
        assert "level=2.0" in capsys.readouterr().out
        main(["--guide", "flat.yaml", *command])
        records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
        guided = next(r for r in records if r["arm"] == "scale=0.5")
        described = guided["guides"][0]
        assert (described["method"], described["level"], described["guidance_scale"]) == ("flat", 2.0, 0.5)
        assert (guided["steps"], guided["gradients"], guided["pushes"]) == (4, 2, 4)
        with pytest.raises(UserError, match="name of a guide"):
            read_guide("own_guide.flatt")
    finally:
        GUIDES.pop("flat", None)
