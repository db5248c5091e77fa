"""Predicted against measured: what a calibration says of every row of a sweep, and how much of the error is noise.

Time is predicted; tokens per round are those that the sweep measured. Three errors stand beside each other: of the
throughput as it is, of the throughput at the memory's speed that was read beside the row's runs, and of the ratio to
plain decoding, which was measured in the same minute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steeple.errors import ConfigError
from steeple.plan.calibration import Calibration
from steeple.plan.fit_rounds import summary
from steeple.plan.ours import Precision, StepModel, pass_work
from steeple.plan.rounds import DraftForm, form_of
from steeple.plan.shapes import ModelShape, find_shape

SCHEMA_VERSION = 1
ERRORS = ("error", "error_at_bandwidth", "error_of_multiplier")
WORST = 12
MOVED = 0.15  # a speed of the memory so far from the calibration's explains an error of that size
SPREAD = 0.2  # plain decoding that took so much longer in one of a cell's runs than in another was disturbed
ALLOWED = 0.1

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Predictor:
    """Seconds of a sweep's rounds.

    Args:
        target: the sweep's. step: the calibrated model. inner: drafter that chooses its own depth -> whose passes it
        makes.
    """

    target: ModelShape
    step: StepModel
    precision: Precision
    inner: Mapping[str, str]

    def round_seconds(self, row: Row, memory: float = 1.0) -> float:
        """Of a round of ``row``; a mean depth that is no whole number lies between its neighbours."""
        form = form_of(self.inner.get(row["drafter"], row["drafter"]), self.target) if row["k"] else None
        if row["k"] and form is None:
            raise ConfigError(f"{row['drafter']}: no small model of {self.target.name} is known.")
        depth = float(row["drafted"] if row["adaptive"] else row["k"])
        low, share = math.floor(depth), depth - math.floor(depth)
        below = self._seconds(row, form, low, memory)
        return below if not share else below + share * (self._seconds(row, form, low + 1, memory) - below)

    def _seconds(self, row: Row, form: DraftForm | None, k: int, memory: float) -> float:
        step = self.step.at_temperature(row["temperature"])
        context = row["context"] + row["max_tokens"] / 2
        work = pass_work(self.target, row["batch"], context, k + 1, precision=self.precision)
        seconds = step.predict(work, memory)
        if form is not None and form.shape is not None and k:
            own = pass_work(form.shape, row["batch"], context, window=form.positions, precision=self.precision)
            seconds = seconds + step.drafting(own, k, work.bytes, memory)
        return float(seconds)


def planned(sweep: Row, calibration: Calibration, inner: Mapping[str, str]) -> dict[str, Any]:
    """Every row of ``sweep`` predicted, with summaries; JSON types.

    Raises:
        ConfigError: it is no sweep, or the calibration was made with the model that it shall predict.
    """
    if sweep.get("kind") != "sweep" or not sweep.get("rows"):
        raise ConfigError("There are no rows of a sweep in this file; give the JSON of steeple bench --sweep.")
    model = sweep["model"]["name"]
    if model in calibration.models:
        raise ConfigError(
            f"The calibration {calibration.path} measured {model} itself, so it predicts nothing; use other models."
        )
    predictor = Predictor(find_shape(model), calibration.step, Precision.of(sweep["config"]["dtype"]), inner)
    plain = {_cell(row): row for row in sweep["rows"] if not row["k"]}
    rows = [_row(row, plain[_cell(row)], predictor, calibration) for row in sweep["rows"]]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "planned",
        "model": model,
        "calibration": {
            "models": list(calibration.models),
            "read_bytes_per_second": calibration.read_bytes_per_second,
        },
        "rows": rows,
        "summary": {name: summary(_errors(rows, name)) for name in ERRORS},
        "by": {
            key: {
                str(value): {name: summary(_errors(own, name)) | {"mean": _mean(own, name)} for name in ERRORS}
                for value, own in _groups(rows, key)
            }
            for key in ("drafter", "batch", "context", "temperature")
        },
        "noise": noise(rows),
        "worst": _worst(rows),
    }


def _row(row: Row, plain: Row, predictor: Predictor, calibration: Calibration) -> dict[str, Any]:
    read = calibration.read_bytes_per_second
    memory = row["read_bytes_per_second"] / read if read else 1.0
    tau, batch = float(row["tau"]), row["batch"]
    seconds, beside = predictor.round_seconds(row), predictor.round_seconds(row, memory)
    multiplier = tau * predictor.round_seconds(plain) / seconds
    measured, ratio = float(row["tokens_per_second"]), float(row["throughput_multiplier"])
    found = {name: row[name] for name in ("drafter", "batch", "context", "k", "temperature", "adaptive", "tau")}
    found |= {
        "measured_tokens_per_second": measured,
        "predicted_tokens_per_second": batch * tau / seconds,
        "predicted_at_bandwidth": batch * tau / beside,
        "measured_multiplier": ratio,
        "predicted_multiplier": multiplier,
        "error": batch * tau / seconds / measured - 1,
        "error_at_bandwidth": batch * tau / beside / measured - 1,
        "error_of_multiplier": multiplier / ratio - 1 if row["k"] else None,
        "measured_step_ms": row["step_ms"],
        "predicted_step_ms": seconds * 1e3,
        "memory": memory,
        "plain_spread": max(row["plain_step_ms"]) / min(row["plain_step_ms"]) - 1,
        "rounds": row["rounds"],
    }
    return found | {"cause": cause(found)}


def cause(row: Row) -> str:
    """What most likely made the error of a row; a guess from what was measured beside it, and it says so."""
    if abs(row["error"]) <= ALLOWED:
        return ""
    reasons = []
    better = abs(row["error_at_bandwidth"]) < abs(row["error"])
    if abs(row["memory"] - 1) > MOVED and better:
        reasons.append(f"memory at {row['memory']:.0%} of the calibration's speed")
    if row["plain_spread"] > SPREAD:
        reasons.append(f"plain decoding varied by {row['plain_spread']:.0%} within the cell")
    ratio = row["error_of_multiplier"]
    if ratio is not None and abs(ratio) <= ALLOWED:
        reasons.append("the ratio to plain decoding is right, so the whole cell was faster or slower")
    return "; ".join(reasons) or "not explained by what was read beside it: the model's"


def noise(rows: Sequence[Row]) -> dict[str, float]:
    """How well anything could do that knows only the work: from rows that differ in temperature alone.

    Of two such rows the measured times are compared after the predicted difference is taken out. If they are further
    apart than ``1.1 / 0.9``, at least one of them is more than 10 % off whatever is predicted.
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("drafter", "batch", "context", "k"))
        if not row["adaptive"]:
            groups.setdefault(key, []).append(math.log(row["measured_step_ms"] / row["predicted_step_ms"]))
    apart = np.array([max(own) - min(own) for own in groups.values() if len(own) == 2])
    spreads = np.array([row["plain_spread"] for row in rows if not row["k"]])
    found = {"plain_spread_median": float(np.median(spreads)), "plain_spread_max": float(spreads.max())}
    if apart.size:
        found |= {
            "pairs": float(apart.size),
            "apart_median": float(np.expm1(np.median(apart))),
            "apart_p90": float(np.expm1(np.quantile(apart, 0.9))),
            "most_within_10_percent": 1 - _beyond(apart, 0.1) / 2,
            "most_within_20_percent": 1 - _beyond(apart, 0.2) / 2,
        }
    return found


