"""Charts of a padded bench: tokens per second by batch, where the time goes, and where the gain comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from steeple.bench.figures import write_figures
from steeple.bench.plots import BAR_ROOM, COLOURS, GREY, MARKERS

Result = Mapping[str, Any]
PARTS = ("prefill", "draft", "verify", "judge", "align", "group", "join")
CAUSES = {
    "refill_drafted": "refill",
    "drafting": "drafting",
    "grouping": "pool over align",
    "no_alignment": "holes over align",
}


def write_padded_plots(result: Result, folder: Path) -> list[Path]:
    """Write ``padded_speed``, ``padded_time`` and ``padded_gains``, PNG and SVG each; returns the files."""
    figures = {
        "padded_speed": speed_figure(result),
        "padded_time": time_figure(result),
        "padded_gains": gains_figure(result),
    }
    return write_figures(figures, folder)


def speed_figure(result: Result) -> Figure:
    """Tokens per second against the batch size, a line per method, a panel per pair."""
    names = _pairs(result)
    figure = Figure(figsize=(max(4.2 * len(names), 6.5), 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    for axes, pair in zip(panels, names, strict=True):
        for place, method in enumerate(reversed(methods)):  # ours stand last, and shall have colours of their own
            rows = [row for row in result["rows"] if row["pair"] == pair and row["method"] == method]
            drafts = any(row["drafts"] for row in rows)
            axes.plot(
                [row["batch"] for row in rows],
                [row["tokens_per_second"] for row in rows],
                marker=MARKERS[place % len(MARKERS)],
                linestyle=":" if place >= len(COLOURS) else "-" if drafts else "--",
                color=COLOURS[place % len(COLOURS)] if drafts else GREY,
                label=method,
            )
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(pair, fontsize=10)
        axes.set_xlabel("rows of a call")
    panels[0].set_ylabel("tokens per second")
    _legend_below(figure)
    return figure


def _legend_below(figure: Figure) -> None:
    """One legend for all panels, where it covers nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)


def time_figure(result: Result) -> Figure:
    """Shares of time of our methods, a bar per method and batch, a line of panels per pair."""
    names = _pairs(result)
    figure = Figure(figsize=(9.0, 2.8 * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for axes, pair in zip(panels, names, strict=True):
        rows = [row for row in result["rows"] if row["pair"] == pair and row["shares"]]
        bottom = np.zeros(len(rows))
        for place, part in enumerate(PARTS):
            share = np.array([row["shares"][part] for row in rows])
            colour = COLOURS[place] if place < len(COLOURS) else GREY
            axes.bar(range(len(rows)), share, bottom=bottom, color=colour, label=part)
            bottom += share
        axes.set_xticks(range(len(rows)), [f"{row['method']}, {row['batch']}" for row in rows], rotation=90, fontsize=6)
        axes.set_title(pair, fontsize=10)
        axes.set_ylabel("share of time")
    _legend_below(figure)
    return figure


def gains_figure(result: Result) -> Figure:
    """Ratios of speed between methods that differ in one thing, by batch, a panel per pair."""
    names = _pairs(result)
    figure = Figure(figsize=(max(4.2 * len(names), 6.5), 3.8), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, pair in zip(panels, names, strict=True):
        gains = [gain for gain in result["gains"] if gain["pair"] == pair]
        width = BAR_ROOM / len(CAUSES)
        for place, (cause, label) in enumerate(CAUSES.items()):
            heights = [gain[cause] or 0.0 for gain in gains]
            axes.bar(np.arange(len(gains)) + place * width, heights, width, color=COLOURS[place], label=label)
        axes.axhline(1.0, color=GREY, linewidth=0.8)
        axes.set_xticks(np.arange(len(gains)) + BAR_ROOM / 2, [str(gain["batch"]) for gain in gains])
        axes.set_title(pair, fontsize=10)
        axes.set_xlabel("rows of a call")
    panels[0].set_ylabel("times as fast")
    _legend_below(figure)
    return figure


def _pairs(result: Result) -> list[str]:
    return list(dict.fromkeys(row["pair"] for row in result["rows"]))
