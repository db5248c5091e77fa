"""Charts of a bench of choices: throughput of each method, and who drafted for which kind of request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from steeple.bench.config import PLAIN
from steeple.bench.figures import write_figures
from steeple.bench.plots import COLOURS, GREY

Result = Mapping[str, Any]


def write_select_plots(result: Result, folder: Path) -> list[Path]:
    """Write ``select_throughput`` and ``select_shares``, as PNG and SVG each, into ``folder``; returns the files.

    ``StorageError``: the folder cannot be written.
    """
    figures = {"select_throughput": throughput_figure(result), "select_shares": shares_figure(result)}
    return write_figures(figures, folder)


def throughput_figure(result: Result) -> Figure:
    """Bars: tokens per second over plain decoding, from the slowest to the fastest run."""
    rows = [row for row in result["rows"] if row["compared"] and row["method"] != PLAIN]
    plain = next(row for row in result["rows"] if row["method"] == PLAIN)["tokens_per_second"]
    figure = Figure(figsize=(7.0, 0.42 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(rows))[::-1]
    values = np.array([row["throughput_multiplier"] for row in rows])
    low = np.maximum(values - np.array([row["slowest"] for row in rows]) / plain, 0.0)
    high = np.maximum(np.array([row["fastest"] for row in rows]) / plain - values, 0.0)
    colours = [COLOURS[1] if row["share_by_kind"] else COLOURS[0] for row in rows]
    bars = axes.barh(at, values, color=colours, xerr=np.stack((low, high)), ecolor="#333333")
    axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=4)
    axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1.2)
    axes.set_yticks(at, [row["method"] for row in rows])
    axes.set_xlabel("tokens per second over plain decoding")
    axes.set_title(_setting(result), fontsize=9)
    axes.margins(x=0.12)
    return figure


def shares_figure(result: Result) -> Figure:
    """Stacked bars: of each kind's rounds the share of each drafter, for every method that chooses."""
    rows = [row for row in result["rows"] if row["share_by_kind"]]
    kinds = list(result["stream"]["kinds"])
    figure = Figure(figsize=(3.6 * max(len(rows), 1), 0.42 * len(kinds) + 2.0), layout="constrained")
    for axes, row in zip(figure.subplots(1, max(len(rows), 1), squeeze=False)[0], rows, strict=False):
        left = np.zeros(len(kinds))
        for place, name in enumerate(next(iter(row["share_by_kind"].values()))):
            values = np.array([row["share_by_kind"][kind][name] for kind in kinds])
            colour = GREY if name == PLAIN else COLOURS[place % len(COLOURS)]
            axes.barh(np.arange(len(kinds))[::-1], values, left=left, color=colour, label=name)
            left += values
        axes.set_yticks(np.arange(len(kinds))[::-1], kinds, fontsize=8)
        axes.set_title(row["method"], fontsize=9)
        axes.set_xlabel("share of rounds")
    if rows:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def _setting(result: Result) -> str:
    config = result["config"]
    return (
        f"{config['stream']}, batch {config['batch']}, prompts up to {config['longest']}, "
        f"T = {config['temperature']:g}, {config['dtype']}"
    )
