"""Heatmaps of a sweep, like Figure 4 of the SPIRe paper but measured: a panel per drafter, batch x context."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from steeple.bench.figures import write_figures
from steeple.bench.sweep import select
from steeple.bench.sweep.paper import K
from steeple.bench.sweep.select import Row

Result = Mapping[str, Any]
DARK = 0.45  # a tile of less luminance has white text
LEAST_HALF = 1.0  # octaves to each side of 1.0 that the colours span at least
TICKS = (0.25, 0.5, 0.71, 1.0, 1.4, 2.0, 2.8, 4.0, 8.0)


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a row of panels shows. ``value`` of a row, ``text`` in its tile; ``diverging``: around 1.0, in octaves."""

    name: str
    value: Callable[[Row], float]
    text: Callable[[Row], str]
    colours: str
    diverging: bool = False


def _plain_ms(row: Row) -> float:
    return float(row["step_ms"] / row["dt"])


def _multiplier(row: Row) -> float:
    return float(row["throughput_multiplier"])


MULTIPLIER = Quantity("throughput multiplier", _multiplier, lambda r: f"{_multiplier(r):.2f}", "RdBu", True)
BEST = Quantity("throughput multiplier", _multiplier, lambda r: f"{_multiplier(r):.2f}\n{_k(r)}", "RdBu", True)
PARTS = (
    Quantity("tau", lambda r: r["tau"], lambda r: f"{r['tau']:.2f}", "viridis"),
    Quantity("dt", lambda r: r["dt"], lambda r: f"{r['dt']:.2f}", "viridis_r"),
    Quantity(
        "drafting's part of dt",
        lambda r: r["draft_ms"] / _plain_ms(r),
        lambda r: f"{r['draft_ms'] / _plain_ms(r):.2f}",
        "viridis_r",
    ),
    Quantity(
        "verification's part of dt",
        lambda r: r["verify_ms"] / _plain_ms(r),
        lambda r: f"{r['verify_ms'] / _plain_ms(r):.2f}",
        "viridis_r",
    ),
)


def _k(row: Row) -> str:
    return f"{row['drafted']:.1f} nodes" if row["adaptive"] else f"k = {row['k']}"


def write_sweep_plots(result: Result, folder: Path) -> list[Path]:
    """Write ``multiplier-tT`` and ``parts-tT`` for each temperature, as PNG and SVG; returns the files.

    Raises:
        StorageError: the folder cannot be written.
    """
    if not select.drafters(result["rows"]):
        return []
    figures = {}
    for temperature in select.temperatures(result["rows"]):
        figures[f"multiplier-t{temperature:g}"] = multiplier_figure(result, temperature)
        figures[f"parts-t{temperature:g}"] = parts_figure(result, temperature)
    return write_figures(figures, folder)


def multiplier_figure(result: Result, temperature: float) -> Figure:
    """Throughput over plain decoding's: the first line of panels at one k, the second at the best k of each cell."""
    rows = [row for row in result["rows"] if row["temperature"] == temperature]
    k = select.common_k(rows, K)
    lines = [(f"k = {k}", MULTIPLIER, select.at_k(rows, k)), ("best k", BEST, select.best_k(rows))]
    return _figure(result, rows, lines, f"throughput over plain decoding, T = {temperature:g}")


def parts_figure(result: Result, temperature: float) -> Figure:
    """At one k: tau, dt, and what drafting and verification add to dt (both in plain steps)."""
    rows = [row for row in result["rows"] if row["temperature"] == temperature]
    k = select.common_k(rows, K)
    lines = [(quantity.name, quantity, select.at_k(rows, k)) for quantity in PARTS]
    return _figure(result, rows, lines, f"tau and dt, k = {k}, T = {temperature:g}")


