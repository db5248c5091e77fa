"""From rounds to the rows of a step bench's result: medians, the floor by part, ratios to a plain step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, quantiles
from typing import Any

from steeple.bench.floor import Cost, StepCost, step_cost
from steeple.bench.step.parts import PARTS
from steeple.bench.step.turns import Cell, Turn
from steeple.config import ModelConfig
from steeple.hardware import Hardware

GIGA = 1e9
TICK = 1e-9  # a clock's tick, for a part that took none
SHORT = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}


def machine_facts(hardware: Hardware, readings: Sequence[float]) -> dict[str, Any]:
    """The block ``machine``.

    Args:
        hardware: as measured before all steps. readings: bytes per second beside every turn.
    """
    tenths = quantiles(readings, n=10, method="inclusive") if len(readings) > 1 else [*readings] * 2
    return {
        "name": hardware.name,
        "threads": hardware.threads,
        "read_gbs": hardware.read_bytes_per_second / GIGA,
        "read_gbs_median": median(readings) / GIGA,
        "read_gbs_range": [tenths[0] / GIGA, tenths[-1] / GIGA],
        **{f"{SHORT[dtype]}_gflops": flops / GIGA for dtype, flops in hardware.flops_per_second.items()},
    }


@dataclass(frozen=True, slots=True)
class Model:
    """What the floor must know. Args: parameters: that a step multiplies; itemsize: bytes of an element."""

    name: str
    shape: ModelConfig
    parameters: int
    itemsize: int

    def cost(self, cell: Cell, context: float) -> StepCost:
        """Of a step of ``cell`` with texts of ``context`` tokens."""
        return step_cost(self.shape, self.parameters, self.itemsize, batch=cell.batch, context=context, rows=cell.rows)


def cell_row(
    cell: Cell, turns: Sequence[Turn], plain: Sequence[Turn] | None, model: Model, hardware: Hardware, dtype: str
) -> dict[str, Any]:
    """What a row says of a cell that was measured. Shares of a floor are taken turn by turn, then their median.

    Args:
        plain: the turns of the same cell with one row, if there are any. hardware: its peaks count here; the bandwidth
            is that beside each turn.
    """
    seconds = [value for turn in turns for value in turn.seconds]
    watched = [parts for turn in turns for parts in turn.parts]
    cost = model.cost(cell, fmean(value for turn in turns for value in turn.lengths))
    each = [replace(hardware, read_bytes_per_second=turn.read_bytes_per_second) for turn in turns]
    typical = replace(hardware, read_bytes_per_second=median(turn.read_bytes_per_second for turn in turns))
    floors = [cost.total.seconds(machine, dtype) for machine in each]
    step = median(seconds)
    parts = {part: median(p[part] for p in watched) for part in PARTS}
    return {
        "mean_context": fmean(value for turn in turns for value in turn.lengths),
        "read_gbs": typical.read_bytes_per_second / GIGA,
        "step_ms": step * 1e3,
        "step_ms_least": min(seconds) * 1e3,
        "step_spread": _spread(seconds),
        "rounds": len(seconds),
        "turns": len(turns),
        "floor_ms": cost.total.seconds(typical, dtype) * 1e3,
        "fraction_of_floor": median(f / median(turn.seconds) for f, turn in zip(floors, turns, strict=True)),
        "bound": cost.total.bound(typical, dtype),
        "bytes": cost.total.bytes,
        "flops": cost.total.flops,
        **_against_floor("attention", cost.attention, turns, each, dtype),
        **_against_floor("linear", cost.linear, turns, each, dtype),
        **_against_floor("logits", cost.logits, turns, each, dtype),
        **{f"{part}_ms": parts[part] * 1e3 for part in ("elementwise", "cache", "rest", "sampling", "overhead")},
        "overhead_share": median(p["overhead"] / sum(p.values()) for p in watched),
        "watched_step_ms": median(sum(p.values()) for p in watched) * 1e3,
        "tokens_per_second": cell.batch / step if cell.rows == 1 else None,
        "verify_over_plain": _ratio(turns, plain) if plain is not None else None,
    }


def _ratio(turns: Sequence[Turn], plain: Sequence[Turn]) -> float:
    """Of two cells that took turns one after the other, so that the machine was the same for both."""
    pairs = zip(turns, plain, strict=False)  # the slower one had its seconds sooner
    return median(median(own.seconds) / median(other.seconds) for own, other in pairs)


def _against_floor(
    part: str, cost: Cost, turns: Sequence[Turn], machines: Sequence[Hardware], dtype: str
) -> dict[str, float]:
    times = [median(parts[part] for parts in turn.parts) for turn in turns]
    floors = [cost.seconds(machine, dtype) for machine in machines]
    middle = median(parts[part] for turn in turns for parts in turn.parts)
    return {
        f"{part}_ms": middle * 1e3,
        f"{part}_floor_ms": median(floors) * 1e3,
        f"{part}_fraction_of_floor": median(f / max(t, TICK) for f, t in zip(floors, times, strict=True)),
        f"{part}_gbs": cost.bytes / max(middle, TICK) / GIGA,
        f"{part}_gflops": cost.flops / max(middle, TICK) / GIGA,
    }


def _spread(seconds: Sequence[float]) -> float:
    """How far the middle 80 % of the rounds lie apart, as a share of the median."""
    if len(seconds) < 2:
        return 0.0
    tenths = quantiles(seconds, n=10, method="inclusive")
    return (tenths[-1] - tenths[0]) / median(seconds)


def measured(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that were not skipped."""
    return [row for row in rows if row["skipped"] is None]
