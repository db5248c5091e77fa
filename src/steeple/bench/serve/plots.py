"""Charts of a load test: latencies, and throughput with goodput, over the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from steeple.bench.figures import write_figures
from steeple.bench.plots import COLOURS, MARKERS
from steeple.bench.serve.rows import PERCENTILES
from steeple.bench.serve.table import label

Row = Mapping[str, Any]
Result = Mapping[str, Any]
PANELS = {
    "ttft": ("first token", "ttft_ms"),
    "itl": ("between two chunks", "itl_ms"),
    "e2el": ("to the end", "e2e_ms"),
}
FINEST_MS = 0.1
ENDS = ((50, "--"), (99, "-"))  # of several lines, these percentiles each


@dataclass(frozen=True, slots=True)
class Axis:
    """What is on the horizontal axis: the rate, or the limit on requests in flight; lines are the other one."""

    key: str
    other: str
    words: str
    of_lines: str

    def lines(self, rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
        """Rows of each line in the order of the axis, with the line's name."""
        values = dict.fromkeys(row[self.other] for row in rows)
        return [(self._name(v), sorted((r for r in rows if r[self.other] == v), key=self._order)) for v in values]

    def _order(self, row: Row) -> float:
        value = row[self.key]
        return float("inf") if value is None else float(value)

    def _name(self, value: float | str | None) -> str:
        return f"{self.of_lines} {_text(value)}"


def axis_of(rows: Sequence[Row]) -> Axis:
    """The rate if it varies, else the limit."""
    by_rate = Axis("request_rate", "max_concurrency", "requests per second", "in flight:")
    by_limit = Axis("max_concurrency", "request_rate", "requests in flight, at most", "rate")
    return by_rate if len({row["request_rate"] for row in rows}) > 1 else by_limit


def write_serve_plots(result: Result, folder: Path) -> list[Path]:
    """Write ``latency`` and ``throughput``, as PNG and SVG each, into ``folder``; returns the files.

    Raises:
        StorageError: the folder cannot be written.
    """
    return write_figures({"latency": latency_figure(result), "throughput": throughput_figure(result)}, folder)


def latency_figure(result: Result) -> Figure:
    """A panel per latency, logarithmic: its percentiles over the load; dotted: the objective."""
    rows = result["rows"]
    axis = axis_of(rows)
    figure, panels = _panels(result, len(PANELS))
    for panel, (name, (words, objective)) in zip(panels, PANELS.items(), strict=True):
        lines = axis.lines(rows)
        for place, (what, line) in enumerate(lines):
            if len(lines) == 1:
                for rank, share in enumerate(PERCENTILES):
                    _line(panel, axis, rows, line, f"p{share}_{name}_ms", f"p{share}", COLOURS[rank], MARKERS[rank])
                continue
            for share, style in ENDS:
                key, colour, marker = (
                    f"p{share}_{name}_ms",
                    COLOURS[place % len(COLOURS)],
                    MARKERS[place % len(MARKERS)],
                )
                _line(panel, axis, rows, line, key, f"{what}, p{share}", colour, marker, style)
        if result["config"][objective]:
            panel.axhline(result["config"][objective], color="black", linewidth=1.2, linestyle=":", label="objective")
        if any((row[f"p99_{name}_ms"] or 0) > 0 for row in rows):
            _logarithmic(panel)
        panel.set_title(words, fontsize=10)
    panels[0].set_ylabel("ms since the intended time")
    _legend(figure, panels)
    return figure


def throughput_figure(result: Result) -> Figure:
    """Output tokens per second, and requests per second that ended, and that met the objectives, over the load."""
    rows = result["rows"]
    axis = axis_of(rows)
    figure, (tokens, requests) = _panels(result, 2)
    for place, (what, line) in enumerate(axis.lines(rows)):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        _line(tokens, axis, rows, line, "output_throughput", "", colour, marker)
        _line(requests, axis, rows, line, "request_throughput", f"{what}, completed", colour, marker)
        if line[0]["request_goodput"] is not None:
            _line(requests, axis, rows, line, "request_goodput", f"{what}, within the objectives", colour, marker, "--")
    tokens.set_ylabel("output tokens per second")
    requests.set_ylabel("requests per second")
    for panel in (tokens, requests):
        panel.set_ylim(bottom=0)
    _legend(figure, [requests])
    return figure


def _panels(result: Result, count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * count, 4.4), layout="constrained")
    facts = result["config"]
    what = f"{result['model_id']}, {facts['requests']} requests a point, at most {facts['max_tokens']} tokens each"
    figure.suptitle(what, fontsize=10)
    axis = axis_of(result["rows"])
    panels = [figure.add_subplot(1, count, place + 1) for place in range(count)]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.set_xlabel(axis.words)
        places = _places(axis, result["rows"])
        panel.set_xticks(list(places.values()), [_text(value) for value in places])
    return figure, panels


def _places(axis: Axis, rows: Sequence[Row]) -> dict[Any, float]:
    """Where each value is drawn: evenly apart, since "all at once" and "no limit" are no numbers."""
    values = sorted({row[axis.key] for row in rows}, key=lambda value: axis._order({axis.key: value}))
    return {value: float(place) for place, value in enumerate(values)}


def _line(
    panel: Axes, axis: Axis, rows: Sequence[Row], line: Sequence[Row], key: str, what: str, colour: str, marker: str,
    style: str = "-",
) -> None:  # fmt: skip
    places = _places(axis, rows)
    known = [row for row in line if row[key] is not None]
    at, values = [places[row[axis.key]] for row in known], [row[key] for row in known]
    panel.plot(at, values, color=colour, marker=marker, linestyle=style, markersize=5, label=what)


def _text(value: float | str | None) -> str:
    return "no limit" if value is None else label(value)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    found = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    columns = max(1, int(figure.get_figwidth() // (0.08 * max(map(len, found)) + 0.6)))
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _logarithmic(panel: Axes) -> None:
    """Below ``FINEST_MS`` is nothing that a client can tell: two chunks in one packet."""
    panel.set_yscale("log", nonpositive="mask")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_ylim(bottom=max(panel.get_ylim()[0], FINEST_MS))
