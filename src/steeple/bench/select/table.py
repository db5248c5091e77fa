"""The result of a bench of choices as a table, on a terminal and in a page of the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

COLUMNS = ("method", "tokens/s", "speed-up", "slowest", "fastest", "tau", "step ms", "identical", "runs")


def select_table(result: Mapping[str, Any]) -> Table:
    """A row per method; shares of spin and of the oracle are in the JSON."""
    table = Table(title=title(result))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in result["rows"]:
        table.add_row(*texts(row))
    return table


def select_markdown(result: Mapping[str, Any]) -> str:
    """The same table in Markdown, and who drafted for which kind of text where that was chosen while running."""
    lines = [f"**{title(result)}**", "", _line(COLUMNS), "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += [_line(texts(row)) for row in result["rows"]]
    chosen = next((row for row in result["rows"] if row["share_by_kind"]), None)  # the oracle stands behind it
    if chosen is None:
        return "\n".join(lines)
    shares = chosen["share_by_kind"]
    names = list(dict.fromkeys(name for kind in shares.values() for name in kind))
    lines += [
        "",
        f"Rounds of `{chosen['method']}` by kind of text:",
        "",
        _line(["kind", *names]),
        "|---|" + "---:|" * len(names),
    ]
    lines += [_line([kind, *(f"{own.get(name, 0.0):.0%}" for name in names)]) for kind, own in shares.items()]
    return "\n".join(lines)


def title(result: Mapping[str, Any]) -> str:
    """What was measured."""
    config, stream, where = result["config"], result["stream"], result["environment"]
    requests = f"{stream['requests']} requests, batch {config['batch']}, prompts up to {config['longest']}"
    rest = f"{config['max_tokens']} tokens each, T = {config['temperature']:g}, {config['dtype']}, {where['cpu']}"
    return f"{config['stream']}: {requests}, {rest}"


def texts(row: Mapping[str, Any]) -> list[str]:
    """The cells of one row."""
    return [
        row["method"],
        f"{row['tokens_per_second']:.1f}",
        f"{row['throughput_multiplier']:.2f}",
        f"{row['slowest']:.1f}",
        f"{row['fastest']:.1f}",
        f"{row['tau']:.2f}",
        f"{row['step_ms']:.2f}",
        "-" if row["identical"] is None else f"{row['identical']:.0%}",
        str(row["runs"]),
    ]


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
