"""guidance.utils.config and guidance.utils.errors: precedence, and one sentence for every mistake."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from guidance.utils.config import ConfigError, load_config, option, parse_config, parse_config_and_args, to_yaml
from guidance.utils.errors import UserError, friendly_errors, nearest


@dataclass
class Optimizer:
    lr: float = option(1e-3, "Learning rate.")
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's decay rates.")
    name: Literal["adam", "sgd", "off"] = option("adam", "Which optimiser.")


@dataclass
class Job:
    prompt: str = option("a cat", "Caption to draw.")
    seed: int = option(0, "Seed of the noise.")
    limit: int | None = option(None, "Number of images; None means all.")
    scales: list[float] = option([0.0, 1.0], "Guidance scales.")
    weights: dict[str, float] = option({}, "Weight of each guide.")
    out: Path = option(Path("runs"), "Output folder.")
    log: bool = option(True, "Whether to log.")
    optimizer: Optimizer = option(Optimizer, "Optimiser.")


@dataclass
class Needy:
    model: str = option(dataclasses.MISSING, "Model to load.")

    def __post_init__(self) -> None:
        if self.model == "bad":
            raise ValueError("Expected a good model, got 'bad'")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_overrides_the_defaults_and_words_override_yaml(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "seed: 3\noptimizer:\n  lr: 1e-4\nscales: [2]\n")
    job = load_config(Job, file, ["optimizer.lr=1e-5", "limit=7", "weights={clip: 2}", "weights.head=1"])
    assert job == Job(seed=3, limit=7, scales=[2.0], weights={"clip": 2.0, "head": 1.0}, optimizer=Optimizer(lr=1e-5))
    assert isinstance(job.optimizer, Optimizer) and isinstance(job.out, Path)
    assert load_config(Job) == Job()


def test_a_group_and_an_item_can_be_overridden() -> None:
    job = load_config(Job, None, ["optimizer={lr: 2, name: sgd}", "scales[1]=5", "limit=null"])
    assert (job.optimizer.lr, job.optimizer.name, job.scales, job.limit) == (2.0, "sgd", [0.0, 5.0], None)


@pytest.mark.parametrize("text", ["a dog: at dusk", "a cat #1", "007", "null", "yes", "a = b", "[x", ""])
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert load_config(Job, None, [f"prompt={text}"]).prompt == text


def test_a_choice_that_yaml_reads_as_a_boolean() -> None:
    assert load_config(Job, None, ["optimizer.name=off"]).optimizer.name == "off"


def test_defaults_are_not_shared() -> None:
    Job().scales.append(9.0)
    Job().optimizer.lr = 9.0
    assert Job().scales == [0.0, 1.0] and Job().optimizer.lr == 1e-3


def test_yaml_is_read_back(tmp_path: Path) -> None:
    job = load_config(Job, None, ["prompt=x: y", "limit=2", "weights={a: 1}", "out=some/where", "seed=5"])
    assert load_config(Job, write(tmp_path / "config.yaml", to_yaml(job))) == job
    assert "python/object" not in to_yaml(job)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("sed=1", ["Did you mean 'seed'?"]),
        ("lr=1", ["Did you mean 'optimizer.lr'?"]),
        ("optimizer.lrr=1", ["Did you mean 'optimizer.lr'?", "optimizer.betas"]),
        ("optimizer=3", ["group 'optimizer'"]),
        ("seed=1.5", ["Expected int for 'seed'"]),
        ("seed=null", ["Expected int", "None"]),
        ("log=3", ["Expected bool"]),
        ("limit=x", ["Expected int or None"]),
        ("scales=[1, x]", ["Expected list of float"]),
        ("optimizer.betas=[1]", ["Expected tuple of float and float"]),
        ("optimizer.name=adm", ["one of 'adam', 'sgd', 'off'"]),
        ("seed", ["key=value"]),
        ("=1", ["key=value"]),
        ("seed=[1", ["YAML value"]),
        ("optimizer.lr=nan", ["finite", "'optimizer.lr'"]),
        ("scales=[1, .inf]", ["finite", "'scales[1]'"]),
        ("weights.a=-.inf", ["finite", "'weights.a'"]),
        ("seed=${nothing}", ["nothing"]),
    ],
)
def test_a_wrong_word_is_explained_in_one_sentence(word: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Job, None, [word])
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("seed: [1\n", ["YAML", "line 2"]),
        ("- 1\n- 2\n", ["key: value", "list"]),
        ("seed: 1\nseed: 2\n", ["duplicate"]),
        ("optimizer:\n  lrate: 1\n", ["optimizer.lrate", "Did you mean 'optimizer.lr'?"]),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Job, write(tmp_path / "bad.yaml", content))
    assert all(part in str(error.value) for part in [*parts, "bad.yaml"])


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(Job, write(tmp_path / "empty.yaml", "# nothing\n")) == Job()


def test_a_missing_file_lists_those_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "fast.yaml", "")
    write(tmp_path / "slow.yaml", "")
    with pytest.raises(ConfigError, match=r"Did you mean 'fast.yaml'\? Choices: fast.yaml, slow.yaml\.$"):
        load_config(Job, tmp_path / "fats.yaml")


def test_a_mandatory_value_and_a_check_of_the_dataclass() -> None:
    assert load_config(Needy, None, ["model=good"]).model == "good"
    with pytest.raises(ConfigError, match="Expected a value for 'model'"):
        load_config(Needy)
    with pytest.raises(ConfigError, match="Expected a good model"):
        load_config(Needy, None, ["model=bad"])


@pytest.mark.parametrize("order", [0, 1, 2])
def test_overrides_stand_before_or_after_the_file(tmp_path: Path, order: int) -> None:
    argv = ["seed=4", "limit=2"]
    argv[order:order] = ["--config", str(write(tmp_path / "a.yaml", "seed: 1\nlog: false\n"))]
    job = parse_config(Job, argv, prog="job", description="Do it.")
    assert (job.seed, job.limit, job.log) == (4, 2, False)


def test_extra_arguments_come_back_in_the_namespace() -> None:
    job, namespace = parse_config_and_args(
        Job,
        ["--resume", "seed=2"],
        prog="job",
        description="Do it.",
        extra=lambda parser: parser.add_argument("--resume", action="store_true") and None,
    )
    assert job.seed == 2 and namespace.resume is True


def test_the_command_line_says_one_sentence_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(Job, ["sed=1"], prog="job", description="Do it.")
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("job: error: Unknown option 'sed'")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(Job, ["--help"], prog="job", description="Do it.", default_config="configs/job/a.yaml")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    parts = ["optimizer.lr  (float; default: 0.001)", "Learning rate.", "int or None", "Do it."]
    assert all(part in text for part in [*parts, "job --config configs/job/a.yaml"])
    with pytest.raises(SystemExit):
        parse_config(Needy, ["--help"], prog="needy", description="100% needy.")
    assert "model  (str; required)" in capsys.readouterr().out


def test_print_config_prints_what_can_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(Job, ["--print-config", "seed=9"], prog="job", description="Do it.")
    assert stop.value.code == 0
    assert load_config(Job, write(tmp_path / "printed.yaml", capsys.readouterr().out)) == Job(seed=9)


def test_the_module_imports_nothing_heavy() -> None:
    # The package itself is left out, so that only what this module imports is measured.
    code = (
        "import sys, types; package = types.ModuleType('guidance'); package.__path__ = ['guidance'];"
        "sys.modules['guidance'] = package; import guidance.utils.config;"
        "sys.exit(bool({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("Expected a,\n got b."), 2, "job: error: Expected a, got b.\n"),
        (KeyboardInterrupt(), 130, "job: interrupted\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b.png"), 2, "'a/b.png': the disk is full"),
        (OSError("I/O error: (os error 28)"), 2, "job: error: the disk is full"),
        (OSError("40960 requested and 36800 written"), 2, "job: error: the disk is full"),
    ],
)
def test_user_errors_become_one_line(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, friendly_errors("job"):
        raise error
    printed = capsys.readouterr().err
    assert stop.value.code == code and text in printed and printed.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("bug"), FileNotFoundError(errno.ENOENT, "gone", "x"), KeyError(1)])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    @friendly_errors("job")
    def main() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        main()
    assert caught.value is error


def test_nearest_lists_choices_when_they_are_few() -> None:
    assert nearest("x", []) == ""
    assert nearest("hed", ["head", "clip"]) == " Did you mean 'head'? Choices: head, clip."
    many = [f"name{i}" for i in range(100)]
    assert nearest("nam7", many).startswith(" Did you mean 'name7")
    assert "100 choices" in nearest("q", many) and "name50" not in nearest("q", many)
