"""The bench's result as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

COLUMNS = (
    ("batch", "right"),
    ("context", "right"),
    ("T", "right"),
    ("drafter", "left"),
    ("tokens/s", "right"),
    ("speed-up", "right"),
    ("tau", "right"),
    ("dt", "right"),
    ("draft ms", "right"),
    ("verify ms", "right"),
    ("other ms", "right"),
    ("of floor", "right"),
    ("all, tokens/s", "right"),
    ("identical", "left"),
)


def bench_table(result: dict[str, Any]) -> Table:
    """A row per drafter and cell. "all" counts prompts and stragglers; "of floor" is plain decoding's share of it."""
    config = result["config"]
    title = f"{config['model']}, {config['dtype']}, k = {config['k']}, {config['max_tokens']} tokens per request"
    table = Table(title=title)
    for name, justify in COLUMNS:
        table.add_column(name, justify="right" if justify == "right" else "left")
    rows: Sequence[dict[str, Any]] = result["rows"]
    for index, row in enumerate(rows):
        following = rows[index + 1] if index + 1 < len(rows) else None
        last = following is None or _cell(following) != _cell(row)
        table.add_row(*_texts(row), end_section=last)
    return table


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["batch"], row["context"], row["temperature"]


def _texts(row: dict[str, Any]) -> list[str]:
    floor = row["fraction_of_floor"]
    identical = {None: "", True: "yes", False: "NO"}[row["identical"]]
    return [
        str(row["batch"]),
        str(row["context"]),
        f"{row['temperature']:g}",
        row["drafter"],
        f"{row['tokens_per_second']:.1f}",
        f"{row['throughput_multiplier']:.2f}",
        f"{row['tau']:.2f}",
        f"{row['dt']:.2f}",
        f"{row['draft_ms']:.1f}",
        f"{row['verify_ms']:.1f}",
        f"{row['other_ms']:.1f}",
        "" if floor is None else f"{floor:.0%}",
        f"{row['tokens_per_second_total']:.1f}",
        identical,
    ]
