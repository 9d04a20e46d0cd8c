"""Import the public names of a package on first use, so that ``import guidance`` and ``--help`` need no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guidance.utils.extras import explain_missing


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package (PEP 562).

    Args:
        package: Its ``__name__``.
        homes: Module, relative to the package -> the public names that it defines.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        try:
            return getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        except ModuleNotFoundError as error:
            if (sentence := explain_missing(error)) is None:
                raise
            raise ModuleNotFoundError(sentence, name=error.name) from error

    return get, lambda: sorted(home), sorted(home)
