"""Configuration of a script: dataclass < YAML < key=value.

A script declares one dataclass; its defaults are overridden by a YAML file, and that by `key=value` words on
the command line. Every mistake in either becomes one sentence. The library itself never takes a config.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import enum
import itertools
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from guidance.utils.errors import UserError, nearest
from guidance.utils.io import atomic_path

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


T = TypeVar("T")


class ConfigError(UserError):
    """Report a mistake in a configuration in one sentence: expected, got, fix."""


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build the config of a script from its defaults, a YAML file and overrides, in this order.

    Args:
        cls: Dataclass, possibly with dataclasses inside.
        path: YAML file, relative to the current folder or to the repository; None takes the defaults.
        overrides: Words `key=value` or `group.key=value`; values are YAML, those of text fields are
            taken as they stand.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: If the file cannot be read, or a key is unknown, or a value has the wrong type.
    """
    options = {item.key: item for item in list_options(cls)}
    config = OmegaConf.structured(cls)
    if path is not None:
        file = _find_file(path)
        for key, value in _flatten(_read_yaml(file), options):
            _assign(config, options, key, value, source=f"'{file}'")
    for word in overrides:
        key, value = _split_override(word, options)
        pairs = _flatten({key: value}, options) if isinstance(value, dict) else [(key, value)]
        for full_key, leaf in pairs:
            _assign(config, options, full_key, leaf, source=f"'{word}'")
    result = _to_object(config)
    _require_finite(result)
    return typing.cast(T, result)


def save_config(config: Any, path: str | Path) -> None:
    """Write a config as YAML that `load_config` reads back, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Any) -> str:
    """Return a config (an instance of a dataclass) as YAML text."""
    plain = plain_value(dataclasses.asdict(config))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def parse_config(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    default_config: str | None = None,
) -> T:
    """Parse a command line `[--config FILE] [key=value ...]` into a config.

    Args:
        cls: Dataclass of the script.
        argv: Words after the program name; None takes `sys.argv`.
        prog: How the user calls the script, for example `python -m train.head`.
        description: What the script does, in one or two sentences.
        default_config: YAML file to use when `--config` is absent; None uses the defaults of `cls`.

    Returns:
        An instance of `cls`. `--help` and `--print-config` exit with 0, a mistake with one sentence and 2.
    """
    return parse_config_and_args(
        cls, argv, prog=prog, description=description, default_config=default_config
    )[0]


def parse_config_and_args(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    default_config: str | None = None,
    extra: Callable[[argparse.ArgumentParser], Any] | None = None,
) -> tuple[T, argparse.Namespace]:
    """Parse as `parse_config` does, with arguments of the script's own that `extra` adds to the parser.

    Returns:
        The config and the namespace with the values of the added arguments.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=_teach(cls, prog, default_config),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    shown = f" (default: {default_config})" if default_config else ""
    parser.add_argument("--config", metavar="FILE", default=default_config, help=f"YAML file{shown}")
    parser.add_argument("--print-config", action="store_true", help="print the merged config and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set an option, listed below")
    if extra is not None:
        extra(parser)
    namespace = parser.parse_intermixed_args(argv)
    try:
        config = load_config(cls, namespace.config, namespace.overrides)
    except UserError as error:
        parser.error(" ".join(str(error).split()))
    if namespace.print_config:
        print(to_yaml(config), end="")
        parser.exit(0)
    return config, namespace


def _teach(cls: type, prog: str, default_config: str | None) -> str:
    """Return the end of `--help`: every option with type, default and help text, and an example."""
    lines = ["options of the config (key=value):"]
    first = None
    for item in list_options(cls):
        required = is_required(item)
        default = "required" if required else f"default: {plain_value(item.default)!r}"
        lines.append(f"  {item.key}  ({describe_type(item.hint)}; {default})")
        if item.metadata.get("help"):
            lines.append(f"      {item.metadata['help']}")
        if not required and first is None:
            first = f"{item.key}={plain_value(item.default)}"
    lines += ["", "example:", f"  {prog} --config {default_config or 'FILE.yaml'} '{first or 'key=value'}'"]
    return "\n".join(lines)