def _figure(
    result: Result, rows: Sequence[Row], lines: Sequence[tuple[str, Quantity, Sequence[Row]]], title: str
) -> Figure:
    drafters, grid = select.drafters(rows), (select.batches(rows), select.contexts(rows))
    width = max(0.6 * len(grid[1]) + 0.6, 2.2) * len(drafters) + 1.2
    height = (0.52 * len(grid[0]) + 0.8) * len(lines) + 0.9
    figure = Figure(figsize=(max(width, 5.5), height), layout="constrained")
    figure.suptitle(f"{title}\n{_surroundings(result)}", fontsize=10)
    panels = figure.subplots(len(lines), len(drafters), squeeze=False)
    for line, (name, quantity, chosen) in enumerate(lines):
        norm = _norm(quantity, chosen)
        for place, drafter in enumerate(drafters):
            axes = panels[line][place]
            own = [row for row in chosen if row["drafter"] == drafter]
            image = _heatmap(axes, own, grid, quantity, norm)
            axes.set_title(drafter if line == 0 else "", fontsize=9)
            axes.set_ylabel(f"{name}\nbatch" if place == 0 else "", fontsize=9)
            axes.set_xlabel("context" if line == len(lines) - 1 else "", fontsize=9)
        bar = figure.colorbar(image, ax=list(panels[line]), shrink=0.9)
        if quantity.diverging:
            ticks = [tick for tick in TICKS if abs(math.log2(tick)) <= float(norm.vmax or 0)]
            bar.set_ticks([math.log2(tick) for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    return figure


def _norm(quantity: Quantity, rows: Sequence[Row]) -> Normalize:
    """One scale for all panels of a line."""
    values = [_shown(quantity, row) for row in rows]
    if quantity.diverging:
        half = max([LEAST_HALF, *map(abs, values)])
        return Normalize(-half, half)
    return Normalize(min(values, default=0.0), max(values, default=1.0))


def _shown(quantity: Quantity, row: Row) -> float:
    """What decides the colour."""
    value = quantity.value(row)
    return math.log2(value) if quantity.diverging else value


def _heatmap(
    axes: Axes, rows: Sequence[Row], grid: tuple[list[int], list[Any]], quantity: Quantity, norm: Normalize
) -> Any:
    batches, contexts = grid
    places = [(batches.index(row["batch"]), contexts.index(select.context_of(row))) for row in rows]
    tiles = {place: (_shown(quantity, row), quantity.text(row)) for place, row in zip(places, rows, strict=True)}
    names = ([str(value) for value in batches], [str(value) for value in contexts])
    return draw_tiles(axes, tiles, names, quantity.colours, norm)


def draw_tiles(
    axes: Axes,
    tiles: Mapping[tuple[int, int], tuple[float, str]],
    names: tuple[Sequence[str], Sequence[str]],
    colours: str,
    norm: Normalize,
    size: int = 8,
) -> Any:
    """Coloured tiles with a text in each; places without one stay empty. Returns the image, for a colour bar.

    Args:
        tiles: (row, column) -> what decides the colour, and the text.
        names: of the rows and of the columns.
        colours: a colour map of matplotlib.
        size: of the texts, in points.
    """
    values = np.full((len(names[0]), len(names[1])), np.nan)
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto")
    for (y, x), (value, text) in tiles.items():
        values[y, x] = value
        red, green, blue, _ = image.cmap(norm(value))
        light = 0.299 * red + 0.587 * green + 0.114 * blue
        axes.text(x, y, text, ha="center", va="center", fontsize=size, color="white" if light < DARK else "black")
    image.set_data(values)
    axes.set_xticks(range(len(names[1])), names[1], fontsize=8)
    axes.set_yticks(range(len(names[0])), names[0], fontsize=8)
    return image


def _surroundings(result: Result) -> str:
    config, environment = result["config"], result["environment"]
    where = environment["device"] if environment["device"] != "cpu" else environment["cpu"]
    return f"{config['model']}, {config['dtype']}, {where}, threads: {environment['threads']}"
