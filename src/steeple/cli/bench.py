"""``steeple bench``: drafters against plain decoding, in a few cells or, with ``--sweep``, over a whole grid."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import Field
from pathlib import Path
from typing import Any

from steeple.bench.config import BenchConfig
from steeple.bench.run import run_bench
from steeple.bench.sweep.config import SweepConfig
from steeple.bench.sweep.run import run_sweep
from steeple.bench.sweep.table import sweep_table
from steeple.bench.table import bench_table
from steeple.cli.app import COMMANDS
from steeple.cli.progress import steps
from steeple.cli.shell import STDOUT, Shell, command
from steeple.errors import ConfigError

SWEEP = "with drafters at several k over the grid of batch, context and temperature"


def run(options: Any, shell: Shell) -> dict[str, Any]:
    """Measure and show the table."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    sweep = given.pop("sweep")
    config = chosen(SweepConfig if sweep else BenchConfig, given)
    with steps(shell.console) as progress:
        if isinstance(config, SweepConfig):
            result = run_sweep(config, progress, file=None if shell.json in (None, STDOUT) else Path(str(shell.json)))
        else:
            result = run_bench(config, progress)
    shell.console.print(sweep_table(result) if sweep else bench_table(result))
    return result


def chosen(settings: type[BenchConfig] | type[SweepConfig], given: dict[str, Any]) -> BenchConfig | SweepConfig:
    """The settings with what was given; ``ConfigError`` for what belongs to the other kind of bench."""
    known = {field.name for field in dataclasses.fields(settings)}
    values = {name: value for name, value in given.items() if value is not None}
    for name in values:
        if name not in known:
            remedy = "add --sweep" if settings is BenchConfig else "leave it out, or leave out --sweep"
            raise ConfigError(f"--{name.replace('_', '-')} is not for this kind of bench; {remedy}.")
    return settings(**values)


def _options() -> type:
    """A dataclass with the fields of both kinds, none of them given: each kind has defaults of its own."""
    kinds = {"bench": BenchConfig, "sweep": SweepConfig}
    fields: dict[str, tuple[str, Any, Any]] = {
        "sweep": ("sweep", bool, dataclasses.field(default=False, metadata={"help": SWEEP}))
    }
    names = dict.fromkeys(item.name for kind in kinds.values() for item in dataclasses.fields(kind))
    for name in names:
        own = {label: item for label, kind in kinds.items() for item in dataclasses.fields(kind) if item.name == name}
        first = next(iter(own))
        type_ = typing.get_type_hints(kinds[first])[name] | None
        fields[name] = (name, type_, dataclasses.field(default=None, metadata={"help": _help(own)}))
    return dataclasses.make_dataclass("BenchConfig", fields.values(), frozen=True, kw_only=True)


def _help(own: dict[str, Field[Any]]) -> str:
    """What a field is, for which kind of bench, and its defaults."""
    words = [next(iter(own.values())).metadata["help"]]
    if len(own) == 1:
        words.insert(0, "--sweep only:" if "sweep" in own else "not with --sweep:")
    defaults = {label: _text(item.default) for label, item in own.items() if item.default}
    if len(defaults) == len(own) and len(set(defaults.values())) == 1:
        words.append(f"({next(iter(defaults.values()))})")
    elif defaults:
        words.append("(" + "; ".join(f"{label}: {text}" for label, text in defaults.items()) + ")")
    return " ".join(words)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


app = command(_options(), run, help=COMMANDS["bench"][1])
