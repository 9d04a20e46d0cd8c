"""Every file in configs/ is read by its script, does what its opening comment says, and costs what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import ROOT, commands_of_config, exit_code, split_command
from PIL import Image

from guidance.guides.base import GUIDES
from guidance.guides.registry import read_guide
from guidance.heads import load_head
from guidance.utils.config import load_config
from train.cache_features import CacheConfig
from train.head import HeadTrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = sorted((ROOT / "configs").glob("*/*.yaml"))
SCRIPTS = {
    "amortise": "train.amortise",
    "cache": "train.cache_features",
    "eval": "eval.images",
    "head": "train.head",
    "sample": "sample.guided",
    "sweep": "sample.sweep",
    "testbed": "train.testbed",
}


def name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def module_of(file: Path) -> str:
    return "eval.heads" if name(file) == "eval/sd21-heads.yaml" else SCRIPTS[file.parent.name]


def flat(tree: dict, prefix: str = "") -> dict:
    out: dict = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def is_recipe(file: Path) -> bool:
    return file.parent.name != "guides"


@pytest.mark.parametrize("file", [f for f in FILES if is_recipe(f)], ids=name)
def test_a_recipe_is_read_by_its_script(file: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert exit_code(module_of(file), ["--config", f"configs/{name(file)}", "--print-config"]) == 0
    merged = flat(yaml.safe_load(capsys.readouterr().out))
    written = flat(yaml.safe_load(file.read_text(encoding="utf-8")))
    assert written and all(merged[key] == value for key, value in written.items())


@pytest.mark.parametrize("file", [f for f in FILES if not is_recipe(f)], ids=name)
def test_a_guide_is_read_by_name(file: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    guide = read_guide(file.stem)
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(guide, GUIDES[given.pop("guide")])
    assert {k: getattr(guide, k) for k in given} == given


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_config_says_how_it_is_run(file: Path, capsys, monkeypatch) -> None:
    """The commands in its opening comment are read by the scripts they call; guides are explained."""
    monkeypatch.chdir(ROOT)
    commands = commands_of_config(file.read_text(encoding="utf-8"))
    assert commands, "the opening comment has no command"
    for command in commands:
        module, words = split_command(command)
        assert module and exit_code(module, [*words, "--print-config"]) == 0, (command, capsys.readouterr().err)
        if module == "sample.guided":
            assert exit_code(module, [*words, "--explain"]) == 0, (command, capsys.readouterr().err)


def test_heads_that_share_a_cache_ask_for_its_features() -> None:
    """What a head's recipe says of the features is what the cache's recipe makes: nothing is refused later."""
    made = {}
    for file in FILES:
        if file.parent.name == "cache":
            config = load_config(CacheConfig, file)
            made[config.folder] = config
    shared = 0
    for file in FILES:
        if file.parent.name != "head":
            continue
        config = load_config(HeadTrainConfig, file)
        cache = made.get(config.cache)
        if cache is None:
            continue
        shared += 1
        ignored = ("target_columns", "rating_column", "batch_size", "shard_size")
        for field in dataclasses.fields(config.data):
            if field.name not in ignored:
                wanted, got = getattr(config.data, field.name), getattr(cache, field.name)
                assert wanted == got, (name(file), field.name)
        targets = {*config.data.target_columns, config.target} - {"real"}
        assert targets <= set(cache.target_columns), name(file)
    assert shared >= 4


# --- the recipes for Stable Diffusion, for real, on a random pipeline and sixty small pictures


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures with captions and ratings in a CSV file, and the same pictures in a folder a class."""
    folder = tmp_path_factory.mktemp("pictures")
    rng, lines = np.random.default_rng(0), ["image,caption,rating"]
    for i in range(60):
        label = ("red", "blue")[i % 2]
        pixels = np.full((64, 64, 3), (220, 30, 30) if label == "red" else (30, 30, 220), np.uint8)
        pixels[:, : int(rng.integers(8, 56))] = rng.integers(0, 255, 3)
        (folder / "classes" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "classes" / label / f"{i}.png")
        lines.append(f"classes/{label}/{i}.png,a {label} wall {i},{1 + i % 10}")
    (folder / "rated.csv").write_text("\n".join(lines))
    return folder


def words_for(recipe: str, data: Path, model: Path, work: Path) -> list[str]:
    """A command of a recipe that a user with a GPU would give, but for the model and the sizes."""
    words = ["--config", f"configs/head/{recipe}.yaml", f"data.model={model}", "data.dtype=float32", "epochs=1"]
    words += [f"data.dataset={data / ('classes' if recipe == 'sd21-class' else 'rated.csv')}", "hidden=16"]
    words += [f"output={work / 'heads' / recipe}", "data.batch_size=16"]
    config = yaml.safe_load((ROOT / "configs" / "head" / f"{recipe}.yaml").read_text())
    words += [f"cache={work / 'cache' / Path(config['cache']).name}"]
    if recipe == "sd21-clip":  # the embedded CLIP; the published one cannot be had here
        words += ["target=clip:testbed", 'data.target_columns=["clip:testbed"]']
    if recipe == "sd21-discriminator":
        words += [f"generated.folder={work / 'generated'}", "generated.train=8", "generated.validation=4"]
        words += ["generated.test=4", "generated.num_steps=2"]
    return words


