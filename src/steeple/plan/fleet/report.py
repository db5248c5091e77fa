"""What an outcome says: tokens per second, percentiles of latency, the share within the objectives, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steeple.config import check_range
from steeple.plan.costs import cost_per_million_tokens
from steeple.plan.fleet.load import Floats
from steeple.plan.fleet.replica import BIN_SHIFT, BINS
from steeple.plan.fleet.simulate import Fleet, Outcome

PERCENTILES = (50.0, 90.0, 99.0)
CURVE = tuple(np.linspace(0.0, 100.0, 101).tolist())


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """What is promised to users. 0 = nothing.

    Attributes:
        ttft: seconds to the first token.
        tpot: seconds per token after the first, the mean of a request.
        share: of the requests that must meet both.
    """

    ttft: float = 2.0
    tpot: float = 0.1
    share: float = 0.99

    def __post_init__(self) -> None:
        check_range("Objectives", "ttft", self.ttft, 0.0, 1e9)
        check_range("Objectives", "tpot", self.tpot, 0.0, 1e9)
        check_range("Objectives", "share", self.share, 0.0, 1.0)


@dataclass(frozen=True)
class Latencies:
    """Seconds per answered request, in order of arrival: to the first token, per token after it, to the last.

    A request of one token has no time per token: NaN in ``tpot``.
    """

    ttft: Floats
    tpot: Floats
    e2e: Floats

    @staticmethod
    def of(outcome: Outcome, warmup: float = 0.0) -> Latencies:
        """Of the answered requests, without the first ``warmup`` share of them."""
        served = np.flatnonzero(~outcome.refused)
        served = served[int(warmup * len(served)) :]
        arrival, output = outcome.load.arrival[served], outcome.load.output[served]
        first, done = outcome.first[served], outcome.done[served]
        tpot = np.full(len(served), np.nan)
        np.divide(done - first, output - 1, out=tpot, where=output > 1)
        return Latencies(first - arrival, tpot, done - arrival)

    def within(self, objectives: Objectives) -> dict[str, float]:
        """The share of requests that meets each objective, and ``both``; 1 where nobody was answered."""
        ttft = self.ttft <= (objectives.ttft or np.inf)
        tpot = ~(self.tpot > (objectives.tpot or np.inf))
        shares = {"ttft": ttft, "tpot": tpot, "both": ttft & tpot}
        return {name: float(met.mean()) if len(met) else 1.0 for name, met in shares.items()}


def percentiles(values: Floats, at: Sequence[float] = PERCENTILES) -> list[float | None]:
    """Percentiles of the values that are numbers; None for each where there is none."""
    known = values[~np.isnan(values)]
    return [None] * len(at) if not len(known) else [float(v) for v in np.percentile(known, at)]


def gap_percentiles(gaps: np.ndarray, at: Sequence[float] = PERCENTILES) -> list[float | None]:
    """Percentiles of the seconds between two rounds of a request, from counts of steps; within 1 %.

    A round brings tau tokens at once, so this is what a reader of the stream waits between two bursts.
    """
    total = np.cumsum(gaps)
    if not total[-1]:
        return [None] * len(at)
    places = np.searchsorted(total, np.array(at) / 100.0 * total[-1], side="left")
    return [float(np.exp((place - BIN_SHIFT + 0.5) / BINS)) for place in places]


def report(
    outcome: Outcome, fleet: Fleet, objectives: Objectives, *, price: float = 0.0, warmup: float = 0.1
) -> dict[str, Any]:
    """The outcome in JSON types.

    Args:
        price: of one GPU for an hour; 0 = not known.
        warmup: share of the requests that latencies leave out, since the fleet starts empty.
    """
    load, served = outcome.load, ~outcome.refused
    span = outcome.makespan
    tokens = int(load.output[served].sum())
    latencies = Latencies.of(outcome, warmup)
    within = latencies.within(objectives)
    rate = tokens / span if span > 0 else 0.0
    gpus = fleet.replicas * fleet.gpus
    hours = gpus * span / 3600
    return {
        "replicas": fleet.replicas,
        "gpus": gpus,
        "requests": len(load),
        "answered": int(served.sum()),
        "refused": int(outcome.refused.sum()),
        "preempted": outcome.preempted,
        "offered_per_second": load.rate if np.isfinite(load.rate) else None,
        "answered_per_second": float(served.sum()) / span if span > 0 else 0.0,
        "tokens_per_second": rate,
        "prompt_tokens_per_second": float(load.prompt[served].sum()) / span if span > 0 else 0.0,
        "good_per_second": within["both"] * float(served.sum()) / span if span > 0 else 0.0,
        "utilisation": float(outcome.busy.sum()) / (fleet.replicas * span) if span > 0 else 0.0,
        "mean_batch": outcome.token_steps / outcome.steps if outcome.steps else 0.0,
        "steps": outcome.steps,
        "seconds": span,
        "within": within,
        "meets_objectives": within["both"] >= objectives.share,
        **{name: _named(percentiles(getattr(latencies, name))) for name in ("ttft", "tpot", "e2e")},
        "itl": _named(gap_percentiles(outcome.gaps)),
        "curves": {name: percentiles(getattr(latencies, name), CURVE) for name in ("ttft", "tpot", "e2e")},
        "cost": hours * price if price else None,
        "cost_per_million_tokens": float(cost_per_million_tokens(rate, price * gpus)) if price and rate else None,
    }


def _named(values: Sequence[float | None]) -> dict[str, float | None]:
    return {f"p{at:g}": value for at, value in zip(PERCENTILES, values, strict=True)}
