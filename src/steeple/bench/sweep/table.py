"""The result of a sweep as a table for people, and as tables in a page of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from rich.table import Table

from steeple.bench.sweep import select
from steeple.bench.sweep.paper import BATCHES, CONTEXTS, DRAFTS, K, PaperDraft
from steeple.bench.sweep.select import Row

Result = Mapping[str, Any]
COLUMNS = ("batch", "context", "T", "drafter", "speed-up", "tau", "dt", "best k", "speed-up", "tau", "dt")
PAPER_TEMPERATURE = 1.0
NO_ROW = "-"


def sweep_table(result: Result) -> Table:
    """A row per drafter and cell: at the common k, then at the best k there."""
    rows = result["rows"]
    k = select.common_k(rows, K)
    table = Table(title=f"{_title(result)}, k = {k}, then the best k of each cell")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "drafter" else "right")
    fixed = select.at_k(rows, k)
    best = select.best_k(rows)
    for index, row in enumerate(best):
        last = index + 1 == len(best) or _cell(best[index + 1]) != _cell(row)
        own = select.find(fixed, drafter=row["drafter"], **_cell(row))
        table.add_row(
            str(row["batch"]),
            str(row["context"]),
            f"{row['temperature']:g}",
            row["drafter"],
            *_speeds(own),
            _k(row),
            *_speeds(row),
            end_section=last,
        )
    return table


def sweep_markdown(result: Result) -> str:
    """Tables for each temperature, then the paper's beside ours, then how noisy the machine was."""
    rows = result["rows"]
    k = select.common_k(rows, K)
    best_first = sorted(select.temperatures(rows), reverse=True)
    parts = [_title(result) + "."]
    for temperature in best_first:
        own = [row for row in rows if row["temperature"] == temperature]
        parts.append(_cells(own, select.at_k(own, k), f"T = {temperature:g}, k = {k}: speed-up (tau / dt)", _both))
        title = f"T = {temperature:g}, best k of each drafter and cell: speed-up (k)"
        parts.append(_cells(own, select.best_k(own), title, _with_k))
    parts += _beside_the_paper(rows)
    parts.append(_noise(result))
    return "\n\n".join(part for part in parts if part)


def _cells(rows: Sequence[Row], chosen: Sequence[Row], title: str, text: Callable[[Row], str]) -> str:
    """A line per cell, a column per drafter."""
    drafters = select.drafters(rows)
    lines = [f"**{title}**", "", _line(["batch", "context", "plain, ms", *drafters])]
    lines.append("|" + "---:|" * (3 + len(drafters)))
    for plain in rows:
        if not plain["k"]:
            found = [select.find(chosen, drafter=drafter, **_cell(plain)) for drafter in drafters]
            texts = [NO_ROW if row is None else text(row) for row in found]
            lines.append(_line([str(plain["batch"]), str(plain["context"]), f"{plain['step_ms']:.1f}", *texts]))
    return "\n".join(lines)


def _both(row: Row) -> str:
    return f"**{row['throughput_multiplier']:.2f}** ({row['tau']:.2f} / {row['dt']:.2f})"


def _with_k(row: Row) -> str:
    return f"**{row['throughput_multiplier']:.2f}** ({_k(row)})"


def _beside_the_paper(rows: Sequence[Row]) -> list[str]:
    """The paper's Table 1 and its Figure 4, with the drafters that are like its drafts."""
    fixed = [row for row in select.at_k(rows, K) if row["temperature"] == PAPER_TEMPERATURE and not row["adaptive"]]
    own = [row for row in fixed if select.context_of(row) != select.MIXED]  # the paper has no mixed contexts
    pairs = [(draft, drafter) for draft in DRAFTS for drafter in select.drafters(own) if _like(draft, drafter)]
    if not pairs:
        return []
    heads = [f"{draft.name} / {drafter}" for draft, drafter in pairs]
    tau = [f"**Paper's Table 1 / ours: tau at k = {K}, T = {PAPER_TEMPERATURE:g}, ours over all batches**", ""]
    tau += [_line(["context", *heads]), "|" + "---:|" * (1 + len(heads))]
    for context in sorted({*(c for d in DRAFTS for c in d.tau), *select.contexts(own)}):
        ours = [[r["tau"] for r in own if r["drafter"] == name and r["context"] == context] for _, name in pairs]
        texts = [
            f"{_number(draft.tau.get(context))} / {_number(mean(taus) if taus else None)}"
            for (draft, _), taus in zip(pairs, ours, strict=True)
        ]
        tau.append(_line([str(context), *texts]))
    times = [f"**Paper's Figure 4 (modelled) / ours (measured): multiplier at k = {K}, T = {PAPER_TEMPERATURE:g}**", ""]
    times += [_line(["batch", "context", *heads]), "|" + "---:|" * (2 + len(heads))]
    for batch, context in dict.fromkeys((row["batch"], select.context_of(row)) for row in own):
        texts = []
        for draft, name in pairs:
            row = select.find(own, drafter=name, batch=batch, context=context)
            measured = None if row is None else row["throughput_multiplier"]
            texts.append(f"{_number(_figure_4(draft, batch, context))} / {_number(measured)}")
        times.append(_line([str(batch), str(context), *texts]))
    return ["\n".join(tau), "\n".join(times)]


def _like(draft: PaperDraft, drafter: str) -> bool:
    return drafter.partition(":")[0] == draft.ours


def _figure_4(draft: PaperDraft, batch: int, context: Any) -> float | None:
    """The paper's multiplier in the cell nearest to ours; none for what it does not show."""
    if batch not in BATCHES:
        return None
    nearest = min(CONTEXTS, key=lambda value: abs(value - context))
    if abs(nearest - context) > nearest / 16:
        return None
    return draft.multiplier[BATCHES.index(batch)][CONTEXTS.index(nearest)]


def _noise(result: Result) -> str:
    """How far plain decoding and the machine's bandwidth moved within cells."""
    plain = [row for row in result["rows"] if not row["k"]]
    if not plain:
        return ""
    drifts = [abs(row["plain_step_ms"][-1] / row["plain_step_ms"][0] - 1) for row in plain]
    readings = [value / 1e9 for row in plain for value in row["read_bytes_per_second_range"]]
    identity = result["identity"]
    same = [name for name, value in identity.get("same", {}).items() if value]
    return (
        f"Plain decoding at the end of a cell against its beginning: {median(drifts):.1%} apart in the median cell, "
        f"{max(drifts):.1%} at most. Bandwidth beside the runs: {min(readings):.1f} to {max(readings):.1f} GB/s. "
        f"In float32 {len(same)} of {len(identity.get('same', {}))} wrote plain decoding's tokens "
        f"({identity.get('requests', 0)} requests, T = 0)."
    )


def _title(result: Result) -> str:
    config, environment = result["config"], result["environment"]
    where = environment["device"] if environment["device"] != "cpu" else environment["cpu"]
    return f"{config['model']}, {config['dtype']}, {where}, threads: {environment['threads']}"


def _speeds(row: Row | None) -> list[str]:
    if row is None:
        return [NO_ROW] * 3
    return [f"{row['throughput_multiplier']:.2f}", f"{row['tau']:.2f}", f"{row['dt']:.2f}"]


def _k(row: Row) -> str:
    return f"{row['drafted']:.1f} nodes" if row["adaptive"] else str(row["k"])


def _cell(row: Row) -> dict[str, Any]:
    return {"batch": row["batch"], "context": select.context_of(row), "temperature": row["temperature"]}


def _number(value: float | None) -> str:
    return NO_ROW if value is None else f"{value:.2f}"


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"
