"""Charts of a plan: heatmaps of the throughput multiplier, and what is on the Pareto front of speed and latency."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from steeple.bench.figures import write_figures
from steeple.bench.plots import COLOURS, GREY, MARKERS
from steeple.bench.sweep.plots import LEAST_HALF, TICKS, draw_tiles

Result = Mapping[str, Any]
Cell = Mapping[str, Any]
LETTERS = 12  # of a title in an inch
PANELS = 4  # contexts of a Pareto chart at most


def write_plan_plots(result: Result, folder: Path) -> list[Path]:
    """Write ``heatmap`` and, for a search, ``pareto``, as PNG and SVG each; returns the files.

    Raises:
        StorageError: the folder cannot be written.
    """
    figures = {"heatmap": heatmap_figure(result)}
    if result.get("pareto"):
        figures["pareto"] = pareto_figure(result)
    prefix = result.get("preset") or "plan"
    return write_figures({f"{prefix}-{name}": figure for name, figure in figures.items()}, folder)


def heatmap_figure(result: Result) -> Figure:
    """A panel per drafter, batch by context; tiles hold the multiplier and, where it was searched, the best k."""
    cells = [cell for cell in result["cells"] if cell.get("k", 1)]
    drafters = list(dict.fromkeys(cell["drafter"] for cell in cells))
    batches, contexts = (sorted({cell[name] for cell in cells}) for name in ("batch", "context"))
    width = max(0.62 * len(contexts) + 0.7, 2.6) * max(len(drafters), 1) + 1.2
    figure = Figure(figsize=(max(width, 5.5), max(0.46 * len(batches) + 1.6, 3.0)), layout="constrained")
    lines = [textwrap.fill(line, int(figure.get_figwidth() * LETTERS)) for line in _title(result).splitlines()]
    figure.suptitle("\n".join(lines), fontsize=10)
    if not cells:
        return figure
    half = max([LEAST_HALF, *(abs(math.log2(cell["throughput_multiplier"])) for cell in cells)])
    norm = Normalize(-half, half)
    panels = figure.subplots(1, len(drafters), squeeze=False)[0]
    for place, (axes, drafter) in enumerate(zip(panels, drafters, strict=True)):
        own = [cell for cell in cells if cell["drafter"] == drafter]
        image = _heatmap(axes, own, batches, contexts, norm)
        axes.set_title(drafter.replace(":", ":\n").replace("+", "\n+"), fontsize=8)
        axes.set_xlabel("context", fontsize=9)
        axes.set_ylabel("batch" if place == 0 else "", fontsize=9)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.9)
    ticks = [tick for tick in TICKS if abs(math.log2(tick)) <= half]
    bar.set_ticks([math.log2(tick) for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    return figure


def pareto_figure(result: Result) -> Figure:
    """A panel per context: latency per token against throughput, a dot per candidate, the front as steps."""
    contexts = [context for context, front in result["pareto"].items() if front][:PANELS]
    figure = Figure(figsize=(max(4.6 * len(contexts), 6.0), 4.6), layout="constrained")
    figure.suptitle(f"speed and latency, {_surroundings(result)}", fontsize=10)
    panels = figure.subplots(1, max(len(contexts), 1), squeeze=False)[0]
    drafters = list(dict.fromkeys(cell["drafter"] for cell in result["candidates"]))
    for axes, context in zip(panels, contexts, strict=False):
        own = [cell for cell in result["candidates"] if cell["context"] == int(context) and _allowed(cell, result)]
        for place, drafter in enumerate(drafters):
            mine = [cell for cell in own if cell["drafter"] == drafter]
            plain = not any(cell["k"] for cell in mine)
            axes.plot(
                [cell["seconds_per_token"] * 1e3 for cell in mine],
                [cell["tokens_per_second"] for cell in mine],
                MARKERS[place % len(MARKERS)],
                color=GREY if plain else COLOURS[(place - 1) % len(COLOURS)],
                markersize=5,
                alpha=0.75,
                label="plain decoding" if plain else drafter,
            )
        front = result["pareto"][context]
        axes.plot(
            [cell["seconds_per_token"] * 1e3 for cell in front],
            [cell["tokens_per_second"] for cell in front],
            color="black",
            linewidth=1.0,
            drawstyle="steps-post",
            zorder=1,
            label="Pareto front",
        )
        _scales(axes, context)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=8)
    return figure


def _scales(axes: Axes, context: str) -> None:
    """Logarithmic axes with plain numbers."""
    axes.set_title(f"context {context}", fontsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
        axis.set_tick_params(labelsize=7)
    axes.set_xlabel("ms per token of a request", fontsize=9)
    axes.set_ylabel("tokens per second of the batch", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)


def _heatmap(axes: Axes, cells: Sequence[Cell], batches: list[int], contexts: list[int], norm: Normalize) -> Any:
    tiles = {
        (batches.index(cell["batch"]), contexts.index(cell["context"])): (
            math.log2(cell["throughput_multiplier"]),
            f"{cell['throughput_multiplier']:.2f}" + (f"\nk = {cell['k']}" if "k" in cell else ""),
        )
        for cell in cells
    }
    names = ([str(value) for value in batches], [_short(value) for value in contexts])
    return draw_tiles(axes, tiles, names, "RdBu", norm, size=7)


def _short(value: int) -> str:
    """Lengths from 32768 on in Ki, where they are whole; the axis has little room."""
    return f"{value // 1024}Ki" if value >= 32768 and value % 1024 == 0 else str(value)


def _allowed(cell: Cell, result: Result) -> bool:
    return all(not most or cell[name] <= most for name, most in result["limits"].items())


def _title(result: Result) -> str:
    if "title" in result:
        windows = "; ".join(f"{name} window {text}" for name, text in result["windows"].items())
        return f"{result['title']}, k = {result['k']}\n{windows}"
    return f"throughput over plain decoding, {_surroundings(result)}"


def _surroundings(result: Result) -> str:
    devices = f"{result['devices']} x " if result["devices"] > 1 else ""
    return f"{result['model']}\n{devices}{result['hardware']['name']}, {result['weights']} weights, modelled"
