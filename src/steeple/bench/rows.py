"""From runs to the rows of the result: medians over repeats, ratios to plain decoding, the floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from steeple.bench.config import PLAIN, BenchConfig
from steeple.bench.workload import Cell
from steeple.evidence.measure import Run, Timing


@dataclass(frozen=True, slots=True)
class Identity:
    """How a drafter's greedy output compares with plain decoding's in one cell.

    identical: all of ``requests`` requests wrote the same tokens in float32; None where tokens are sampled.
    in_dtype: share of the requests of the timed runs that did so in the bench's own dtype; smallest_gap: where they did
    not, the smallest gap between the target's two best logits at a first difference.
    """

    identical: bool | None = None
    requests: int = 0
    in_dtype: float | None = None
    smallest_gap: float | None = None


def cell_rows(
    config: BenchConfig,
    cell: Cell,
    runs: Mapping[str, Sequence[Run]],
    identities: Mapping[str, Identity],
    floor_seconds: float,
) -> list[dict[str, Any]]:
    """One row per drafter, plain decoding first. ``runs[method]``: its repeats."""
    plain = [run.timing for run in runs[PLAIN]]
    return [
        {
            "drafter": method,
            "batch": cell.batch,
            "context": cell.context,
            "k": 0 if method == PLAIN else config.k,
            "temperature": cell.temperature,
            "dtype": config.dtype,
            "max_tokens": config.max_tokens,
            **speed([run.timing for run in runs[method]], plain),
            "floor_ms": floor_seconds * 1e3,
            "fraction_of_floor": floor_seconds / _mid(plain, lambda t: t.step) if method == PLAIN else None,
            "identical": identities[method].identical,
            "identical_requests": identities[method].requests,
            "identical_in_dtype": identities[method].in_dtype,
            "smallest_gap": identities[method].smallest_gap,
        }
        for method in runs
    ]


def speed(own: Sequence[Timing], plain: Sequence[Timing]) -> dict[str, Any]:
    """Everything that a row says about time and acceptance. Ratios are those of the medians."""
    request_rounds = sum(t.request_rounds for t in own)
    tau = sum(t.committed for t in own) / request_rounds
    rate, total = _mid(own, lambda t: t.tokens_per_second), _mid(own, _total_rate)
    step, plain_step = _mid(own, lambda t: t.step), _mid(plain, lambda t: t.step)
    accepted = [sum(t.accepted[depth] for t in own) for depth in range(len(own[0].accepted))]
    rates = [t.tokens_per_second for t in own]
    return {
        "tokens_per_second": rate,
        "tokens_per_second_range": [min(rates), max(rates)],
        "tokens_per_second_total": total,
        "tau": tau,
        "acceptance_by_position": [count / request_rounds for count in accepted],
        "draft_ms": _mid(own, lambda t: t.draft / t.rounds) * 1e3,
        "verify_ms": _mid(own, lambda t: t.verify / t.rounds) * 1e3,
        "other_ms": _mid(own, lambda t: t.other / t.rounds) * 1e3,
        "step_ms": step * 1e3,
        "dt": step / plain_step,
        "throughput_multiplier": rate / _mid(plain, lambda t: t.tokens_per_second),
        "tau_over_dt": tau / (step / plain_step),
        "throughput_multiplier_total": total / _mid(plain, _total_rate),
        "prompt_ms": _mid(own, lambda t: t.prompt_seconds) * 1e3,
        "rounds": sum(t.rounds for t in own),
        "repeat": len(own),
    }


def _total_rate(timing: Timing) -> float:
    return timing.total_tokens / timing.total_seconds


def _mid(timings: Sequence[Timing], value: Callable[[Timing], float]) -> float:
    return median(value(timing) for timing in timings)
