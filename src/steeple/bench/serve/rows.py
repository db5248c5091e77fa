"""From records to a row of the result: percentiles, throughput, goodput, errors and acceptance, under vLLM's names.

Latencies count from the intended time of a request; those under ``..._from_send_ms`` from when it was sent, which is
what ``vllm bench serve`` reports as ``ttft`` and ``e2el``. Only completed requests have latencies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steeple.bench.serve.acceptance import Acceptance, of_answer, pooled
from steeple.bench.serve.config import shown_rate
from steeple.bench.serve.drive import Drive
from steeple.bench.serve.load import Point
from steeple.bench.serve.record import Record

PERCENTILES = (50, 90, 95, 99)
MS = 1e3


def row(
    point: Point, drive: Drive, objectives: Mapping[str, float], counters: Acceptance | None, *, detailed: bool
) -> dict[str, Any]:
    """Everything about one point. Args: objectives in ms by name; counters: what ``/metrics`` counted meanwhile."""
    records = drive.records
    completed = [record for record in records if not record.error]
    failed = [record for record in records if record.error]
    good = [record for record in completed if not missed(record, objectives)]
    seconds = drive.duration
    read = sum(record.prompt_tokens or 0 for record in completed)
    written = sum(record.tokens for record in completed)
    found: dict[str, Any] = {
        "request_rate": shown_rate(point.rate),
        "arrivals": point.arrivals,
        "max_concurrency": point.limit or None,
        "num_prompts": len(records),
        "completed": len(completed),
        "failed": len(failed),
        "errors": dict(Counter(record.error for record in failed)),
        "error_examples": {record.error: record.message for record in reversed(failed)},
        "duration": seconds,
        "total_input_tokens": read,
        "total_output_tokens": written,
        "counted_by_server": sum(record.output_tokens is not None for record in completed),
        "request_throughput": _per(len(completed), seconds),
        "output_throughput": _per(written, seconds),
        "total_token_throughput": _per(read + written, seconds),
        "request_goodput": _per(len(good), seconds) if objectives else None,
        "goodput_share": len(good) / len(records) if objectives else None,
        "missed": dict(Counter(name for record in completed for name in missed(record, objectives))),
        "max_concurrent_requests": in_flight(records),
        **latencies(completed),
        **summary("lag", [record.dispatched - record.intended for record in records]),
        **summary("queue", [record.sent - record.intended for record in records]),
        **acceptance(completed, counters),
    }
    if detailed:
        found["requests"] = [record.shown(drive.start) for record in records]
    return found


def missed(record: Record, objectives: Mapping[str, float]) -> list[str]:
    """The objectives that a completed request does not meet. A single chunk has no gap, a single token no TPOT."""
    reached = {
        "ttft": record.ttft(),
        "itl": max(record.gaps, default=0.0),
        "tpot": record.tpot or 0.0,
        "e2e": record.e2e(),
    }
    return [name for name, most in objectives.items() if reached[name] * MS > most]


def latencies(completed: Sequence[Record]) -> dict[str, Any]:
    """Spread of every latency over the completed requests; gaps over all gaps of all of them."""
    counted = [gaps for record in completed if (gaps := record.token_gaps) is not None]
    return {
        **summary("ttft", [record.ttft() for record in completed]),
        **summary("tpot", [tpot for record in completed if (tpot := record.tpot) is not None]),
        **summary("itl", [gap for record in completed for gap in record.gaps]),
        **summary("itl_per_token", [gap for gaps in counted for gap in gaps]),
        "itl_per_token_requests": len(counted),
        **summary("e2el", [record.e2e() for record in completed]),
        **summary("ttft_from_send", [record.ttft(from_send=True) for record in completed]),
        **summary("e2el_from_send", [record.e2e(from_send=True) for record in completed]),
    }


def summary(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """``mean_NAME_ms`` and so on; None of nothing. Percentiles are interpolated linearly."""
    values = np.asarray(seconds, dtype=np.float64) * MS
    whole: dict[str, Any] = {"mean": np.mean, "median": np.median, "std": np.std, "max": np.max}
    found = {f"{key}_{name}_ms": float(of(values)) if len(values) else None for key, of in whole.items()}
    marks = np.percentile(values, PERCENTILES) if len(values) else [None] * len(PERCENTILES)
    for share, mark in zip(PERCENTILES, marks, strict=True):
        found[f"p{share}_{name}_ms"] = None if mark is None else float(mark)
    return found


def in_flight(records: Sequence[Record]) -> int:
    """Most requests that were sent and not yet over at one moment."""
    changes = sorted([(r.sent, 1) for r in records] + [(r.ended, -1) for r in records])
    return int(np.max(np.cumsum([change for _, change in changes]), initial=0))


def acceptance(completed: Sequence[Record], counters: Acceptance | None) -> dict[str, Any]:
    """Out of the answers where all of them say it, else out of the server's counters, which know no requests apart."""
    answers = [said for record in completed if (said := of_answer(record.speculation or {})) is not None]
    taus = [said.tau for said in answers if said.tau is not None]
    alone = {"mean_tau_of_requests": float(np.mean(taus)) if taus else None}
    if answers and len(answers) == len(completed):
        return {"acceptance_from": "responses", **pooled(answers).row(), **alone}
    if counters is not None:
        return {"acceptance_from": "metrics", **counters.row(), **alone}
    return {"acceptance_from": None, **Acceptance().row(), **alone}


def _per(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
