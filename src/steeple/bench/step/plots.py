"""Charts of a step bench: the roofline, the share of the floor by batch and context, and what a step is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from steeple.bench.figures import write_figures
from steeple.bench.plots import COLOURS, GREY
from steeple.bench.step.rows import SHORT, measured

Row = Mapping[str, Any]
Result = Mapping[str, Any]

STACK = (  # parts of a step in the order of the bars
    ("attention_ms", "attention", COLOURS[0]),
    ("linear_ms", "linear layers", COLOURS[1]),
    ("logits_ms", "head", COLOURS[5]),
    ("elementwise_ms", "norms, activations", COLOURS[2]),
    ("cache_ms", "cache writes", COLOURS[4]),
    ("rest_ms", "rest of the forward", "#b0b0b0"),
    ("sampling_ms", "sampling", COLOURS[3]),
    ("overhead_ms", "engine overhead", "#333333"),
)
DARK = 0.55  # above this share of the floor a tile is light, and its text dark


def write_step_plots(result: Result, folder: Path) -> list[Path]:
    """Write ``roofline``, ``floor`` and ``parts``, as PNG and SVG each, into ``folder``; returns the files.

    A result without a measured row gives none. ``StorageError``: the folder cannot be written.
    """
    if not measured(result["rows"]):
        return []
    figures = {"roofline": roofline_figure(result), "floor": floor_figure(result), "parts": parts_figure(result)}
    return write_figures(figures, folder)


def roofline_figure(result: Result) -> Figure:
    """FLOP per byte against GFLOP/s, a line of panels per model, a panel per rows: a point per row of the result, its
    colour is the context, its number the batch. The band around the roof is the bandwidth beside the steps."""
    models, counts = _models(result), result["config"]["rows"]
    figure = Figure(figsize=(max(3.1 * len(counts) + 0.6, 6.5), 3.0 * len(models) + 1.2), layout="constrained")
    figure.suptitle("Roofline\n" + _title(result), fontsize=10)
    panels = figure.subplots(len(models), len(counts), squeeze=False, sharex=True, sharey=True)
    for line, (model, rows) in enumerate(models.items()):
        for axes, count in zip(panels[line], counts, strict=True):
            _points(axes, result, [row for row in rows if row["rows"] == count])
            if line == 0:
                axes.set_title(_rows_name(count), fontsize=9)
            if line == len(models) - 1:
                axes.set_xlabel("FLOP per byte")
        panels[line][0].set_ylabel(f"{model}\nGFLOP/s")
    (low, high), bottom = panels[0][0].get_xlim(), panels[0][0].get_ylim()[0]  # the panels share their axes
    for axes in panels.flat:
        _roof(axes, result, 0.8 * low, high)
        axes.set_ylim(bottom=0.8 * bottom)  # room for the numbers
    figure.legend(handles=_roofline_legend(result), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _points(axes: Axes, result: Result, rows: Sequence[Row]) -> None:
    contexts = result["config"]["context"]
    for row in rows:
        x, y = row["flops"] / row["bytes"], row["flops"] / row["step_ms"] / 1e6
        place = contexts.index(row["context"])
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(x, y, "o", color=colour, markersize=11, markeredgecolor="white", markeredgewidth=0.8, zorder=3)
        number = axes.annotate(str(row["batch"]), (x, y), (0, -0.3), textcoords="offset points", zorder=3)
        number.set(ha="center", va="center", color="white", fontsize=6.5, fontweight="bold")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(which="major", alpha=0.3)
    axes.set_axisbelow(True)


def _roof(axes: Axes, result: Result, low: float, high: float) -> None:
    machine = result["machine"]
    peak = machine[f"{SHORT[result['config']['dtype']]}_gflops"]
    x = np.geomspace(low, max(high, 1.6 * peak / machine["read_gbs_median"]), 200)
    slowest, fastest = (np.minimum(peak, x * bandwidth) for bandwidth in machine["read_gbs_range"])
    axes.fill_between(x, slowest, fastest, color=GREY, alpha=0.18, linewidth=0, zorder=1)
    axes.plot(x, np.minimum(peak, x * machine["read_gbs_median"]), color="black", linewidth=1.4, zorder=2)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(top=1.7 * peak)


def _roofline_legend(result: Result) -> list[Line2D]:
    config, machine = result["config"], result["machine"]
    peak = machine[f"{SHORT[config['dtype']]}_gflops"]
    roof = f"roof: {machine['read_gbs_median']:.0f} GB/s (band: middle 80 % beside the steps), {peak:.0f} GFLOP/s"
    handles = [Line2D([], [], color="black", linewidth=1.4, label=roof)]
    for place, context in enumerate(config["context"]):
        colour = COLOURS[place % len(COLOURS)]
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=9, color=colour, label=f"context {context}"))
    return [*handles, Line2D([], [], marker="$8$", linestyle="", color=GREY, label="number: batch")]


def floor_figure(result: Result) -> Figure:
    """Tiles: the floor's share of the step by batch and context, a line of panels per model, a panel per rows."""
    models, counts = _models(result), result["config"]["rows"]
    batches, contexts = result["config"]["batch"], result["config"]["context"]
    size = (
        1.0 + 0.72 * len(contexts) * len(counts) + 0.5 * len(counts),
        1.2 + (0.5 * len(batches) + 0.7) * len(models),
    )
    figure = Figure(figsize=(max(size[0], 6.5), size[1]), layout="constrained")
    figure.suptitle("Share of the floor\n" + _title(result), fontsize=10)
    panels = figure.subplots(len(models), len(counts), squeeze=False, sharex=True, sharey=True)
    image = None
    for line, (model, rows) in enumerate(models.items()):
        for column, count in enumerate(counts):
            axes = panels[line][column]
            values = np.full((len(batches), len(contexts)), np.nan)
            for row in rows:
                if row["rows"] == count:
                    values[batches.index(row["batch"]), contexts.index(row["context"])] = row["fraction_of_floor"]
            image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
            _tile_texts(axes, values)
            axes.set_xticks(range(len(contexts)), [str(context) for context in contexts])
            axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            if line == 0:
                axes.set_title(_rows_name(count), fontsize=9)
            if line == len(models) - 1:
                axes.set_xlabel("context")
            if column == 0:
                axes.set_ylabel(f"{model}\nbatch")
    if image is not None:
        figure.colorbar(image, ax=panels, format=lambda share, _: f"{share:.0%}", shrink=0.9, pad=0.015)
    return figure


