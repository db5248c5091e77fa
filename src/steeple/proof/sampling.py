"""The sampling half of the proof: what speculation draws against the target's exact law.

The first token of an output comes from the prompt's step, without a draft; so three tokens are compared, and the share
of samples whose second or third token a draft had a say in is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from steeple.draft import drafter_config
from steeple.engine import EngineConfig, LoadedModel, build_engine
from steeple.errors import ConfigError
from steeple.proof.config import ProofConfig
from steeple.proof.law import ExactLaw, exact_law
from steeple.proof.prompts import SHORTEST_SAMPLED, PromptPool, sampling_prompts
from steeple.proof.statistics import Fit, fit
from steeple.request import Request
from steeple.types import SamplingParams

TOKENS = 3
BLOCK = 4
AT_ONCE = 256
CANDIDATES = 6  # prompts tried for a law whose filters do not cut within rounding
ROUNDING = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}  # of a logit, from one batch to another

LEAST = 2e-3  # an unfiltered law has too many outcomes to count; those less likely are counted together

# Few outcomes, so that the samples suffice to see small errors in each.
CASES = {
    "temperature alone": SamplingParams(temperature=0.8),
    "top_k": SamplingParams(temperature=1.0, top_k=3),
    "filters and penalties": SamplingParams(
        temperature=1.2,
        top_k=4,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        # Negative: they favour what was just written, so that a token counted wrongly shows.
        presence_penalty=-2.0,
        frequency_penalty=-1.0,
    ),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, how it is sampled, and the exact law of what follows."""

    name: str
    params: SamplingParams
    prompt: list[int]
    law: ExactLaw


@dataclass(frozen=True, slots=True)
class CaseOutcome:
    """drafted: share of samples that a draft took part in; acceptance: share of drafted nodes that were kept."""

    case: Case
    fit: Fit
    drafted: float
    acceptance: float

    def as_dict(self, alpha: float) -> dict[str, Any]:
        """For JSON."""
        return {
            "case": self.case.name,
            **self.fit.as_dict(alpha),
            "outcomes": len(self.case.law.probabilities),
            "prompt_tokens": len(self.case.prompt),
            "stable": self.case.law.stable,
            "drafted": self.drafted,
            "acceptance": self.acceptance,
        }


def prepare_cases(config: ProofConfig, target: LoadedModel, pool: PromptPool) -> list[Case]:
    """The cases with their laws, the same for every drafter."""
    cases = []
    longest = target.decoder.config.max_context - TOKENS - config.k
    if longest < SHORTEST_SAMPLED:
        raise ConfigError(
            f"k = {config.k} leaves {longest} positions of the model's context for the prompt of the sampling proof, "
            f"which needs {SHORTEST_SAMPLED}; lower k."
        )
    for name, params in CASES.items():
        tried: list[Case] = []
        prompts = sampling_prompts(target, pool, params, BLOCK)
        for prompt in [p for p in prompts if len(p) <= longest][:CANDIDATES]:
            least = 0.0 if params.top_k else LEAST
            law = exact_law(target, prompt, params, TOKENS, rounding=ROUNDING[config.dtype], least=least)
            tried.append(Case(name, params, prompt, law))
            if law.stable:
                break
        cases.append(next((case for case in tried if case.law.stable), tried[0]))
    return cases


def prove_sampling(
    config: ProofConfig,
    target: LoadedModel,
    drafter: str,
    settings: EngineConfig,
    cases: Sequence[Case],
    told: Callable[[int], None],
) -> list[CaseOutcome]:
    """Sample every case with ``drafter`` and compare with its law. ``told(n)``: n samples done."""
    share = config.samples // len(cases)
    outcomes = []
    for number, case in enumerate(cases):
        told_share = partial(_add, told, share * number)
        outcomes.append(_sample(config, target, drafter, settings, case, share, told_share))
    return outcomes


def _add(told: Callable[[int], None], before: int, done: int) -> None:
    told(before + done)


def _sample(
    config: ProofConfig,
    target: LoadedModel,
    drafter: str,
    settings: EngineConfig,
    case: Case,
    samples: int,
    told: Callable[[int], None],
) -> CaseOutcome:
    at_once = min(AT_ONCE, samples)
    # All samples share the prompt's blocks; each has a few of its own for the last token, the output and the nodes.
    own = 3 + (TOKENS + config.k) // BLOCK
    kv_tokens = len(case.prompt) + BLOCK + at_once * own * BLOCK
    settings = replace(settings, block_size=BLOCK, kv_tokens=kv_tokens, batch_size=at_once)
    engine = build_engine(target, settings, drafter_config(drafter, k=config.k))
    # Never more nodes than tokens that are still compared: a function of the text's length, hence of the past.
    engine.budget = lambda request: max(0, min(config.k, TOKENS - request.written))
    seeds = iter(np.random.default_rng((config.seed, 1)).integers(2**62, size=samples + 1).tolist())
    params = replace(case.params, max_tokens=TOKENS + config.k, ignore_eos=True)
    counts: Counter[tuple[int, ...]] = Counter()
    drafted = nodes = accepted = 0
    left, running = samples, 0
    engine.add(Request("first", case.prompt, replace(params, seed=next(seeds))))
    while not engine.idle:  # to its end: then the others find the prompt's blocks, the drafter's own as well
        engine.step()
    while left or running:
        for _ in range(min(left, at_once - running)):
            engine.add(Request(f"sample-{left}", case.prompt, replace(params, seed=next(seeds))))
            left, running = left - 1, running + 1
        for committed in engine.step():
            request = committed.request
            if request.written < TOKENS:
                continue
            counts[case.law.outcome(tuple(request.output[:TOKENS].tolist()))] += 1
            drafted += request.stats.drafted > 0
            nodes += request.stats.drafted
            accepted += request.stats.accepted
            engine.abort(request.id)
            running -= 1
        told(samples - left - running)
    engine.check_integrity()
    found = fit(counts, case.law.probabilities, config.seed)
    return CaseOutcome(case, found, drafted / samples, accepted / nodes if nodes else 0.0)
