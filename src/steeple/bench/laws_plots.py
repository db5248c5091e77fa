"""Charts of scaling laws: acceptance over tokens and over parameters, and the best width over the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from steeple.bench.figures import write_figures
from steeple.bench.plots import COLOURS, MARKERS

AXES = (("tokens", "parameters", "training tokens"), ("parameters", "tokens", "parameters of the draft"))
POINTS = 50


def write_laws_plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write a chart of each law, and of the width where there is one, as PNG and SVG each; returns the files.

    Raises:
        StorageError: the folder cannot be written.
    """
    figures = {f"acceptance-{_slug(entry['kind'])}": acceptance_figure(entry) for entry in result["laws"]}
    if result["width"] is not None:
        figures["width"] = width_figure(result["width"])
    return write_figures(figures, folder)


def acceptance_figure(entry: dict[str, Any]) -> Figure:
    """Runs as points and the law as lines: over tokens, a line per size, and over parameters, a line per budget."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    law = [value["value"] for value in entry["coefficients"].values()]
    figure.suptitle(
        f"{entry['kind'] or 'drafts'}: tau = {law[0]:.2f} {law[1]:+.3f} log10(tokens) {law[2]:+.3f} log10(parameters), "
        f"R2 = {entry['r2']:.3f}, {len(entry['runs'])} runs",
        fontsize=10,
    )
    for place, (over, per, words) in enumerate(AXES):
        axes = figure.add_subplot(1, 2, place + 1)
        _lines(axes, entry, law, over, per)
        axes.set_xscale("log")
        axes.set_xticks(sorted({run[over] for run in entry["runs"]}))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(words)
        axes.set_ylabel("tau, tokens per round")
        axes.legend(title=per, frameon=False, fontsize=8, title_fontsize=8)
        _plain(axes)
    return figure


def _lines(axes: Axes, entry: dict[str, Any], law: list[float], over: str, per: str) -> None:
    values = sorted({run[per] for run in entry["runs"]})
    x = np.geomspace(float(entry[over][0]), float(entry[over][1]), POINTS)
    for place, value in enumerate(values):
        here = [run for run in entry["runs"] if run[per] == value]
        colour = COLOURS[place % len(COLOURS)]
        at = {over: np.log10(x), per: np.full(POINTS, np.log10(value))}
        axes.plot(x, law[0] + law[1] * at["tokens"] + law[2] * at["parameters"], color=colour, linewidth=1.2)
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(
            [r[over] for r in here], [r["tau"] for r in here], marker, color=colour, label=f"{value:,.0f}", markersize=6
        )


def width_figure(width: dict[str, Any]) -> Figure:
    """The best width of each batch, the law through them and its interval."""
    figure = Figure(figsize=(6.5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    batches = [row["batch"] for row in width["best"]]
    axes.plot(batches, [row["best"] for row in width["best"]], "o", color=COLOURS[0], label="best measured")
    axes.plot(batches, [row["predicted"]["value"] for row in width["best"]], color=COLOURS[5], label="law")
    low, high = ([row["predicted"][end] for row in width["best"]] for end in ("low", "high"))
    axes.fill_between(batches, low, high, color=COLOURS[5], alpha=0.15, label="its interval")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("batch")
    axes.set_ylabel("best width")
    axes.legend(frameon=False)
    _plain(axes)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _slug(kind: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in kind) or "drafts"
