"""Charts of a fleet simulation: how latencies are spread, and what the fleet gives as the load grows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steeple.bench.figures import write_figures
from steeple.bench.plots import COLOURS, GREY, MARKERS

LATENCIES = {
    "ttft": "seconds to the first token",
    "tpot": "seconds per token after the first",
    "e2e": "seconds to the last token",
}
PERCENT = 100.0


def write_fleet_plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``latency`` and, where loads were simulated, ``load``, as PNG and SVG each; returns the files.

    Raises:
        StorageError: the folder cannot be written.
    """
    figures = {"latency": latency_figure(result)}
    if any(row["loads"] for row in result["rows"]):
        figures["load"] = load_figure(result)
    return write_figures(figures, folder)


def latency_figure(result: dict[str, Any]) -> Figure:
    """The share of requests that waits no longer than so many seconds, a panel per latency; dashed: the objective."""
    figure = Figure(figsize=(4.2 * len(LATENCIES), 4.2), layout="constrained")
    figure.suptitle(_title(result), fontsize=10)
    objectives = result["config"]["objectives"]
    panels = _panels(figure, len(LATENCIES))
    for axes, (name, words) in zip(panels, LATENCIES.items(), strict=True):
        for place, row in enumerate(result["rows"]):
            values = row["curves"][name]
            if values[0] is None:
                continue
            shares = [i / (len(values) - 1) * PERCENT for i in range(len(values))]
            axes.plot(values, shares, color=_colour(place), linewidth=1.8, label=_label(row))
        if objectives.get(name):
            axes.axvline(objectives[name], color="black", linewidth=1.0, linestyle="--")
        axes.set_xscale("log")
        axes.set_xlabel(words)
        axes.set_ylim(0, PERCENT)
    panels[0].set_ylabel("% of the requests")
    _legend(figure, panels[0])
    return figure


def load_figure(result: dict[str, Any]) -> Figure:
    """Output tokens per second, and the p99 of the first token, over the requests per second that come."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    first = result["rows"][0]
    replica = result["config"]["replica"]
    size = f"{first['replicas']} replicas x {replica['tp']} {replica['hardware']}"
    figure.suptitle(f"{_title(result)}\nall on {size}", fontsize=10)
    throughput, wait, tokens = _panels(figure, 3)
    _lines(throughput, result, lambda row: row["tokens_per_second"])
    throughput.set_ylabel("output tokens per second")
    throughput.set_ylim(bottom=0)
    _lines(wait, result, lambda row: row["ttft"]["p99"])
    wait.set_ylabel("p99 of the first token, seconds")
    _lines(tokens, result, lambda row: row["tpot"]["p99"])
    tokens.set_ylabel("p99 of the time per token, seconds")
    for axes, name in ((wait, "ttft"), (tokens, "tpot")):
        axes.set_yscale("log")
        if result["config"]["objectives"][name]:
            axes.axhline(result["config"]["objectives"][name], color="black", linewidth=1.0, linestyle="--")
    _legend(figure, throughput)
    return figure


def _lines(axes: Axes, result: dict[str, Any], value: Callable[[dict[str, Any]], float | None]) -> None:
    for place, row in enumerate(result["rows"]):
        points = [(p["offered_per_second"], value(p)) for p in row["loads"]]
        known = [(x, y) for x, y in points if x is not None and y is not None]
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(*zip(*known, strict=True), marker=marker, color=_colour(place), label=row["drafter"], markersize=5)
    axes.set_xlabel("requests per second")
    axes.set_xlim(left=0)


def _panels(figure: Figure, count: int) -> list[Axes]:
    panels = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return panels


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def _label(row: dict[str, Any]) -> str:
    return f"{row['drafter']}, {row['gpus']} GPUs"


def _colour(place: int) -> str:
    return COLOURS[(place - 1) % len(COLOURS)] if place else GREY


def _title(result: dict[str, Any]) -> str:
    load, replica = result["config"]["load"], result["config"]["replica"]
    rate = result["rows"][0]["offered_per_second"]
    source = Path(load["trace"]).stem if load["trace"] else "synthetic load"
    return (
        f"{replica['model']} on {replica['hardware']}, {source}, {load['requests']:,} requests at {rate:.4g} per "
        "second (simulated)"
    )
