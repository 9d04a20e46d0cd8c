"""Commands of this toolkit in prose, in documents and at the head of configs, for the scripts' own parsers."""

from __future__ import annotations

import importlib
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_STARTS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python -m|accelerate launch|torchrun) .*")
_FENCE = re.compile(r"^ {0,3}```([^\n]*)\n(.*?)^ {0,3}```", re.S | re.M)


def fenced(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a Markdown page: (words after the fence, content)."""
    return [(words, textwrap.dedent(content)) for words, content in _FENCE.findall(text)]


def commands_of_page(text: str) -> list[str]:
    """Commands in fenced and indented shell blocks and in code spans of a Markdown page."""
    blocks = [content for words, content in fenced(text) if words.split()[:1] in ([], ["sh"])]
    prose = _FENCE.sub("", text)
    blocks += re.findall(r"^    (.*)$", re.sub(r"\\\n\s+", "", prose), re.M)
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", prose, flags=re.M))]
    lines = [line for block in blocks for line in _joined(block)]
    spans = [span for span in spans if len(span.split()) > 3]  # "python -m X" alone is the name of a script
    return [line for line in [*lines, *spans] if _STARTS.match(line) and is_whole(line)]


def commands_of_config(text: str) -> list[str]:
    """Commands in the comments that open a config."""
    head = "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))
    found = [m.group() for line in _joined(head) if (m := _STARTS.search(line))]
    return [command for line in found if is_whole(command := _cut(line))]


def is_whole(command: str) -> bool:
    """Tell whether nothing of a command is left out."""
    return not re.search(r"(^|\s)\.\.\.(\s|$)", command)


def _joined(block: str) -> list[str]:
    return re.sub(r"\\\n\s*", "", block).splitlines()


def _cut(line: str) -> str:
    """Cut off what a comment says after a command: behind two spaces, or a bracket that it did not open."""
    line = re.split(r"\s{2,}", line)[0]
    depth = 0
    for i, letter in enumerate(line):
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return line[:i]
    return line


def split_command(command: str) -> tuple[str, list[str]]:
    """Return the script's module and the words it is given; ("", []) for what is no script of this toolkit."""
    words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]
    for i, word in enumerate(words):
        if word == "-m":
            module, rest = words[i + 1], words[i + 2 :]
            break
        if word.endswith(".py"):
            module, rest = word.removesuffix(".py").replace("/", "."), words[i + 1 :]
            break
    else:
        return "", []
    ours = module.split(".")[0] in ("train", "sample", "eval") or module == "guidance.taps"
    return (module, rest) if ours else ("", [])


def script(module: str) -> Callable[[list[str]], Any]:
    """The ``main`` of a script."""
    found = importlib.import_module(module)
    return (importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found).main


def exit_code(module: str, words: list[str]) -> Any:
    """The code a script exits with; 0 where it returns."""
    try:
        script(module)(words)
    except SystemExit as stop:
        return stop.code or 0
    return 0
