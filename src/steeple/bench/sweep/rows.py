"""From the runs of a cell to rows: those of the plain bench, and what only a sweep knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from steeple.bench.rows import Identity, speed
from steeple.bench.sweep.config import SweepConfig
from steeple.bench.sweep.engines import Method
from steeple.bench.sweep.workload import Cell, spread_of
from steeple.evidence.measure import Run

UNKNOWN = ("tokens_per_second_total", "throughput_multiplier_total", "prompt_ms")
"""Columns of a plain bench that have no value here: prompts are computed once for all."""

Row = dict[str, Any]


@dataclass(slots=True)
class CellRuns:
    """Everything that was measured in one cell.

    plain[r]: plain decoding at the beginning of turn r, and once more after the last; methods[i][r]: of each method.
    lengths: of all prompts; readings: bandwidth before each run, bytes per second.
    """

    cell: Cell
    tokens: int
    plain: list[Run] = field(default_factory=list)
    methods: list[list[Run]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    readings: list[float] = field(default_factory=list)


def cell_rows(
    config: SweepConfig,
    runs: CellRuns,
    methods: Sequence[Method],
    identities: Mapping[str, Identity],
    floor_seconds: float,
) -> list[Row]:
    """A row for plain decoding, then one for each method. ``identities``: by label; methods without one have none."""
    plain = [run.timing for run in runs.plain]
    step = median(timing.step for timing in plain)
    rows = []
    for method, own in zip(methods, [runs.plain, *runs.methods], strict=True):
        timings = [run.timing for run in own]
        identity = identities.get(method.label, Identity())
        row = {
            "drafter": method.drafter,
            "batch": runs.cell.batch,
            "context": runs.cell.context or round(spread_of(runs.lengths)["mean"]),
            "contexts": None if runs.cell.context else spread_of(runs.lengths),
            "k": method.k,
            "adaptive": method.adaptive,
            "temperature": runs.cell.temperature,
            "dtype": config.dtype,
            "max_tokens": runs.tokens,
            **speed(timings, plain),
            "drafted": sum(t.drafted for t in timings) / sum(t.request_rounds for t in timings),
            "floor_ms": floor_seconds * 1e3,
            "fraction_of_floor": None if method.k else floor_seconds / step,
            "plain_step_ms": [timing.step * 1e3 for timing in plain],
            "read_bytes_per_second": median(runs.readings),
            "read_bytes_per_second_range": [min(runs.readings), max(runs.readings)],
            "identical": identity.identical,
            "identical_requests": identity.requests,
            "identical_in_dtype": identity.in_dtype,
            "smallest_gap": identity.smallest_gap,
        }
        rows.append(row | dict.fromkeys(UNKNOWN))
    return rows


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell that a row belongs to."""
    return Cell(row["batch"], 0 if row["contexts"] else row["context"], row["temperature"])