def _find_file(path: str | Path) -> Path:
    """Return the YAML file, looked for in the current folder and then in the repository."""
    given = Path(path).expanduser()
    candidates = [given, Path(__file__).resolve().parents[2] / given]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    folder = next((c.parent for c in candidates if c.parent.is_dir()), None)
    names = sorted(p.name for p in folder.iterdir() if p.suffix in {".yaml", ".yml"}) if folder else []
    beside = nearest(given.name, names) if names else " There is no YAML file beside it."
    raise ConfigError(f"Expected a config file at '{path}', found none.{beside}")


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(file)
        content = OmegaConf.to_container(loaded, resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"Expected YAML in '{file}', but it cannot be read: {line}{reason}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"Expected 'key: value' lines in '{file}', got a {type(content).__name__}.")
    return typing.cast("dict[str, Any]", content)


def _flatten(
    tree: Mapping[Any, Any], options: Mapping[str, Option], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) down to the leaves of the dataclass, not further: a dict may be a value."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in options):
            yield from _flatten(value, options, prefix=f"{key}.")
        else:
            yield key, value


def _split_override(word: str, options: Mapping[str, Option]) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"Expected an override 'key=value', got '{word}'; write for example 'seed=1'.")
    if key in options and is_text(options[key].hint):  # a prompt may hold ': ', '#' or digits only
        return key, None if text == "null" and types.NoneType in typing.get_args(options[key].hint) else text
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        return key, typing.cast("dict[str, Any]", value)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"Expected a YAML value in '{word}', but '{text}' cannot be read as one."
        ) from error


def _assign(config: Any, options: Mapping[str, Option], key: str, value: Any, *, source: str) -> None:
    base = next((k for k in options if key == k or key.startswith((f"{k}.", f"{k}["))), None)
    if base is None:
        groups = {k.rpartition(".")[0] for k in options} - {""}
        if key in groups:
            raise ConfigError(
                f"Expected options of the group '{key}' in {source}, got {value!r}; write '{key}.NAME=VALUE'."
            )
        raise ConfigError(f"Unknown option '{key}' in {source}.{_nearest_key(key, options)}")
    wanted = f"Expected {describe_type(options[base].hint)} for '{key}', got {value!r}, in {source}"
    if options[base].hint is bool and not isinstance(value, bool | str):
        raise ConfigError(f"{wanted}; write true or false.")
    try:
        OmegaConf.update(config, key, value, merge=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{wanted}: {_first_line(error)}.") from error


def _nearest_key(key: str, options: Mapping[str, Option]) -> str:
    """Suggest a key, also when only its last part, or its group, is right."""
    same_name = [k for k in options if k.rpartition(".")[2] == key.rpartition(".")[2]]
    if same_name:
        return f" Did you mean '{same_name[0]}'?"
    group = key.rpartition(".")[0]
    siblings = [k for k in options if group and k.startswith(f"{group}.")]
    return nearest(key, siblings or options)


def _to_object(config: Any) -> Any:
    try:
        return OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "an option"
        raise ConfigError(f"Expected a value for '{key}', got none; add '{key}=VALUE'.") from error
    except UserError:
        raise
    except (OmegaConfBaseException, ValueError) as error:  # interpolations; checks in __post_init__
        raise ConfigError(f"{_first_line(error)}.") from error


def _require_finite(config: Any) -> None:
    for item in list_options(config):
        for key, value in iterate_floats(item.key, item.default):
            if not math.isfinite(value) and not item.metadata.get("allow_nonfinite"):
                raise ConfigError(f"Expected a finite number for '{key}', got {value}; give another value.")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")


def list_words(argv: Sequence[str], key: str) -> list[str]:
    """Turn words without a key into a list option of a script.

    >>> list_words(["my/head", "split=validation", "--config", "a.yaml"], "heads")
    ['split=validation', '--config', 'a.yaml', 'heads=["my/head"]']
    """
    words, rest, listed = iter(argv), [], []
    for word in words:
        if word.startswith("-") or re.match(r"[\w.]+=", word):
            rest += [word, *itertools.islice(words, int(word == "--config"))]
        else:
            listed.append(word)
    return rest + ([f"{key}={json.dumps(listed, ensure_ascii=False)}"] if listed else [])
