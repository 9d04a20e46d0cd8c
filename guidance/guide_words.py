"""Guides as words: ``midblock:head=runs/heads/colour,target=red``, or a file of ``configs/guides/``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from guidance.config import load_config
from guidance.errors import UserError, nearest
from guidance.guide_specs import GUIDES, GuideSpec

CONFIGS = Path("configs/guides")


def read_guide(text: str) -> GuideSpec:
    """Read a guide from ``NAME``, ``NAME:key=value,key=value`` or a YAML file with the line ``guide: NAME``.

    A name that is no method is looked up as ``configs/guides/NAME.yaml``; options after the colon override it.

    Raises:
        UserError: If there is no such guide or option; the message names what there is and the nearest.

    >>> read_guide("midblock:head=my/head,target=7").target
    '7'
    """
    name, _, options = text.partition(":")
    words, file = split_options(options), Path(name)
    if name not in GUIDES and not name.endswith((".yaml", ".yml")):
        file = CONFIGS / f"{name}.yaml"
    if name not in GUIDES:
        if not file.is_file():
            known = list(dict.fromkeys([*GUIDES, *sorted(f.stem for f in CONFIGS.glob("*.yaml"))]))
            raise UserError(f"Expected the name of a guide or a file, got '{name}'.{nearest(name, known)}")
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        name = given.pop("guide", "") if isinstance(given, dict) else ""
        if name not in GUIDES:
            hint = nearest(str(name), GUIDES)
            raise UserError(f"Expected a line 'guide: NAME' in '{file}', got '{name}'.{hint}")
        words = [*(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in given.items()), *words]
    return load_config(GUIDES[name], None, words)


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


def explain(specs: Sequence[GuideSpec], num_steps: int) -> str:
    """What will run in so many steps, a line a guide."""
    return "\n".join(spec.explain(num_steps) for spec in specs) or "no guide: unguided sampling"
