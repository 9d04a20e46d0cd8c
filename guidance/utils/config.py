"""Configuration of a script: dataclass < YAML < key=value.

A script declares one dataclass.  A YAML file overrides its defaults, and `key=value` words on the command line override
both; every mistake becomes one sentence.  The library itself never takes a config.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
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

from guidance.utils.errors import UserError, first_line, nearest

T = TypeVar("T")

_REQUIRED = "???"  # OmegaConf's mark of a mandatory value


class ConfigError(UserError):
    """Report a mistake in a configuration in one sentence: expected, got, fix."""


# ---- declaring ----------------------------------------------------------------------------------------------------
def option(default: Any, help: str, *, identity: bool = True, **metadata: Any) -> Any:
    """Return a dataclass field that carries its help text.

    Args:
        default: Default value. A list, dict or dataclass instance is copied for every config; a class or
            function is called for every config (a factory); `dataclasses.MISSING` makes the value mandatory.
        help: One phrase with units, range, and what None means; shown by `--help`.
        identity: Whether another value makes another output, see `incidental_options`.
        **metadata: Further metadata of the field; ``kind`` is its type on the command line, where it is ``Any`` in
            Python.
    """
    metadata |= {"help": help, "identity": identity}
    if default is dataclasses.MISSING:
        return dataclasses.field(default=_REQUIRED, metadata=metadata)
    if isinstance(default, type | types.FunctionType):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Option(NamedTuple):
    """A leaf of a config: dotted key, type, value (or default), and help text."""

    key: str
    hint: Any
    value: Any
    help: str

    @property
    def is_required(self) -> bool:
        """Tell whether the option has no default."""
        return self.value is dataclasses.MISSING or self.value == _REQUIRED

    @property
    def is_text(self) -> bool:
        """Tell whether values are text (or paths, or None), to be taken literally."""
        origin, arguments = typing.get_origin(self.hint), typing.get_args(self.hint)
        if origin is typing.Literal:
            return all(isinstance(choice, str) for choice in arguments)
        kinds = set(arguments) if origin in (typing.Union, types.UnionType) else {self.hint}
        return bool(kinds & {str, Path}) and kinds <= {str, Path, types.NoneType}


def list_options(config: Any, prefix: str = "") -> Iterator[Option]:
    """Yield every leaf of a dataclass (or of an instance, for its values) with its dotted key."""
    cls = config if isinstance(config, type) else type(config)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not isinstance(config, type):
            value = getattr(config, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = field.default
        hint, key = field.metadata.get("kind", hints[field.name]), prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from list_options(value if dataclasses.is_dataclass(value) else hint, prefix=f"{key}.")
        else:
            yield Option(key, hint, value, field.metadata.get("help", ""))


def flat_options(config: Any, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Return the values of a config by dotted key, top-level options before those of groups.

    Args:
        config: An instance of a dataclass.
        leave_out: Dotted keys, or names of whole groups, to omit.
    """
    kept = [o for o in list_options(config) if not {o.key, o.key.rpartition(".")[0]} & set(leave_out)]
    return {o.key: o.value for o in sorted(kept, key=lambda o: o.key.count("."))}


def incidental_options(cls: type) -> set[str]:
    """Return the names of the options of a dataclass on which the identity of its output does not depend."""
    return {field.name for field in dataclasses.fields(cls) if not field.metadata.get("identity", True)}


def list_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe each value of ``new`` that differs from the old one.

    >>> list_differences({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0})
    ['lr: 0.1 there, 0.2 here']
    """
    return [f"{key}: {old.get(key)} there, {new[key]} here" for key in new if old.get(key) != new[key]]


# ---- reading ------------------------------------------------------------------------------------------------------
def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build the config of a script from its defaults, a YAML file and overrides, in this order.

    Args:
        cls: Dataclass, possibly with nested dataclasses.
        path: YAML file, relative to the current folder or to the repository; None takes the defaults.
        overrides: Words `key=value` or `group.key=value`; values are YAML, those of text options are taken
            literally.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: If the file cannot be read, a key is unknown, or a value has the wrong type.
    """
    from omegaconf import OmegaConf  # here, so that a guide's options can be declared without it
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

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
    try:
        result = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "an option"
        raise ConfigError(f"Expected a value for '{key}', got none; add '{key}=VALUE'.") from error
    except UserError:
        raise
    except (OmegaConfBaseException, ValueError) as error:  # interpolations; checks in __post_init__
        raise ConfigError(f"{first_line(error).rstrip('. ')}.") from error
    for item in list_options(result):
        for key, number in _floats(item.key, item.value):
            if not math.isfinite(number):
                raise ConfigError(f"Expected a finite number for '{key}', got {number}; give another value.")
    return typing.cast(T, result)


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
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"Expected YAML in '{file}', but it cannot be read: {line}{reason}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"Expected 'key: value' lines in '{file}', got a {type(content).__name__}.")
    return typing.cast("dict[str, Any]", content)


