"""``steeple plan``: which drafter, which k, which window pay for a model on a machine, before anything is tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from steeple.bench.plan_page import plotly_source, write_page
from steeple.bench.plan_plots import write_plan_plots
from steeple.cli.app import COMMANDS
from steeple.cli.shell import Shell, command
from steeple.plan.answer import published, searched
from steeple.plan.config import THIS_CPU, PlanConfig
from steeple.plan.machines import Machine, find_machine

LIMITS: Mapping[str, str] = {
    "memory_bytes": "memory",
    "seconds_per_token": "latency",
    "cost_per_million_tokens": "cost",
}


def run(config: PlanConfig, shell: Shell) -> dict[str, Any]:
    """Compute, show and draw."""
    plotly = plotly_source() if config.html else ""  # before the work, so that its absence is said at once
    if config.preset:
        result = published(config)
        show_published(result, shell.console)
    else:
        machine = this_cpu(config.dtype) if config.hardware == THIS_CPU else find_machine(config.hardware)
        result = searched(config, machine)
        show_searched(result, shell.console)
    if config.plots:
        for path in write_plan_plots(result, Path(config.plots)):
            shell.console.print(f"{path}", markup=False)
    if config.html:
        write_page(result, config, Path(config.html), plotly)
        shell.console.print(f"{config.html}", markup=False)
    return result


def this_cpu(dtype: str) -> Machine:
    """This machine's processor: its memory, and what it reads and computes, measured for a second or two."""
    import torch

    from steeple.hardware import available_memory, measure, pick_device

    device = pick_device("cpu")
    known = {name: getattr(torch, name) for name in ("float32", "bfloat16")}
    dtypes = dict.fromkeys((known.get(dtype, torch.float32), torch.float32))
    found = measure(device, *dtypes)
    return Machine(
        name=found.name,
        flops_per_second=found.flops_per_second,
        bytes_per_second=found.read_bytes_per_second,
        memory_bytes=available_memory(device),
        source=f"measured now, {found.threads} threads; memory: what is free",
    )


def show_published(result: Mapping[str, Any], console: Console) -> None:
    """A heatmap of each drafter as a table, batch by context."""
    console.print(f"{result['title']}, k = {result['k']}", style="bold")
    for drafter in dict.fromkeys(cell["drafter"] for cell in result["cells"]):
        own = [cell for cell in result["cells"] if cell["drafter"] == drafter]
        console.print(heat_table(own, _caption(drafter, result["windows"].get(drafter, ""))))
    if result.get("ratios"):
        console.print(ratio_table(result["ratios"]))
    console.print(
        f"Verification is bound by memory from {result['critical_context']:,.0f} positions on.", highlight=False
    )
    if result["note"]:
        console.print(result["note"], markup=False)


def heat_table(cells: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Throughput multipliers: a row per batch, a column per context."""
    table = Table(title=title, title_justify="left")
    table.add_column("batch", justify="right")
    contexts = list(dict.fromkeys(cell["context"] for cell in cells))
    for context in contexts:
        table.add_column(str(context), justify="right")
    value = {(cell["batch"], cell["context"]): cell["throughput_multiplier"] for cell in cells}
    for batch in dict.fromkeys(cell["batch"] for cell in cells):
        table.add_row(str(batch), *(_multiplier(value[batch, context]) for context in contexts))
    return table


def ratio_table(ratios: Sequence[Mapping[str, float]]) -> Table:
    """Computed ratios beside published ones."""
    table = Table(title="times over a plain step: computed / published", title_justify="left")
    for name in ("batch", "prefill", "verification", "a draft step"):
        table.add_column(name, justify="right")
    for row in ratios:
        texts = [
            f"{row[name]:.2f} / {row[f'published_{name}']:g}" if name in row else "" for name in ("verify", "draft")
        ]
        table.add_row(f"{row['batch']:g}", f"{row['context']:g}", *texts)
    return table


def show_searched(result: Mapping[str, Any], console: Console) -> None:
    """The table, the best choice, and what one must know to believe them."""
    console.print(plan_table(result))
    best = result["best"]
    how = "plain decoding" if not best["k"] else f"{best['drafter']}, k = {best['k']}"
    console.print(
        f"Best: {how} at batch {best['batch']}, context {best['context']}: {best['tokens_per_second']:,.0f} tokens/s, "
        f"{best['throughput_multiplier']:.2f} times plain decoding.",
        style="bold",
        highlight=False,
    )
    for note in result["notes"]:
        console.print(note, markup=False)


def plan_table(result: Mapping[str, Any]) -> Table:
    """Each drafter at its best k and window in every cell; ``*`` is the fastest within the limits."""
    priced = any(cell["cost_per_million_tokens"] for cell in result["cells"])
    devices = f"{result['devices']} x " if result["devices"] > 1 else ""
    table = Table(title=f"{result['model']} on {devices}{result['hardware']['name']}, {result['weights']} weights")
    names = ["batch", "context", "drafter", "", "k", "window", "tau", "from", "dt", "speed-up", "tokens/s", "ms/token"]
    names += ["GB", "cost/Mtok", "breaks"] if priced else ["GB", "breaks"]
    for name in names:
        table.add_column(name, justify="left" if name in ("drafter", "from", "breaks") else "right")
    cells = sorted(result["cells"], key=lambda cell: (cell["batch"], cell["context"]))
    for index, cell in enumerate(cells):
        last = index + 1 == len(cells) or _place(cells[index + 1]) != _place(cell)
        texts = _texts(cell, priced)
        table.add_row(*texts, style="bold" if cell["best"] else None, end_section=last)
    return table


def _texts(cell: Mapping[str, Any], priced: bool) -> list[str]:
    cost = [f"{cell['cost_per_million_tokens']:.3g}"] if priced else []
    return [
        str(cell["batch"]),
        str(cell["context"]),
        cell["drafter"],
        "*" if cell["best"] else "",
        str(cell["k"] or ""),
        str(cell["window"] or ""),
        f"{cell['tau']:.2f}",
        cell["tau_source"],
        f"{cell['dt']:.2f}",
        _multiplier(cell["throughput_multiplier"]),
        f"{cell['tokens_per_second']:,.0f}",
        f"{cell['seconds_per_token'] * 1e3:.2f}",
        f"{cell['memory_bytes'] / 1e9:.1f}",
        *cost,
        ", ".join(LIMITS[name] for name in cell["breaks"]),
    ]


def _place(cell: Mapping[str, Any]) -> tuple[int, int]:
    return cell["batch"], cell["context"]


def _multiplier(value: float) -> str:
    return f"{value:.2f}"


def _caption(drafter: str, window: str) -> str:
    return f"{drafter}, window {window}" if window else drafter


app = command(PlanConfig, run, help=COMMANDS["plan"][1])
