"""The result of a step bench as a table, on a terminal and in a page of the documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from steeple.errors import ConfigError

Row = Mapping[str, Any]
COLUMNS = (
    "model",
    "batch",
    "context",
    "rows",
    "step ms",
    "floor ms",
    "of floor",
    "bound",
    "attention ms",
    "of its floor",
    "GB/s",
    "linear ms",
    "of its floor",
    "head ms",
    "sampling ms",
    "rest ms",
    "overhead",
    "over plain",
)
WORDS = ("model", "bound")


def step_table(result: Mapping[str, Any]) -> Table:
    """A row per cell. "rest": of the forward; "over plain": over a step of one row."""
    table = Table(title=machine_line(result), caption=step_table.__doc__)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in WORDS else "right")
    rows: Sequence[Row] = result["rows"]
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*_texts(row), end_section=after is None or _cell(after) != _cell(row))
    return table


def machine_line(result: Mapping[str, Any]) -> str:
    """What the machine was measured to do, and in what the steps computed."""
    machine, config = result["machine"], result["config"]
    return (
        f"{machine['name']}, threads: {machine['threads']}, reads {machine['read_gbs']:.1f} GB/s before the steps, "
        f"{machine['read_gbs_median']:.1f} beside them, "
        f"{machine['bf16_gflops']:.0f} GFLOP/s in bfloat16, {machine['f32_gflops']:.0f} in float32; "
        f"steps in {config['dtype']}, T = {config['temperature']:g}"
    )


def step_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The tables of ``results`` one below the other, each under the line of its machine."""
    return "\n\n".join(_markdown(result) for result in results)


def _markdown(result: Mapping[str, Any]) -> str:
    lines = [machine_line(result) + ".", ""]
    lines.append("| " + " | ".join(COLUMNS) + " |")
    lines.append("|" + "|".join("---" if name in WORDS else "---:" for name in COLUMNS) + "|")
    lines += ["| " + " | ".join(_texts(row)) + " |" for row in result["rows"]]
    return "\n".join(lines)


def fill_page(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between ``<!-- numbers:name -->`` and its closing marker.

    Raises:
        ConfigError: the page does not have the two markers, once each and in this order.
    """
    begin, end = f"<!-- numbers:{name} -->", f"<!-- /numbers:{name} -->"
    parts = re.split(f"{re.escape(begin)}|{re.escape(end)}", page)
    if len(parts) != 3 or page.index(begin) > page.index(end):
        raise ConfigError(f"the page needs {begin} and {end}, once each and in this order; add them.")
    return f"{parts[0]}{begin}\n{text}\n{end}{parts[2]}"


def _cell(row: Row) -> tuple[Any, ...]:
    return row["model"], row["batch"], row["context"]


def _texts(row: Row) -> list[str]:
    start = [row["model"], str(row["batch"]), str(row["context"]), str(row["rows"])]
    if row["skipped"] is not None:
        return [*start, "-", "-", "-", f"skipped: {row['skipped']}", *["-"] * (len(COLUMNS) - 8)]
    rest = sum(row[f"{part}_ms"] for part in ("elementwise", "cache", "rest"))
    over = row["verify_over_plain"]
    return [
        *start,
        f"{row['step_ms']:.2f}",
        f"{row['floor_ms']:.2f}",
        f"{row['fraction_of_floor']:.0%}",
        row["bound"],
        f"{row['attention_ms']:.2f}",
        f"{row['attention_fraction_of_floor']:.0%}",
        f"{row['attention_gbs']:.1f}",
        f"{row['linear_ms']:.2f}",
        f"{row['linear_fraction_of_floor']:.0%}",
        f"{row['logits_ms']:.2f}",
        f"{row['sampling_ms']:.2f}",
        f"{rest:.2f}",
        f"{row['overhead_share']:.1%}",
        "-" if over is None else f"{over:.2f}",
    ]
