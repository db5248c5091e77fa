"""What the live page and the log show: one JSON object on the engine, the queue, the memory and recent requests."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

from steeple.request import SpeculationStats
from steeple.serve.service import Service


def stats(service: Service) -> dict[str, Any]:
    """The state of the server. Rates per second over the last ten; shares from 0 to 1; seconds and bytes."""
    loop, tally, engine = service.loop, service.loop.tally, service.loop.engine
    pool = engine.cache.pool
    memory = engine.memory
    return {
        "model": service.config.name,
        "uptime_seconds": time.time() - service.created,
        "now": tally.clock(),
        "ready": loop.ready,
        "trouble": loop.trouble,
        "rate": tally.rate(),
        "seconds": [
            {"at": s.at, "tokens": s.tokens, "drafted": s.drafted, "accepted": s.accepted, "rounds": s.rounds}
            for s in list(tally.seconds)
        ],
        "speculation": {"drafts": tally.drafts, "nodes": loop.nodes, **_speculation(tally.speculation)},
        "by_drafter": {name: _speculation(one) for name, one in list(tally.by_drafter.items())},
        "queue": {"running": loop.running, "waiting": loop.waiting, "by_tenant": loop.tenants},
        "batch_size": engine.parts.batch_size,
        "kv": {"blocks": pool.count, "held": pool.held, "block_size": engine.cache.block_size},
        "memory": None if memory is None else memory.as_dict(),
        "engine": _engine(service),
        "outcomes": dict(tally.outcomes),
        "prompt_tokens": tally.prompt_tokens,
        "generation_tokens": tally.generation_tokens,
        "failures": tally.failures,
        "turned_away": tally.turned_away,
        "recent": list(tally.recent),
    }


def _speculation(stats: SpeculationStats) -> dict[str, Any]:
    return {
        "tokens_per_round": stats.tau,
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "acceptance_by_position": stats.acceptance_by_position,
    }


def _engine(service: Service) -> dict[str, Any]:
    """Where the time of the steps goes; with it a page can estimate what plain decoding would do."""
    stats = service.loop.engine.stats
    names = ("steps", "decode_steps", "draft_seconds", "verify_seconds", "other_seconds", "prompt_seconds")
    return {name: getattr(stats, name) for name in names}


def line(service: Service, before: SpeculationStats, drafts: int, tokens: int, seconds: float) -> str:
    """One line about what happened since ``before``, in the words that tools look for.

    Args: drafts, tokens: rounds with a draft and tokens written before; seconds: how long ago that was.
    """
    loop, tally = service.loop, service.loop.tally
    now, pool = copy.deepcopy(tally.speculation), service.loop.engine.cache.pool  # the engine's thread goes on counting
    accepted, drafted = now.accepted - before.accepted, now.drafted - before.drafted
    rounds = tally.drafts - drafts
    text = (
        f"Running: {loop.running} reqs, Waiting: {loop.waiting} reqs, "
        f"Generation throughput: {(tally.generation_tokens - tokens) / seconds:.1f} tokens/s, "
        f"KV cache usage: {pool.held / pool.count:.1%}"
    )
    if not rounds:
        return text
    earlier = [*before.accepted_at, *[0] * (len(now.accepted_at) - len(before.accepted_at))]
    shares = ", ".join(f"{(kept - old) / rounds:.3f}" for kept, old in zip(now.accepted_at, earlier, strict=True))
    rate = accepted / drafted if drafted else math.nan
    return (
        f"{text}, SpecDecoding metrics: Mean acceptance length: {1 + accepted / rounds:.2f}, "
        f"Accepted throughput: {accepted / seconds:.1f} tokens/s, Drafted throughput: {drafted / seconds:.1f} "
        f"tokens/s, Per-position acceptance rate: {shares}, Avg Draft acceptance rate: {rate:.1%}"
    )
