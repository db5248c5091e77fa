"""The contest's result as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

COLUMNS = ("tokens/s", "plain step, ms", "speculative tokens/s", "tokens/round", "prompt s", "agreement", "with plain")


def peers_table(result: dict[str, Any]) -> Table:
    """A row per contestant and cell; those that did not run say why."""
    table = Table(
        title=f"{result['config']['model']}, {result['config']['dtype']}, {result['config']['threads']} threads"
    )
    table.add_column("batch", justify="right")
    table.add_column("context", justify="right")
    table.add_column("who", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    rows: Sequence[dict[str, Any]] = result["rows"]
    for row, following in zip(rows, [*rows[1:], {}], strict=True):
        end = (row["batch"], row["context"]) != (following.get("batch"), following.get("context"))
        table.add_row(str(row["batch"]), str(row["context"]), row["name"], *_texts(row), end_section=end)
    for name, reason in absent(rows).items():
        table.caption = f"{table.caption or ''}{name}: {reason}\n"
    return table


def absent(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Reasons of the rows that have no figures, by name, the last one of each."""
    return {row["name"]: row.get("skipped", row.get("error")) for row in rows if "skipped" in row or "error" in row}


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    if "error" in row or "skipped" in row:
        return ("failed" if "error" in row else "skipped", *[""] * (len(COLUMNS) - 1))
    rate, speculative = _number(row["tokens_per_second"], 1), row["speculative"]
    return (
        "" if speculative else rate,
        _number(row["step_ms"], 2),
        rate if speculative else "",
        _number(row["tokens_per_round"], 2) if speculative else "",
        _number(row["prompt_seconds"], 2),
        _share(row["agreement"]),
        _share(row["agreement_plain"]) if speculative else "",
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
