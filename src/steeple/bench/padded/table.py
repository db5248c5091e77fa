"""The result of a padded bench as a table, on a terminal and in a page of the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

COLUMNS = (
    "pair",
    "batch",
    "method",
    "tokens/s",
    "tau",
    "rows",
    "grouped",
    "waste",
    "draft",
    "verify",
    "align",
    "group",
)
WORDS = ("pair", "method")


def padded_table(result: Mapping[str, Any]) -> Table:
    """A row per method. "rows": mean per call; "grouped": share of rounds without padding; then shares of time."""
    environment = result["environment"]
    table = Table(title=f"{environment['cpu']}, {environment['device']}", caption=padded_table.__doc__)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in WORDS else "right")
    for row in result["rows"]:
        table.add_row(*texts(row))
    return table


def padded_markdown(result: Mapping[str, Any]) -> str:
    """The same table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(texts(row)) + " |" for row in result["rows"])]) + "\n"


def texts(row: Mapping[str, Any]) -> list[str]:
    """The cells of one row; a dash for what transformers does not tell."""
    shares = row["shares"] or {}
    share = [_percent(shares.get(part)) for part in ("draft", "verify", "align", "group")]
    return [
        row["pair"],
        str(row["batch"]),
        row["method"],
        f"{row['tokens_per_second']:.1f}",
        _number(row["tau"]),
        _number(row["mean_rows"]),
        _percent(row["grouping_rate"]),
        _percent(row["waste"]),
        *share,
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
