"""From a frozen dataclass to the options of a command, and back. No command knows an option by name.

A field becomes ``--its-name``, with its type, default and ``metadata["help"]`` (or its line in the docstring's
``Args``); nested dataclasses are flattened, each under a panel of its own. Tuples are comma-separated.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import typer

from steeple.errors import ConfigError, did_you_mean

C = TypeVar("C")
SCALARS = (str, int, float, bool, Path)


@dataclass(frozen=True, kw_only=True)
class Look:
    """How some fields appear. Everything else follows from the dataclass.

    Args:
        positional: fields given by place instead of by name, in this order.
        short: field -> one-letter option, such as ``-o``.
        repeated: tuple fields given once per value, because a value may hold a comma.
        file: whether ``--config FILE`` may give the fields.
    """

    positional: tuple[str, ...] = ()
    short: Mapping[str, str] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()
    file: bool = False


@dataclass(frozen=True, slots=True)
class Leaf:
    """One field that takes a value: ``path`` leads to it from the outermost dataclass."""

    path: tuple[str, ...]
    owner: type
    kind: type
    many: bool
    default: Any  # MISSING: it must be given
    help: str

    @property
    def name(self) -> str:
        return self.path[-1]

    def show(self) -> str | bool:
        """The default as help should print it."""
        if self.default is MISSING or self.default is None or self.default in ("", ()):
            return False
        return ",".join(map(str, self.default)) if self.many else True


def leaves(cls: type, default: Any = MISSING, path: tuple[str, ...] = ()) -> list[Leaf]:
    """The fields of ``cls`` and of the dataclasses in it. Two fields with one name are a mistake of the programmer."""
    hints = typing.get_type_hints(cls)
    described = _described(cls)
    found: list[Leaf] = []
    for item in dataclasses.fields(cls):
        value = _default(item) if default is MISSING else getattr(default, item.name)
        kind = hints[item.name]
        here = (*path, item.name)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found.extend(leaves(kind, value, here))
            continue
        scalar, many = _scalar(cls, item.name, kind)
        help_ = item.metadata.get("help") or described.get(item.name, "")
        found.append(Leaf(here, cls, scalar, many, value, help_))
    names = [leaf.name for leaf in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise TypeError(f"{cls.__name__}: {', '.join(sorted(twice))} would be two options with one name")
    return found


def build(cls: type[C], values: Mapping[tuple[str, ...], Any], path: tuple[str, ...] = (), default: Any = None) -> C:
    """The dataclass with ``values`` by path; fields without a value are those of ``default``, or of the class."""
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        here = (*path, item.name)
        if here in values:
            arguments[item.name] = values[here]
        elif any(other[: len(here)] == here for other in values):
            inner = getattr(default, item.name, None) if default is not None else _default(item)
            inner = None if inner is MISSING else inner
            arguments[item.name] = build(typing.get_type_hints(cls)[item.name], values, here, inner)
    return cls(**arguments) if default is None else dataclasses.replace(default, **arguments)


def signature(found: list[Leaf], look: Look) -> list[inspect.Parameter]:
    """A keyword parameter for each leaf, the positional ones first."""
    by_name = {leaf.name: leaf for leaf in found}
    order = [*look.positional, *(name for name in by_name if name not in look.positional)]
    return [_parameter(by_name[name], look) for name in order]


def given(
    found: list[Leaf], look: Look, values: Mapping[str, Any], explicit: Callable[[str], bool]
) -> dict[tuple[str, ...], Any]:
    """What the user gave, on the command line or else in the config file, by path and in the fields' own types.

    Args:
        values: the command's parameters by name. explicit: whether a parameter was given on the command line.
    """
    stored = load_file(values["config_file"]) if look.file and values.get("config_file") else {}
    for key in stored:
        known = {leaf.name for leaf in found}
        if key not in known:
            raise ConfigError(f"{values['config_file']}: there is no setting {key!r}. {did_you_mean(key, known)}")
    result: dict[tuple[str, ...], Any] = {}
    for leaf in found:
        if explicit(leaf.name):
            result[leaf.path] = _parsed(leaf, values[leaf.name], look)
        elif leaf.name in stored:
            result[leaf.path] = _stored(leaf, stored[leaf.name])
        elif leaf.default is MISSING:
            raise ConfigError(f"{_flag(leaf.name)} is missing; give it.")
    return result


def load_file(path: Path) -> dict[str, Any]:
    """Settings from a TOML or JSON file, flat, by field name."""
    import json
    import tomllib

    readers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise ConfigError(f"--config {path}: give a file that ends in {' or '.join(readers)}.")
    try:
        values = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"--config {path} is not valid: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} holds no table of settings.")
    return {key.replace("-", "_"): value for key, value in values.items()}


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _scalar(cls: type, name: str, kind: Any) -> tuple[type, bool]:
    """The type of one value, and whether the field is a tuple of them. Optional ones are given or left out."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(kind) if part is not type(None)]
        if len(inner) == 1:
            return _scalar(cls, name, inner[0])
    if kind in SCALARS:
        return kind, False
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and len(arguments) == 2 and arguments[1] is ... and arguments[0] in SCALARS:
        return arguments[0], True
    raise TypeError(f"{cls.__name__}.{name}: {kind} cannot become an option")


