"""Tables of runs that scaling laws are fitted to: trained drafts and what they reach, widths and their throughput."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steeple.errors import ConfigError, StorageError


@dataclass(frozen=True)
class Run:
    """One trained draft: its training tokens, its parameters, the tokens per round that it reached, and its kind."""

    tokens: float
    parameters: float
    tau: float
    kind: str = ""


@dataclass(frozen=True)
class WidthRun:
    """A throughput measured with drafts of one width (drafted tokens or branches) at one batch."""

    batch: float
    width: float
    throughput: float


@dataclass(frozen=True)
class Table:
    """Runs to fit.

    Attributes:
        k: drafted tokens per round behind every tau, 0 = not known.
        target: parameters of the model that the drafts are for, 0 = not known.
    """

    runs: tuple[Run, ...]
    widths: tuple[WidthRun, ...] = ()
    k: int = 0
    target: float = 0.0


def read_table(path: Path) -> dict[str, Table]:
    """Tables of runs by kind, from JSON: ``{"k", "runs": [{"tokens", "parameters", "tau", "kind"}], "widths": [..]}``.

    ``acceptance`` (accepted drafted tokens of a round) may stand for ``tau``, which is one more. ``widths`` has
    ``{"batch", "width", "throughput"}`` and is optional, as are ``k``, ``target_parameters`` and ``kind``.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: a run lacks a field, or it is no number above 0.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"The table {path} cannot be read ({error.strerror}); give a JSON file.") from error
    except ValueError as error:
        raise StorageError(f"The table {path} is not valid JSON ({error}); write it again.") from error
    if not isinstance(values, dict) or not isinstance(values.get("runs"), list):
        raise ConfigError(f"{path}: there is no list under 'runs'; give {{\"runs\": [{{...}}, ...]}}.")
    runs = [_run(path, number, row) for number, row in enumerate(values["runs"])]
    fields = ("batch", "width", "throughput")
    rows = enumerate(values.get("widths", []))
    widths = tuple(WidthRun(*(_number(path, f"widths[{i}]", row, name) for name in fields)) for i, row in rows)
    k = int(_number(path, "the table", values, "k")) if values.get("k") else 0
    target = _number(path, "the table", values, "target_parameters") if values.get("target_parameters") else 0.0
    kinds = dict.fromkeys(run.kind for run in runs)
    return {kind: Table(tuple(r for r in runs if r.kind == kind), widths, k, target) for kind in kinds}


def _run(path: Path, number: int, row: Any) -> Run:
    where = f"runs[{number}]"
    tokens, parameters = (_number(path, where, row, name) for name in ("tokens", "parameters"))
    if "tau" not in row and "acceptance" in row:
        tau = 1.0 + _number(path, where, row, "acceptance")
    else:
        tau = _number(path, where, row, "tau")
    return Run(tokens, parameters, tau, str(row.get("kind", "")))


def _number(path: Path, where: str, row: Any, name: str) -> float:
    value = row.get(name) if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{path}: {where}.{name} = {value!r} is no number above 0; correct it.")
    return float(value)