def _beyond(apart: np.ndarray[Any, Any], bound: float) -> float:
    """The share of pairs of which no prediction can have both within ``bound``."""
    return float((apart > math.log((1 + bound) / (1 - bound))).mean())


def _cell(row: Row) -> tuple[Any, ...]:
    return row["batch"], row["context"], row["temperature"]


def _worst(rows: Sequence[Row]) -> list[Row]:
    """The row of each cell that is furthest off, of the cells where it is furthest."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: -abs(math.log1p(row["error"]))):
        found.setdefault(_cell(row), row)
    return list(found.values())[:WORST]


def _groups(rows: Sequence[Row], key: str) -> Iterable[tuple[Any, list[Row]]]:
    for value in dict.fromkeys(row[key] for row in rows):
        yield value, [row for row in rows if row[key] == value]


def _errors(rows: Sequence[Row], name: str) -> np.ndarray[Any, Any]:
    return np.array([row[name] for row in rows if row[name] is not None], dtype=np.float64)


def _mean(rows: Sequence[Row], name: str) -> float:
    found = _errors(rows, name)
    return float(found.mean()) if found.size else 0.0


def planned_markdown(result: Mapping[str, Any]) -> str:
    """The section of the page: shares, what noise allows, where it is off, the worst rows."""
    words = {
        "error": "tokens/s",
        "error_at_bandwidth": "tokens/s at the memory's speed beside the row",
        "error_of_multiplier": "multiplier over plain decoding",
    }
    found, allowed = result["summary"], result["noise"]
    lines = [
        f"{result['model']} predicted from {', '.join(result['calibration']['models'])}; {len(result['rows'])} rows.",
        "",
        "| predicted | median error | 90th percentile | within 10 % | within 20 % | most |",
        "|---|---|---|---|---|---|",
    ]
    for name, text in words.items():
        lines.append(f"| {text} | {_shares(found[name])} |")
    if "pairs" in allowed:
        lines += [
            "",
            f"Of {allowed['pairs']:.0f} pairs of rows that differ in temperature alone, half are more than "
            f"{allowed['apart_median']:.0%} apart once the predicted difference is taken out, a tenth more than "
            f"{allowed['apart_p90']:.0%}. So no model that knows only the work can have more than "
            f"{allowed['most_within_10_percent']:.0%} of the rows within 10 % and "
            f"{allowed['most_within_20_percent']:.0%} within 20 %. Plain decoding, measured several times in each "
            f"cell, varied by {allowed['plain_spread_median']:.0%} in the median cell and by "
            f"{allowed['plain_spread_max']:.0%} in the worst.",
        ]
    lines += ["", "| drafter | rows | mean error | within 10 % | within 20 % | multiplier within 10 % |"]
    lines.append("|---|---|---|---|---|---|")
    for drafter, own in result["by"]["drafter"].items():
        ratio = own["error_of_multiplier"].get("within_10_percent")
        lines.append(
            f"| `{drafter}` | {own['error']['measurements']:.0f} | {own['error']['mean']:+.0%} | "
            f"{own['error']['within_10_percent']:.0%} | {own['error']['within_20_percent']:.0%} | "
            f"{'' if ratio is None else format(ratio, '.0%')} |"
        )
    lines += ["", "The cells furthest off, with their worst row and the likely cause:", ""]
    lines += ["| drafter | batch | context | T | k | measured | predicted | error | likely cause |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in result["worst"]:
        lines.append(
            f"| `{row['drafter']}` | {row['batch']} | {row['context']} | {row['temperature']:g} | {row['k']} | "
            f"{row['measured_tokens_per_second']:,.0f} | {row['predicted_tokens_per_second']:,.0f} | "
            f"{row['error']:+.0%} | {row['cause']} |"
        )
    return "\n".join(lines)


def _shares(found: Mapping[str, float]) -> str:
    names = ("median", "p90", "within_10_percent", "within_20_percent", "max")
    return " | ".join(f"{found[name]:.0%}" for name in names)
