"""The result of a load test as a table for people, and for a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

NO_VALUE = "-"
LATE_MS = 10.0  # a generator that is later than this at p99 is busy with itself
COLUMNS = (
    "rate", "in flight", "done", "failed", "req/s", "tokens/s", "goodput", "TTFT p50", "p99", "ITL p50", "p99",
    "TPOT p50", "p99", "e2e p50", "p99", "tau",
)  # fmt: skip
MARKS = ("ttft", "itl", "tpot", "e2el")


def serve_table(result: Mapping[str, Any]) -> RenderableType:
    """A row per point, latencies in ms since the intended time; below it what failed, and why to doubt a row."""
    config = result["config"]
    objectives = [
        f"{name} {config[name + '_ms']:g} ms" for name in ("ttft", "itl", "tpot", "e2e") if config[name + "_ms"]
    ]
    caption = "latencies in ms, since the intended time" + ("; goodput: " + ", ".join(objectives) if objectives else "")
    table = Table(title=f"{result['model_id']} at {result['server']['base_url']}", caption=caption)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(*_texts(row))
    return Group(table, *(Text(line) for row in result["rows"] for line in notes(row)))


def serve_markdown(result: Mapping[str, Any]) -> str:
    """The same table for a page, with what failed below it."""
    lines = [COLUMNS, ["---:"] * len(COLUMNS), *(_texts(row) for row in result["rows"])]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([table, *(line for row in result["rows"] for line in notes(row))])


def _texts(row: Mapping[str, Any]) -> list[str]:
    limit = row["max_concurrency"]
    times = [row[f"p{share}_{mark}_ms"] for mark in MARKS for share in (50, 99)]
    return [
        label(row["request_rate"]),
        str(limit) if limit else "all",
        str(row["completed"]),
        str(row["failed"]),
        _number(row["request_throughput"], 2),
        _number(row["output_throughput"], 1),
        _number(row["request_goodput"], 2),
        *(_number(value, 1) for value in times),
        _number(row["tau"], 2),
    ]


def label(rate: float | str) -> str:
    """A rate for people."""
    return rate if isinstance(rate, str) else f"{rate:.4g}"


def notes(row: Mapping[str, Any]) -> list[str]:
    """What went wrong at a point, a line each."""
    where = f"rate {label(row['request_rate'])}"
    where += f", {row['max_concurrency']} in flight" if row["max_concurrency"] else ""
    found = [f"{where}: {count} x {kind}: {row['error_examples'][kind]}" for kind, count in row["errors"].items()]
    lag = row["p99_lag_ms"]
    if lag is not None and lag > LATE_MS:
        found.append(f"{where}: the generator itself was {lag:.0f} ms late (p99); send from a machine with less to do.")
    return found


def _number(value: float | None, digits: int) -> str:
    return NO_VALUE if value is None else f"{value:.{digits}f}"