def _tile_texts(axes: Axes, values: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    for (y, x), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value:.0%}"
        colour = "black" if np.isnan(value) or value > DARK else "white"
        axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour)


def parts_figure(result: Result) -> Figure:
    """Bars of plain steps (or of the fewest rows there are): milliseconds by part, and a mark at the floor."""
    count = min(result["config"]["rows"])
    models = {model: [row for row in rows if row["rows"] == count] for model, rows in _models(result).items()}
    most = max(len(rows) for rows in models.values())
    figure = Figure(figsize=(max(4.4 * len(models), 6.5), 0.34 * most + 1.9), layout="constrained")
    figure.suptitle(f"What a step is made of ({_rows_name(count)})\n" + _title(result), fontsize=10)
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, (model, rows) in zip(panels, models.items(), strict=True):
        whole = np.array([sum(row[name] for name, _, _ in STACK) for row in rows])
        left = np.zeros(len(rows))
        for name, label, colour in STACK:
            share = np.array([row[name] for row in rows]) / whole
            axes.barh(range(len(rows)), share, left=left, color=colour, height=0.74, label=label)
            left += share
        floors = [min(row["fraction_of_floor"], 1.0) for row in rows]
        axes.plot(floors, range(len(rows)), "|", color="white", markersize=13, markeredgewidth=4)
        axes.plot(floors, range(len(rows)), "|", color="black", markersize=11, markeredgewidth=2, label="floor")
        for y, row in enumerate(rows):
            axes.text(1.015, y, f"{row['step_ms']:.1f} ms", va="center", fontsize=8)
        names = [f"{row['batch']} x {row['context']}" for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=8.5)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("share of the step")
        axes.set_title(model, fontsize=10, fontweight="bold")
    panels[0].set_ylabel("batch x context")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _models(result: Result) -> dict[str, list[Row]]:
    rows = measured(result["rows"])
    return {name: [row for row in rows if row["model"] == name] for name in dict.fromkeys(r["model"] for r in rows)}


def _rows_name(rows: int) -> str:
    return "plain step" if rows == 1 else f"{rows} rows"


def _title(result: Result) -> str:
    config, machine = result["config"], result["machine"]
    return f"{config['dtype']}, T = {config['temperature']:g}; {machine['name']}, threads: {machine['threads']}"
