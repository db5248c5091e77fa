"""``steeple plan calibrate``: measure this machine's memory and the engine's rounds, and store a step model of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from steeple.bench.calibrate.config import CalibrateConfig
from steeple.bench.calibrate.run import run_calibrate
from steeple.cli.app import PLAN
from steeple.cli.progress import steps
from steeple.cli.shell import Shell, command

GIGA = 1e9


def run(config: CalibrateConfig, shell: Shell) -> dict[str, Any]:
    """Measure, fit and show."""
    with steps(shell.console) as progress:
        result = run_calibrate(config, progress)
    show(result, shell.console)
    if shell.json is None:
        shell.console.print("Nothing is stored; give --json FILE, and that file to steeple plan --calibration.")
    return result


def show(result: Mapping[str, Any], console: Console) -> None:
    """The machine, the terms of the model, how well it fits."""
    memory = result["memory"]
    low, high = memory["read_bytes_per_second_range"]
    read, copied = memory["read_bytes_per_second"] / GIGA, memory["copy_bytes_per_second"] / GIGA
    console.print(
        f"{memory['name']}, {memory['threads']} threads: reads {read:.1f} GB/s ({low / GIGA:.1f} to {high / GIGA:.1f} "
        f"beside the rounds), copies {copied:.1f} GB/s, multiplies {memory['flops_per_second'] / GIGA:,.0f} GFLOP/s.",
        highlight=False,
    )
    console.print(terms_table(result["model"]))
    console.print(residual_table(result))


def terms_table(model: Mapping[str, Any]) -> Table:
    """The terms that are not 0, in units for people."""
    table = Table(title="Step model", title_justify="left")
    table.add_column("term")
    table.add_column("value", justify="right")
    flat = {name: value for name, value in model.items() if not isinstance(value, (Mapping, Sequence, bool))}
    flat |= {f"draft: {name}": value for name, value in (model.get("draft") or {}).items()}
    for name, value in flat.items():
        if value:
            table.add_row(name.replace("_", " "), _amount(name, value))
    return table


def _amount(name: str, value: float) -> str:
    if name.endswith("flops_per_second"):
        return f"{value / GIGA:,.0f} GFLOP/s"
    if name.endswith("bytes_per_second"):
        return f"{value / GIGA:,.1f} GB/s"
    if name.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:.2f}" if "overlap" in name else f"{value * 1e6:,.4g} us"


def residual_table(result: Mapping[str, Any]) -> Table:
    """Percentiles of what the model leaves unexplained, without its sign."""
    table = Table(title=f"Residuals, {result['visits']} visits in {result['seconds']:.0f} s", title_justify="left")
    for name in ("of", "visits", "median", "75 %", "90 %", "most", "within 10 %", "within 20 %"):
        table.add_column(name, justify="left" if name == "of" else "right")
    for what, found in result["summary"].items():
        if found["measurements"]:
            shares = [found[name] for name in ("median", "p75", "p90", "max", "within_10_percent", "within_20_percent")]
            table.add_row(what, f"{found['measurements']:.0f}", *(f"{share:.0%}" for share in shares))
    return table


app = command(CalibrateConfig, run, help=PLAN["calibrate"][1])
