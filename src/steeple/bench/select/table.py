"""The result of a bench of choices as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def select_table(result: Mapping[str, Any]) -> Table:
    """A row per method; shares of spin and of the oracle are in the JSON."""
    config = result["config"]
    table = Table(
        title=f"{config['stream']}: {result['stream']['requests']} requests, batch {config['batch']}, "
        f"T = {config['temperature']:g}, {config['dtype']}"
    )
    for name in ("method", "tokens/s", "speed-up", "slowest", "fastest", "tau", "step ms", "identical", "runs"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in result["rows"]:
        table.add_row(
            row["method"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['throughput_multiplier']:.2f}",
            f"{row['slowest']:.1f}",
            f"{row['fastest']:.1f}",
            f"{row['tau']:.2f}",
            f"{row['step_ms']:.2f}",
            "-" if row["identical"] is None else f"{row['identical']:.0%}",
            str(row["runs"]),
        )
    return table