def test_the_head_recipes_train(data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipes = ["sd21-aesthetic", "sd21-aesthetic-clean", "sd21-class", "sd21-discriminator", "sd21-clip"]
    assert set(recipes) == {f.stem for f in FILES if f.parent.name == "head" and f.stem.startswith("sd21")}
    heads = {}
    for recipe in recipes:
        torch.manual_seed(0)
        words = words_for(recipe, data, tiny_folder, tmp_path)
        assert exit_code("train.head", words) == 0, (recipe, capsys.readouterr().err[-300:])
        heads[recipe] = load_head(tmp_path / "heads" / recipe).config
    aesthetic, clean = heads["sd21-aesthetic"], heads["sd21-aesthetic-clean"]
    assert (aesthetic.task, aesthetic.noise, aesthetic.time_conditioned) == ("rating", "random", False)
    assert (clean.noise, clean.timesteps) == ("none", [0, 0])
    assert heads["sd21-class"].labels == ["blue", "red"] and heads["sd21-class"].caption == "empty"
    assert heads["sd21-discriminator"].task == "binary"
    assert (heads["sd21-clip"].task, heads["sd21-clip"].clip) == ("embedding", "testbed")
    # the discriminator's real rows are those of the aesthetic head's cache, which nothing made anew
    caches = {p.name for p in (tmp_path / "cache").iterdir()}
    assert caches == {"sd21", "sd21-clean", "sd21-class", "sd21-clip"}
    pair = ",".join(str(tmp_path / "heads" / recipe) for recipe in recipes[:2])
    words = ["--config", "configs/eval/sd21-heads.yaml", f"heads=[{pair}]", f"output={tmp_path / 'eval'}"]
    words += [f"data.model={tiny_folder}", "data.dtype=float32", f"data.dataset={data / 'rated.csv'}"]
    assert exit_code("eval.heads", words) == 0, capsys.readouterr().err[-300:]
    measured = json.loads((tmp_path / "eval" / "metrics.json").read_text())["heads"]
    assert {found["features"]["noise"] for found in measured.values()} == {"random", "none"}


def test_the_sampling_recipe_samples_and_is_evaluated(
    tiny_pipe, tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from conftest import make_head

    from guidance.runs.records import RecordStore

    monkeypatch.chdir(ROOT)
    make_head(tiny_pipe, hidden=16, base_model=str(tiny_folder)).save_pretrained(tmp_path / "head")
    (tmp_path / "prompts.txt").write_text("a red wall\na blue wall\n")
    words = ["--config", "configs/sample/sd21-parti.yaml", f"model={tiny_folder}", "dtype=float32"]
    words += [f"head={tmp_path / 'head'}", f"prompts={tmp_path / 'prompts.txt'}", "num_steps=2"]
    words += ["seeds_per_prompt=1", f"output={tmp_path / 'out'}"]
    assert exit_code("sample.guided", words) == 0
    records = RecordStore(tmp_path / "out").load()
    assert len(records) == 2 * 3 and {r.cfg_scale for r in records} == {7.5}
    # the embedded networks stand in for CLIP and Inception
    words = [str(tmp_path / "out"), "--config", "configs/eval/sd21-parti.yaml", "clip=judge-clip", "features=judge"]
    words += [f"reference={data / 'classes' / 'red'}", f"cache={tmp_path / 'cache'}", "permutations=19"]
    assert exit_code("eval.images", words) == 0, capsys.readouterr().err[-300:]
    assert "FD" in (tmp_path / "out" / "eval" / "report.html").read_text(encoding="utf-8")


def test_the_sweep_recipe_is_planned(tiny_pipe, tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from conftest import make_head

    monkeypatch.chdir(ROOT)
    make_head(tiny_pipe, hidden=16, base_model=str(tiny_folder)).save_pretrained(tmp_path / "head")
    lines = "".join(f"a wall of {i} bricks\n" for i in range(100))
    (tmp_path / "prompts.txt").write_text(lines)
    words = ["--config", "configs/sweep/sd21-parti.yaml", f"model={tiny_folder}", "dtype=float32"]
    words += [f"head={tmp_path / 'head'}", f"prompts={tmp_path / 'prompts.txt'}", "batch_size=2"]
    words += [f"output={tmp_path / 'out'}", "--dry-run"]
    assert exit_code("sample.sweep", words) == 0
    plan = capsys.readouterr().out
    assert "1,600 images" in plan or "1600 images" in plan
    assert not (tmp_path / "out").exists()
