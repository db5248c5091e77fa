"""Whether drafters write plain decoding's tokens: in float32 once for all cells, and in the timed runs themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from steeple.bench.rows import Identity
from steeple.bench.sweep.config import SweepConfig
from steeple.bench.sweep.engines import Engines, Method, settings
from steeple.bench.sweep.rows import CellRuns
from steeple.bench.sweep.workload import Cell, Workload, cache_positions, spread_of
from steeple.engine import LoadedModel, load_model
from steeple.evidence.logits import first_difference, top_gap
from steeple.evidence.progress import Progress

EXACT = "float32"
MOST_GAPS = 2  # looked up per method and cell: each is a forward over a whole text


def exact_identity(config: SweepConfig, workload: Workload, cell: Cell, progress: Progress) -> dict[str, Any]:
    """Greedy tokens of every drafter in float32 beside plain decoding's, for a few requests of ``cell``'s context.

    Returns the record: where it was looked at, and for each drafter and k whether all tokens were the same.
    """
    cell = replace(cell, batch=min(max(config.batch), config.identity_requests), temperature=0.0)
    tokens = config.least_tokens
    lengths = [len(prompt) for prompt in workload.prompts(cell, 0)]
    block_size = settings(config, dtype=EXACT, kv_tokens=0, batch_size=1).block_size
    positions = cache_positions(lengths, tokens + max(config.ks) + 1, block_size, spare=2)
    chosen = settings(config, dtype=EXACT, kv_tokens=positions, batch_size=cell.batch)
    engines = Engines(config, load_model(config.model, chosen), chosen)
    expected = engines.plain.run(workload.requests(cell, 0, tokens)).outputs
    same: dict[str, bool] = {engines.plain.label: True}
    for done, method in enumerate(engines.methods):
        same[method.label] = method.run(workload.requests(cell, 0, tokens)).outputs == expected
        progress(f"float32, {method.label}", done + 1, len(engines.methods))
    return {
        "dtype": EXACT,
        "temperature": 0.0,
        "requests": cell.batch,
        "contexts": spread_of(lengths),
        "max_tokens": tokens,
        "same": same,
    }


def cell_identities(
    exact: Mapping[str, Any],
    methods: Sequence[Method],
    runs: CellRuns,
    prompts: Sequence[Sequence[Sequence[int]]],
    target: LoadedModel,
) -> dict[str, Identity]:
    """By label. ``exact``: what ``exact_identity`` found; ``prompts[r]``: those of turn r. Sampled cells have none."""
    if runs.cell.temperature > 0:
        return {}
    found = {}
    for method, own in zip(methods, [runs.plain, *runs.methods], strict=True):
        gaps: list[float] = []
        different, total = 0, 0
        for turn, texts in enumerate(prompts):
            for prompt, plain, other in zip(texts, runs.plain[turn].outputs, own[turn].outputs, strict=True):
                place = first_difference(*_both(plain, other))
                total += 1
                different += place is not None
                if place is not None and len(gaps) < MOST_GAPS:
                    gaps.append(top_gap(target, [*prompt, *plain[:place]]))
        same = exact["same"].get(method.label)
        requests = exact["requests"] if same is not None else 0
        found[method.label] = Identity(same, requests, 1 - different / total, min(gaps) if gaps else None)
    return found


def _both(plain: Sequence[int], other: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The part that both have written: a run ends when its requests have written enough on average."""
    length = min(len(plain), len(other))
    return plain[:length], other[:length]
