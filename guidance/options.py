"""The fields of a config dataclass: how to declare one, list them all, and show them to a user."""

from __future__ import annotations

import copy
import dataclasses
import enum
import os
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_REQUIRED = "???"  # OmegaConf's mark of a mandatory value


class Option(NamedTuple):
    """A leaf of a config: dotted key, type, default (or value), and the metadata of its field."""

    key: str
    hint: Any
    default: Any
    metadata: Mapping[str, Any]


def option(default: Any, help: str, *, allow_nonfinite: bool = False, **kwargs: Any) -> Any:
    """Return a dataclass field that carries its help text.

    Args:
        default: Default value. A list, dict or dataclass instance is copied for every config; a class or
            function is called for every config (a factory); `dataclasses.MISSING` makes the value mandatory.
        help: One phrase with units, range, and what None means; shown by `--help`.
        allow_nonfinite: Whether NaN and infinity are accepted.
        **kwargs: Passed to `dataclasses.field`.
    """
    metadata = {**kwargs.pop("metadata", {}), "help": help, "allow_nonfinite": allow_nonfinite}
    if default is dataclasses.MISSING:
        return dataclasses.field(default=_REQUIRED, metadata=metadata, **kwargs)
    if isinstance(default, type | types.FunctionType):
        return dataclasses.field(default_factory=default, metadata=metadata, **kwargs)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata, **kwargs)
    return dataclasses.field(default=default, metadata=metadata, **kwargs)


def list_options(cls: Any, prefix: str = "") -> Iterator[Option]:
    """Yield every leaf of a dataclass (or of an instance, for its values) with its dotted key."""
    kind = cls if isinstance(cls, type) else type(cls)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if not isinstance(cls, type):
            default = getattr(cls, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = field.default
        hint, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            nested = default if dataclasses.is_dataclass(default) else hint
            yield from list_options(nested, prefix=f"{key}.")
        else:
            yield Option(key, hint, default, field.metadata)


def flat_options(config: Any, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Return the values of a config by dotted key, its own before those of its groups.

    Args:
        config: An instance of a dataclass.
        leave_out: Dotted keys, or names of whole groups, that are not wanted.
    """
    wanted = [o for o in list_options(config) if not {o.key, o.key.rpartition(".")[0]} & set(leave_out)]
    return {item.key: item.default for item in sorted(wanted, key=lambda item: item.key.count("."))}


def list_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say for every value of ``new`` that differs what it was.

    >>> list_differences({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0})
    ['lr: 0.1 there, 0.2 here']
    """
    return [f"{key}: {old.get(key)} there, {new[key]} here" for key in new if old.get(key) != new[key]]


def is_required(item: Option) -> bool:
    """Tell whether a field has no default."""
    missing = item.default is dataclasses.MISSING
    return missing or (isinstance(item.default, str) and item.default == _REQUIRED)


def is_text(hint: Any) -> bool:
    """Tell whether a value of this type is text (or a path, or None), to be taken as it stands."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return all(isinstance(choice, str) for choice in arguments)
    kinds = set(arguments) if origin in (typing.Union, types.UnionType) else {hint}
    return bool(kinds & {str, Path}) and kinds <= {str, Path, types.NoneType}


def describe_type(hint: Any) -> str:
    """Return a type as a user reads it: `int or None`, `one of 'a', 'b'`, `list of float`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (None, types.NoneType):
        return "None"
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(a) for a in arguments)
    if origin is not None:
        inside = " and ".join(describe_type(a) for a in arguments if a is not Ellipsis)
        return f"{origin.__name__} of {inside}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(member.name for member in hint)}"
    return getattr(hint, "__name__", str(hint))


def plain_value(value: Any) -> Any:
    """Return a value as YAML has it: enums by name, paths as text, tuples as lists."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain_value(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    return value


def iterate_floats(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield every float inside a value, with the key that leads to it."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from iterate_floats(f"{key}.{name}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from iterate_floats(f"{key}[{index}]", item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from iterate_floats(f"{key}.{field.name}", getattr(value, field.name))
