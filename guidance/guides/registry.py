"""Guides by name and options, as command lines, YAML files and records describe them."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import yaml

import guidance.guides
from guidance.guides.base import GUIDES, Guide
from guidance.utils.config import load_config
from guidance.utils.errors import UserError, nearest

CONFIGS = Path("configs/guides")


def list_guides() -> dict[str, type[Guide]]:
    """Return all registered guides by name: those of every file in this package, and any registered elsewhere."""
    for module in pkgutil.iter_modules(guidance.guides.__path__):
        importlib.import_module(f"guidance.guides.{module.name}")
    return GUIDES


def read_guide(text: str) -> Guide:
    """Read a guide from ``NAME``, ``NAME:key=value,key=value`` or a YAML file with the line ``guide: NAME``.

    A name that is not a method is looked up as ``configs/guides/NAME.yaml``; options after the colon override it.
    ``MODULE.NAME`` imports a module of yours first, which registers its guide.  No network is loaded.

    Raises:
        UserError: If there is no such guide or option; the message suggests the nearest name.

    >>> read_guide("midblock:head=my/head,target=7").target
    '7'
    """
    name, _, options = text.partition(":")
    words, known = split_options(options), list_guides()
    file = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if name not in known and file.is_file():
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        name = str(given.pop("guide", "")) if isinstance(given, dict) else ""
        if _find(name) is None:
            raise UserError(f"Expected a line 'guide: NAME' in '{file}', got '{name}'.{nearest(name, known)}")
        words = [*(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in given.items()), *words]
    if (cls := _find(name)) is None:
        names = list(dict.fromkeys([*known, *sorted(f.stem for f in CONFIGS.glob("*.yaml"))]))
        raise UserError(f"Expected the name of a guide or a file, got '{name}'.{nearest(name, names)}")
    return load_config(cls, None, words)


def _find(name: str) -> type[Guide] | None:
    """Return a guide by its name, or by that of its module and its name."""
    module, _, method = name.rpartition(".")
    if module and name not in GUIDES:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            return None
    return GUIDES.get(name) or GUIDES.get(method)


def split_options(text: str) -> list[str]:
    """Split ``key=value,key=[a,b]`` at the commas that begin a new key.

    >>> split_options("texts=[a boat, the sea],weights=[1,-0.5]")
    ['texts=[a boat, the sea]', 'weights=[1,-0.5]']
    """
    words: list[str] = []
    for piece in filter(None, text.split(",")):
        open_list = words and words[-1].count("[") > words[-1].count("]")
        if open_list:
            words[-1] += f",{piece}"
        else:
            words.append(piece)
    return words


def explain(guides: Sequence[Guide], num_steps: int) -> str:
    """Describe guides for ``--explain``, one per line."""
    return "\n".join(guide.explain(num_steps) for guide in guides) or "no guide: unguided sampling"
