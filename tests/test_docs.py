"""The code in README.md and docs/ runs: Python blocks in order, commands through the parsers of their scripts.

A block is run unless its fence says ``no-run`` (it needs weights or a hub), and then it still has to compile.  Commands
are parsed; those in a block ``sh run`` are run.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from commands import ROOT, commands_of_page, exit_code, fenced, split_command

from guidance.heads import HeadConfig, build_head
from guidance.models.denoiser import fingerprint
from guidance.models.pipelines import load_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPTS = ("train", "sample", "eval")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def name(page: Path) -> str:
    return page.name


def runs(page: Path) -> list[tuple[str, str]]:
    """The blocks of a page that are run, in order: (language, content)."""
    found = [(words.split(), content) for words, content in fenced(page.read_text(encoding="utf-8"))]
    return [
        (words[0], content)
        for words, content in found
        if (words[:1] == ["python"] and "no-run" not in words) or words == ["sh", "run"]
    ]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_compiles_and_few_blocks_are_left_out(page: Path) -> None:
    blocks = [(w.split(), c) for w, c in fenced(page.read_text(encoding="utf-8")) if w.startswith("python")]
    for _, content in blocks:
        compile(content, str(page), "exec")
    left_out = sum("no-run" in words for words, _ in blocks)
    assert left_out <= 1, "run what can be run"
    assert all(set(words) <= {"python", "no-run"} for words, _ in blocks)


@pytest.mark.parametrize("page", [p for p in PAGES if runs(p)], ids=name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)
    if page.name == "README.md":  # it loads the head that its commands train
        pipe = load_pipeline("testbed")
        options = {"prediction_type": pipe.scheduler.config.prediction_type, "base_fingerprint": fingerprint(pipe.unet)}
        head = build_head(HeadConfig("conv", in_channels=pipe.unet.config.block_out_channels[-1], **options))
        head.save_pretrained("runs/heads/testbed-aesthetic")
    page_module = types.ModuleType("page")  # where annotations of its classes are looked up
    monkeypatch.setitem(sys.modules, "page", page_module)
    for language, content in runs(page):
        if language == "python":
            exec(compile(content, page.name, "exec"), vars(page_module))
            continue
        for command in commands_of_page(f"```sh\n{content}```\n"):
            module, words = split_command(command)
            assert exit_code(module, words) == 0, (command, capsys.readouterr().err[-500:])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_commands_of_a_page_are_read_by_their_scripts(page: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands_of_page(page.read_text(encoding="utf-8")):
        module, words = split_command(command)
        if module.split(".")[0] in SCRIPTS:  # those of the library take no config; pages run them
            assert exit_code(module, [*words, "--print-config"]) == 0, (command, capsys.readouterr().err[-500:])


@pytest.mark.parametrize("folder", SCRIPTS)
def test_the_commands_in_the_help_of_scripts_are_read(folder: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    found = 0
    for file in sorted((ROOT / folder).glob("*.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        for command in commands_of_page(text):
            module, words = split_command(command)
            assert exit_code(module, [*words, "--print-config"]) == 0, (command, capsys.readouterr().err[-500:])
            found += 1
    assert found >= 5


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[)#]", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


def test_every_page_is_found() -> None:
    """By a link of the README, or by a link of a page that is linked."""
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop().resolve()
        reached.add(page)
        targets = re.findall(r"\]\(([^)#]+\.md)[)#]", page.read_text(encoding="utf-8"))
        todo += [p for t in targets if (p := (page.parent / t).resolve()).is_file() and p not in reached]
    assert {p.resolve() for p in PAGES} <= reached


def test_the_readme_is_short_and_begins_with_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 1400
    assert text[: text.index("```python")].count("\n") < 40


# --- what finds commands finds them


def test_commands_are_found() -> None:
    page = (
        "Say `python -m eval.heads a\nb=1` here.\n\n"
        "    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m sample.sweep 'scale=[1]' --dry-run   # two cores\n\n"
        "```sh\naccelerate launch --num_processes 8 sample/guided.py \\\n    prompts=parti\nmake demo\n"
        "python -m sample.sweep ... --recommend\n```\n\n```python\npython -m no.command\n```\n"
    )
    found = [split_command(command) for command in commands_of_page(page)]
    assert found == [
        ("sample.guided", ["prompts=parti"]),
        ("sample.sweep", ["scale=[1]", "--dry-run"]),
        ("eval.heads", ["a", "b=1"]),
    ]
    assert split_command("python -m venv x") == ("", [])


@pytest.mark.parametrize("words", ["sample.guided scale=1", "train.head data.taps=x", "eval.images --no"])
def test_a_command_that_is_not_understood_fails(words: str, capsys) -> None:
    module, *rest = shlex.split(words)
    assert exit_code(module, [*rest, "--print-config"]) == 2
