"""Charts of a bench: the speed-up of each drafter, and tokens per second with the machine's floor beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steeple.bench.config import PLAIN
from steeple.bench.figures import write_figures

# Okabe and Ito 2008: distinct to colour-blind readers as well; plain decoding is grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
GREY = "#6e6e6e"
MARKERS = "osD^vP"
BAR_ROOM = 0.8  # of a group's place on the axis

Row = dict[str, Any]


def write_plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``speedup`` and ``throughput``, as PNG and SVG each, into ``folder``; returns the files.

    Raises:
        StorageError: the folder cannot be written.
    """
    return write_figures({"speedup": speedup_figure(result), "throughput": throughput_figure(result)}, folder)


def speedup_figure(result: dict[str, Any]) -> Figure:
    """Bars: throughput multiplier over plain decoding, by batch and context, a panel per temperature."""
    methods = [m for m in _methods(result) if m != PLAIN]
    figure, panels = _panels(result)
    for axes, (temperature, rows) in zip(panels, _by_temperature(result), strict=True):
        groups = _groups(rows)
        width = BAR_ROOM / max(len(methods), 1)
        for place, method in enumerate(methods):
            values = [_row(rows, group, method)["throughput_multiplier"] for group in groups]
            at = [g + (place - (len(methods) - 1) / 2) * width for g in range(len(groups))]
            bars = axes.bar(at, values, width * 0.92, color=_colour(place), label=method)
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.axhline(1.0, color=GREY, linewidth=1.2, linestyle="--", label="plain decoding")
        _name_groups(axes, groups)
        axes.set_ylabel(f"speed-up over plain decoding (T = {temperature:g})")
        axes.margins(y=0.12)
    _legend(figure, panels[0])
    return figure


def throughput_figure(result: dict[str, Any]) -> Figure:
    """Points on a logarithmic scale: decoded tokens per second; a dash where plain decoding's floor is."""
    methods = _methods(result)
    figure, panels = _panels(result)
    for axes, (temperature, rows) in zip(panels, _by_temperature(result), strict=True):
        groups = _groups(rows)
        floors = [group[0] / (_row(rows, group, PLAIN)["floor_ms"] / 1e3) for group in groups]
        axes.hlines(
            floors,
            [g - BAR_ROOM / 2 for g in range(len(groups))],
            [g + BAR_ROOM / 2 for g in range(len(groups))],
            color="black",
            linewidth=1.5,
            label="bound of plain decoding on this machine",
        )
        for place, method in enumerate(methods):
            values = [_row(rows, group, method)["tokens_per_second"] for group in groups]
            at = [g + (place - (len(methods) - 1) / 2) * 0.18 for g in range(len(groups))]
            colour = GREY if method == PLAIN else _colour(place - 1)
            axes.plot(at, values, MARKERS[place % len(MARKERS)], color=colour, label=method, markersize=8)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        _name_groups(axes, groups)
        axes.set_ylabel(f"tokens per second (T = {temperature:g})")
    _legend(figure, panels[0])
    return figure


def _panels(result: dict[str, Any]) -> tuple[Figure, list[Axes]]:
    temperatures = _by_temperature(result)
    groups = max(len(_groups(rows)) for _, rows in temperatures)
    figure = Figure(figsize=(max(6.5, 1.3 * groups + 1.5), 3.9 * len(temperatures) + 0.4), layout="constrained")
    figure.suptitle(_title(result), fontsize=10)
    panels = [figure.add_subplot(len(temperatures), 1, i + 1) for i in range(len(temperatures))]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels


def _legend(figure: Figure, axes: Axes) -> None:
    """One legend below all panels, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) > 20 else 4
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _title(result: dict[str, Any]) -> str:
    config, environment = result["config"], result["environment"]
    temperatures = ", ".join(f"{t:g}" for t in config["temperature"])
    where = environment["device"] if environment["device"] != "cpu" else environment["cpu"]
    return (
        f"{config['model']}, k = {config['k']}, T = {temperatures}, {config['dtype']}, {config['max_tokens']} tokens\n"
        f"{where}, threads: {environment['threads']}"
    )


def _methods(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["drafter"] for row in result["rows"]))


def _by_temperature(result: dict[str, Any]) -> list[tuple[float, list[Row]]]:
    temperatures = dict.fromkeys(row["temperature"] for row in result["rows"])
    return [(t, [row for row in result["rows"] if row["temperature"] == t]) for t in temperatures]


def _groups(rows: Sequence[Row]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["batch"], row["context"]) for row in rows))


def _row(rows: Sequence[Row], group: tuple[int, int], method: str) -> Row:
    return next(row for row in rows if (row["batch"], row["context"]) == group and row["drafter"] == method)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _name_groups(axes: Axes, groups: Sequence[tuple[int, int]]) -> None:
    axes.set_xticks(range(len(groups)), [f"batch {batch}\ncontext {context}" for batch, context in groups])
