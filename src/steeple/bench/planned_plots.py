"""The chart of predicted against measured throughput: a dot per row of a sweep, bands of 10 and 20 % around equal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from steeple.bench.figures import write_figures
from steeple.bench.plots import COLOURS, GREY, MARKERS

PANELS = (
    ("predicted_tokens_per_second", "as calibrated"),
    ("predicted_at_bandwidth", "at the memory's speed beside the row"),
)
BANDS = ((0.2, 0.10), (0.1, 0.16))  # half width, opacity


def write_planned_plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``planned`` as PNG and SVG; returns the files. ``StorageError`` if the folder cannot be written."""
    return write_figures({"planned": planned_figure(result)}, folder)


def planned_figure(result: Mapping[str, Any]) -> Figure:
    """Two panels, measured across, predicted up, tokens per second of a batch."""
    rows = result["rows"]
    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    figure.suptitle(f"{result['model']}: throughput predicted from other models", fontsize=10)
    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    measured = [row["measured_tokens_per_second"] for row in rows]
    ends = [min(measured) / 1.3, max(measured) * 1.3]
    panels = figure.subplots(1, len(PANELS), squeeze=False)[0]
    for axes, (name, title) in zip(panels, PANELS, strict=True):
        for half, alpha in BANDS:
            low, high = ([end * (1 + sign * half) for end in ends] for sign in (-1, 1))
            axes.fill_between(ends, low, high, color=GREY, alpha=alpha, linewidth=0, label=f"within {half:.0%}")
        axes.plot(ends, ends, color=GREY, linewidth=0.8)
        for place, drafter in enumerate(drafters):
            own = [row for row in rows if row["drafter"] == drafter]
            axes.plot(
                [row["measured_tokens_per_second"] for row in own],
                [row[name] for row in own],
                MARKERS[place % len(MARKERS)],
                color=COLOURS[(place - 1) % len(COLOURS)] if place else GREY,
                markersize=4,
                alpha=0.7,
                label="plain decoding" if not any(row["k"] for row in own) else drafter,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("measured tokens/s", fontsize=9)
    panels[0].set_ylabel("predicted tokens/s", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
