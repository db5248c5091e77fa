"""The greedy half of the proof: a hard batch with speculation against each request alone without.

Hard means: prompts of very different lengths, long ones read in chunks, requests that join while others run, sampled
neighbours, a cache too small for all, preemptions, and a number of nodes that changes from round to round, 0 included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from steeple.draft import drafter_config
from steeple.engine import Engine, EngineConfig, LoadedModel, build_engine
from steeple.errors import ConfigError, InternalError
from steeple.evidence.logits import first_difference, last_logits
from steeple.proof.config import ProofConfig
from steeple.request import Request
from steeple.types import SamplingParams

BLOCK = 8
STEP_TOKENS = 32
CACHE_SHARE = 0.45  # of what all requests together would need
PREEMPT_EVERY = 12  # steps; on top of the preemptions that the small cache brings
NEIGHBOUR_SHARE = 4


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a request first differs. gap: between the target's two best logits there; tie: rounding can explain it."""

    request: int
    position: int
    expected: int | None
    got: int | None
    gap: float
    tie: bool
    against: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(slots=True)
class Conditions:
    """How hard the batch really was."""

    steps: int = 0
    joins: int = 0
    chunks: int = 0  # steps that ended in the middle of a prompt, per request
    preemptions: int = 0
    rounds: int = 0
    k0_rounds: int = 0  # rounds without a node
    tau: float = 0.0

    def require(self) -> None:
        """Raise ``ConfigError`` if something that the proof is about did not happen."""
        missing = [name for name in ("joins", "chunks", "preemptions", "k0_rounds") if not getattr(self, name)]
        if missing:
            raise ConfigError(
                f"the greedy proof saw no {', no '.join(missing)}; raise requests, context or max_tokens, "
                "so that it proves something."
            )


@dataclass(frozen=True, slots=True)
class GreedyOutcome:
    """The greedy half for one drafter. oracle_identical is None where ``transformers`` was not asked."""

    requests: int
    identical: int
    oracle_identical: int | None
    conditions: Conditions
    differences: list[Difference] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        """Every difference is one that rounding explains."""
        return all(d.tie for d in self.differences)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ``worst_gap``: the largest gap at a difference, 0 without any."""
        return {
            "requests": self.requests,
            "identical": self.identical,
            "oracle_identical": self.oracle_identical,
            "worst_gap": max((d.gap for d in self.differences), default=0.0),
            **{name: getattr(self.conditions, name) for name in self.conditions.__dataclass_fields__},
            "differences": [d.as_dict() for d in self.differences],
        }


def prove_greedy(
    config: ProofConfig,
    target: LoadedModel,
    drafter: str,
    settings: EngineConfig,
    prompts: Sequence[Sequence[int]],
    expected: dict[str, Sequence[Sequence[int]]],
) -> GreedyOutcome:
    """Run the hard batch with ``drafter`` and compare.

    Args:
        settings: dtype, device and the like; sizes are chosen here.
        expected: outputs to compare with, by name: ``plain`` and maybe ``transformers``.
    """
    requests = [
        Request(f"proof-{i}", prompt, SamplingParams(max_tokens=config.max_tokens, ignore_eos=True))
        for i, prompt in enumerate(prompts)
    ]
    engine = _engine(config, target, drafter, settings, requests)
    conditions = _drive(engine, _with_neighbours(config, requests))
    for request in requests:
        if request.error is not None:
            raise InternalError(f"request {request.id} of the proof failed: {request.error}")
    conditions.require()
    outputs = [request.output.tolist() for request in requests]
    differences = [
        difference
        for name, texts in expected.items()
        for difference in _compare(config, target, prompts, texts, outputs, name)
    ]
    wrong = {name: sum(1 for d in differences if d.against == name) for name in expected}
    oracle = len(requests) - wrong["transformers"] if "transformers" in expected else None
    return GreedyOutcome(len(requests), len(requests) - wrong["plain"], oracle, conditions, differences)


def _engine(
    config: ProofConfig, target: LoadedModel, drafter: str, settings: EngineConfig, requests: Sequence[Request]
) -> Engine:
    """An engine whose cache is too small for all requests at once, and whose budget changes with every round."""
    blocks = [-(-(r.prompt_len + config.max_tokens) // BLOCK) for r in requests]
    most = max(max(blocks), int(sum(blocks) * CACHE_SHARE))
    settings = replace(settings, block_size=BLOCK, step_tokens=STEP_TOKENS, kv_tokens=most * BLOCK)
    engine = build_engine(target, settings, drafter_config(drafter, k=config.k))
    pattern = (config.k, 0, 1, config.k, (config.k + 1) // 2)
    engine.budget = lambda request: pattern[request.stats.rounds % len(pattern)]
    return engine


def _with_neighbours(config: ProofConfig, requests: Sequence[Request]) -> list[Request]:
    """The requests with sampled ones among them, which live half as long, so that purely greedy steps come too."""
    rng = np.random.default_rng(config.seed)
    mixed: list[Request] = []
    for place, request in enumerate(requests):
        mixed.append(request)
        if place % NEIGHBOUR_SHARE == 0:
            params = SamplingParams(
                temperature=0.8, max_tokens=config.max_tokens // 2, ignore_eos=True, seed=int(rng.integers(2**62))
            )
            mixed.append(Request(f"neighbour-{place}", request.tokens[: request.prompt_len].tolist(), params))
    return mixed


def _drive(engine: Engine, requests: Sequence[Request]) -> Conditions:
    """Start with a third of the requests; one more joins every second step."""
    coming = deque(requests)
    seen = Conditions()
    for _ in range(max(1, len(coming) // 3)):
        engine.add(coming.popleft())
    while coming or not engine.idle:
        if coming and (seen.steps % 2 or engine.idle):
            seen.joins += not engine.idle
            engine.add(coming.popleft())
        engine.step()
        seen.steps += 1
        running = engine.scheduler.running
        seen.chunks += sum(1 for r in running if 0 < r.cached < r.prompt_len - 1 and r.written == 0)
        if seen.steps % PREEMPT_EVERY == 0 and running:
            engine.scheduler.preempt(running[-1])
    engine.check_integrity()
    speculation = engine.stats.speculation
    seen.preemptions = engine.stats.preemptions
    seen.rounds = speculation.rounds
    seen.k0_rounds = speculation.rounds - (speculation.proposed_at[0] if speculation.proposed_at else 0)
    seen.tau = speculation.tau
    return seen


def _compare(
    config: ProofConfig,
    target: LoadedModel,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    against: str,
) -> list[Difference]:
    found = []
    for number, (prompt, right, got) in enumerate(zip(prompts, expected, outputs, strict=True)):
        place = first_difference(right, got)
        if place is None:
            continue
        best = last_logits(target, [[*prompt, *right[:place]]])[0, 0].topk(2)
        gap = float(best.values[0] - best.values[1])
        pair = (right[place] if place < len(right) else None, got[place] if place < len(got) else None)
        tie = gap <= config.tie_gap and set(pair) == set(best.indices.tolist())
        found.append(Difference(number, place, *pair, gap, tie, against))
    return found
