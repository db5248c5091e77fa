"""``steeple plan fleet``: simulate a serving fleet under a load, with and without drafters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from steeple.cli.bridge import Look
from steeple.cli.progress import steps
from steeple.cli.shell import Shell, command
from steeple.plan.fleet.config import FleetConfig
from steeple.plan.fleet.run import plan_fleet

HELP = "Simulate a serving fleet: GPUs, latencies and cost of a load, with and without drafters."
COLUMNS = (
    "drafter",
    "k",
    "tau",
    "replicas",
    "GPUs",
    "tokens/s",
    "TTFT p50",
    "p99",
    "TPOT p50",
    "p99",
    "ITL p99",
    "end p50",
    "p99",
    "in time",
    "busy",
    "batch",
    "refused",
    "per 1M tokens",
)


def run(config: FleetConfig, shell: Shell) -> dict[str, Any]:
    """Simulate, show the table, draw the charts."""
    with steps(shell.console) as progress:
        result = plan_fleet(config, progress)
    shell.console.print(fleet_table(result))
    if config.plots:
        from steeple.bench.fleet_plots import write_fleet_plots  # matplotlib takes a second to load

        for path in write_fleet_plots(result, Path(config.plots)):
            shell.console.print(f"Wrote {path}.", markup=False, soft_wrap=True)
    return result


def fleet_table(result: dict[str, Any]) -> Table:
    """A row per way to decode. Times in seconds; "in time": requests that meet the objectives."""
    config = result["config"]
    replica, objectives = config["replica"], config["objectives"]
    limits = any(row["highest_rate"] is not None for row in result["rows"])
    title = (
        f"{replica['model']}, {replica['tp']} x {replica['hardware']} a replica, {config['load']['requests']:,} "
        f"requests at {result['rows'][0]['offered_per_second'] or 0:.4g} per second; objectives: TTFT "
        f"{objectives['ttft']:g} s, TPOT {objectives['tpot']:g} s for {objectives['share']:.4g} of them"
    )
    table = Table(title=title, caption=fleet_table.__doc__)
    for number, name in enumerate((*COLUMNS, *(("highest rate",) if limits else ()))):
        table.add_column(name, justify="right" if number else "left")
    for row in result["rows"]:
        table.add_row(*_texts(row), *([f"{row['highest_rate']:.4g}/s"] if limits else []))
    return table


def _texts(row: dict[str, Any]) -> list[str]:
    cost = row["cost_per_million_tokens"]
    return [
        row["drafter"],
        str(row["k"]),
        f"{row['tau']:.2f}",
        str(row["replicas"]),
        str(row["gpus"]),
        f"{row['tokens_per_second']:,.0f}",
        _seconds(row["ttft"]["p50"]),
        _seconds(row["ttft"]["p99"]),
        _seconds(row["tpot"]["p50"]),
        _seconds(row["tpot"]["p99"]),
        _seconds(row["itl"]["p99"]),
        _seconds(row["e2e"]["p50"]),
        _seconds(row["e2e"]["p99"]),
        f"{row['within']['both']:.1%}",
        f"{row['utilisation']:.0%}",
        f"{row['mean_batch']:.1f}",
        str(row["refused"]),
        "-" if cost is None else f"{cost:.3f}",
    ]


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


app = command(FleetConfig, run, help=HELP, look=Look(repeated=("drafter",), file=True))
