"""Import the public names of a package on first use, so that ``import guidance`` and ``--help`` need no torch."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guidance.utils.extras import explain_missing


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package (PEP 562).

    The names are those that its ``__init__.py`` imports under ``if TYPE_CHECKING``: listed once, for type checkers too.

    Args:
        package: Its ``__name__``.
        file: Its ``__file__``.
    """
    blocks = [node.body for node in ast.parse(Path(file).read_text("utf-8")).body if isinstance(node, ast.If)]
    imports = [node for body in blocks for node in body if isinstance(node, ast.ImportFrom)]
    home = {alias.name: str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        try:
            return getattr(importlib.import_module(home[name]), name)
        except ModuleNotFoundError as error:
            if (sentence := explain_missing(error)) is None:
                raise
            raise ModuleNotFoundError(sentence, name=error.name) from error

    return get, lambda: sorted(home), sorted(home)