def _described(cls: type) -> dict[str, str]:
    """Field -> its line in the ``Args:`` or ``Attributes:`` of the docstring."""
    text = inspect.getdoc(cls) or ""
    _, _, body = text.replace("Attributes:\n", "Args:\n").partition("Args:\n")
    found: dict[str, str] = {}
    last = ""
    for line in body.splitlines():
        match = re.match(r" {4}(\w+): (.*)", line)
        if match:
            last = match[1]
            found[last] = match[2].strip()
        elif last and line.startswith(" " * 8):
            found[last] += " " + line.strip()
        elif line.strip():
            break
    return {name: line.rstrip(".").replace("``", "") for name, line in found.items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parameter(leaf: Leaf, look: Look) -> inspect.Parameter:
    required = leaf.default is MISSING and not look.file
    kind, default = _annotation(leaf, look)
    text = f"{leaf.help} [required]" if leaf.default is MISSING and look.file else leaf.help
    text = text.replace("[", r"\[")  # rich reads [..] as a style
    info: Any
    if leaf.name in look.positional:
        info = typer.Argument(... if required else default, help=text, metavar=leaf.name.upper(), show_default=False)
    else:
        names = [_flag(leaf.name)]
        if leaf.kind is bool:
            names = [f"{_flag(leaf.name)}/--no-{leaf.name.replace('_', '-')}"]
        if leaf.name in look.short:
            names.append(look.short[leaf.name])
        info = typer.Option(
            ... if required else default,
            *names,
            help=text,
            show_default=leaf.show(),
            metavar=_metavar(leaf, look),
            rich_help_panel=_panel(leaf.owner),
        )
    return inspect.Parameter(leaf.name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=kind)


def _metavar(leaf: Leaf, look: Look) -> str | None:
    if not leaf.many:
        return None
    return leaf.kind.__name__.upper() + ("" if leaf.name in look.repeated else ",...")


def _annotation(leaf: Leaf, look: Look) -> tuple[Any, Any]:
    """What typer is told: a tuple is text until it is split."""
    missing = leaf.default is MISSING or leaf.default is None
    if leaf.many and leaf.name in look.repeated:
        return (list[leaf.kind] | None), (None if missing else list(leaf.default) or None)  # type: ignore[name-defined]
    if leaf.many:
        return str | None, None if missing else ",".join(map(str, leaf.default))
    return leaf.kind | None if missing else leaf.kind, None if missing else leaf.default


def _panel(owner: type) -> str:
    """LMConfig -> LM options, SamplingParams -> Sampling options."""
    words = re.sub(r"(Config|Params)$", "", owner.__name__)
    return f"{words} options"


def _parsed(leaf: Leaf, value: Any, look: Look) -> Any:
    if not leaf.many:
        return value
    if leaf.name in look.repeated:
        return tuple(value)
    return tuple(_one(leaf, part.strip()) for part in value.split(",") if part.strip())


def _one(leaf: Leaf, text: str) -> Any:
    try:
        return leaf.kind(text)
    except ValueError as error:
        raise ConfigError(
            f"{_flag(leaf.name)}: {text!r} is no {leaf.kind.__name__}; separate values by commas."
        ) from error


def _stored(leaf: Leaf, value: Any) -> Any:
    """A value out of a file, which must have the field's type already; a number may be a whole one."""
    if leaf.many:
        if not isinstance(value, list):
            raise ConfigError(f"{leaf.name} = {value!r} in the config file is no list.")
        return tuple(_stored_one(leaf, item) for item in value)
    return _stored_one(leaf, value)


def _stored_one(leaf: Leaf, value: Any) -> Any:
    accepted: dict[type, tuple[type, ...]] = {float: (int, float), Path: (str,)}
    fits = isinstance(value, accepted.get(leaf.kind, (leaf.kind,)))
    if not fits or (isinstance(value, bool) and leaf.kind is not bool):
        raise ConfigError(f"{leaf.name} = {value!r} in the config file is no {leaf.kind.__name__}.")
    return leaf.kind(value)