def _flatten(tree: Mapping[Any, Any], options: Mapping[str, Option], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) down to the options, not further: a value may be a dict."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in options):
            yield from _flatten(value, options, prefix=f"{key}.")
        else:
            yield key, value


def _split_override(word: str, options: Mapping[str, Option]) -> tuple[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"Expected an override 'key=value', got '{word}'; write for example 'seed=1'.")
    if key in options and options[key].is_text:  # a prompt may hold ': ', '#' or digits only
        return key, None if text == "null" and types.NoneType in typing.get_args(options[key].hint) else text
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        return key, typing.cast("dict[str, Any]", value)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"Expected a YAML value in '{word}', but '{text}' cannot be read as one.") from error


def _assign(config: Any, options: Mapping[str, Option], key: str, value: Any, *, source: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    base = next((k for k in options if key == k or key.startswith((f"{k}.", f"{k}["))), None)
    if base is None:
        if any(k.startswith(f"{key}.") for k in options):
            raise ConfigError(
                f"Expected options of the group '{key}' in {source}, got {value!r}; write '{key}.NAME=VALUE'."
            )
        raise ConfigError(f"Unknown option '{key}' in {source}.{_nearest_key(key, options)}")
    expected = f"Expected {_describe_type(options[base].hint)} for '{key}', got {value!r}, in {source}"
    if options[base].hint is bool and not isinstance(value, bool | str):
        raise ConfigError(f"{expected}; write true or false.")
    try:
        OmegaConf.update(config, key, value, merge=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{expected}: {first_line(error).rstrip('. ')}.") from error


def _nearest_key(key: str, options: Mapping[str, Option]) -> str:
    """Suggest a key, even where only its last part or its group is right."""
    same_name = [k for k in options if k.rpartition(".")[2] == key.rpartition(".")[2]]
    if same_name:
        return f" Did you mean '{same_name[0]}'?"
    group = key.rpartition(".")[0]
    siblings = [k for k in options if group and k.startswith(f"{group}.")]
    return nearest(key, siblings or options)


def _floats(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield every float inside a value, with the key that leads to it."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _floats(f"{key}.{name}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _floats(f"{key}[{index}]", item)


# ---- the command line ---------------------------------------------------------------------------------------------
def parse_config(cls: type[T], argv: Sequence[str] | None = None, **arguments: Any) -> T:
    """Parse a command line into a config; arguments as of :func:`parse_config_and_args`."""
    return parse_config_and_args(cls, argv, **arguments)[0]


def parse_config_and_args(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    default_config: str | None = None,
    extra: Callable[[argparse.ArgumentParser], Any] | None = None,
) -> tuple[T, argparse.Namespace]:
    """Parse a command line `[--config FILE] [key=value ...]`, with further arguments of the script.

    Args:
        cls: Dataclass of the script.
        argv: Words after the program name; None takes `sys.argv`.
        prog: How the user calls the script, for example `python -m train.head`.
        description: What the script does, in one or two sentences.
        default_config: YAML file to use when `--config` is absent; None uses the defaults of `cls`.
        extra: Adds arguments to the parser.

    Returns:
        The config, and the namespace of the added arguments.  `--help` and `--print-config` exit with 0, a mistake
        with one sentence and 2.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=_list_help(cls, prog, default_config),
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


# ---- printing -----------------------------------------------------------------------------------------------------
def to_yaml(config: Any) -> str:
    """Return a config (an instance of a dataclass) as YAML text, which `load_config` reads back."""
    plain = plain_value(dataclasses.asdict(config))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def plain_value(value: Any) -> Any:
    """Convert a value to YAML types: paths to text, tuples to lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain_value(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    return value


def _list_help(cls: type, prog: str, default_config: str | None) -> str:
    """Return the end of `--help`: every option with its type, default and help text, and an example."""
    lines = ["options of the config (key=value):"]
    options = list(list_options(cls))
    for item in options:
        default = "required" if item.is_required else f"default: {plain_value(item.value)!r}"
        lines.append(f"  {item.key}  ({_describe_type(item.hint)}; {default})")
        if item.help:
            lines.append(f"      {item.help}")
    example = [f"{item.key}={plain_value(item.value)}" for item in options if not item.is_required]
    word = (example or ["key=value"])[0]
    return "\n".join([*lines, "", "example:", f"  {prog} --config {default_config or 'FILE.yaml'} '{word}'"])


def _describe_type(hint: Any) -> str:
    """Return a type as a user reads it: `int or None`, `one of 'a', 'b'`, `list of float`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (None, types.NoneType):
        return "None"
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe_type(a) for a in arguments)
    if origin is not None:
        inside = " and ".join(_describe_type(a) for a in arguments if a is not Ellipsis)
        return f"{origin.__name__} of {inside}"
    return getattr(hint, "__name__", str(hint))
