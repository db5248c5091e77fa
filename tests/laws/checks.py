"""The laws, as functions of a cell of the matrix. ``test_matrix`` demands that they hold, ``test_defects`` that they
fail where a defect was planted."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
from exact import Floats, check_sample, joint_law
from forests import Forced
from lab import CACHES, TARGET, Build, CacheKind, check_cache, make_engine, make_requests, run, tiny_decoder

from steeple.request import Request
from steeple.types import SamplingParams

LENGTHS = (1, 2, 5, 33, 9, 17, 3, 26)


def prompts(lengths: tuple[int, ...] = LENGTHS, vocab: int = 11) -> list[list[int]]:
    """Ragged prompts; the first tokens of the longer ones are the same, so that there is something to share."""
    numbers = np.random.default_rng(5)
    start = numbers.integers(vocab, size=16)
    out = []
    for length in lengths:
        text = numbers.integers(vocab, size=length)
        text[: min(16, length // 2 * 2)] = start[: min(16, length // 2 * 2)]
        out.append(text.tolist())
    return out


GREEDY = [SamplingParams(max_tokens=6 + 3 * i) for i in range(len(LENGTHS))]
GREEDY[5] = replace(GREEDY[5], repetition_penalty=1.3, frequency_penalty=0.2)
GREEDY[6] = replace(GREEDY[6], presence_penalty=0.7)


@functools.cache
def plain_outputs() -> list[list[int]]:
    """The truth of L1: every request alone, one token a step."""
    return [run(make_engine(), [request])[0] for request in make_requests(prompts(), GREEDY)]


def check_greedy(row: str | Build, cache: CacheKind) -> None:
    """L1: greedy output, ragged, chunked, joining and preempted, equals plain decoding of each request alone."""
    engine = make_engine(row, cache, batch_size=5, step_tokens=12)
    outputs = run(engine, make_requests(prompts(), GREEDY), join_every=1)
    for number, (found, expected) in enumerate(zip(outputs, plain_outputs(), strict=True)):
        assert found == expected, f"request {number} differs from plain decoding"


# Six tokens keep the enumeration of four small. Penalties of both signs, everything that truncates, all at once.
SMALL = tiny_decoder(3, vocab=6, sharpness=1.5)
SMALL_BAD = tiny_decoder(4, vocab=6, layers=1, hidden=8, sharpness=1.5)
PROMPT = [0, 3, 1, 1, 4]
PROCESSORS = {
    "temperature": SamplingParams(temperature=1.0),
    "hot_top_k": SamplingParams(temperature=1.4, top_k=4),
    "top_p": SamplingParams(temperature=0.8, top_p=0.85),
    "min_p": SamplingParams(temperature=1.2, min_p=0.15),
    "penalties": SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=-0.3),
    "everything": SamplingParams(
        temperature=1.3, top_k=5, top_p=0.95, min_p=0.05, repetition_penalty=0.8, frequency_penalty=0.5
    ),
}
ENUMERATED = 4
# So many that each planted defect of sampling is seen far beyond doubt.
SAMPLES = {"temperature": 3000}


@functools.cache
def exact_law(name: str) -> Floats:
    """The truth of L2."""
    return joint_law(SMALL, PROMPT, PROCESSORS[name], ENUMERATED)


def check_law(row: str, processors: tuple[str, ...] = tuple(PROCESSORS)) -> None:
    """L2: sampled output follows the target's exact law, all processors side by side in one batch."""
    names = [name for name in processors for _ in range(SAMPLES.get(name, 400))]
    each = [replace(PROCESSORS[name], max_tokens=ENUMERATED + 3, seed=i) for i, name in enumerate(names)]
    order = np.random.default_rng(0).permutation(len(each))
    requests = make_requests([PROMPT] * len(each), each)
    engine = make_engine(row, CacheKind(blocks=20_000, block_size=4), target=SMALL, bad=SMALL_BAD, batch_size=3000)
    run(engine, [requests[i] for i in order])
    for name in processors:
        outputs = [r.output.tolist() for r, own in zip(requests, names, strict=True) if own == name]
        check_sample(outputs, exact_law(name), f"{row}, {name}")


SAMPLED = [replace(list(PROCESSORS.values())[i % len(PROCESSORS)], max_tokens=4 + 2 * i) for i in range(len(LENGTHS))]


@functools.cache
def lone_outputs(row: str, block_size: int) -> list[list[int]]:
    """The truth of L3: each seeded request in an engine of its own. Windows are whole blocks, so their size matters."""
    requests = make_requests(prompts(), SAMPLED, seeds=True)
    cache = CacheKind(block_size=block_size, blocks=900)
    return [run(make_engine(row, cache), [request])[0] for request in requests]


def check_seeds(row: str, cache: CacheKind, *, join_every: int = 0, backwards: bool = False) -> int:
    """L3: same seed, same tokens, whatever the neighbours, order, joins, chunks, preemptions. Returns preemptions."""
    requests = make_requests(prompts(), SAMPLED, seeds=True)
    engine = make_engine(row, cache, batch_size=6, step_tokens=14)
    run(engine, requests[::-1] if backwards else requests, join_every=join_every)
    for request, expected in zip(requests, lone_outputs(row, cache.block_size), strict=True):
        assert request.output.tolist() == expected, f"{request.id} depends on its neighbours"
    return engine.stats.preemptions


def check_commits(cache: CacheKind, *, depth: int = 4, decoys: bool) -> set[int]:
    """L4: after every step the cache equals recomputation, refusals forced at each depth; returns these depths."""
    oracle = dict(enumerate(plain_outputs()))
    vocab = TARGET.config.vocab_size
    forced = Forced(vocab, depth, {f"r{i}": o for i, o in oracle.items()}, decoys=decoys)
    engine = make_engine(lambda around: forced, cache, batch_size=4, step_tokens=16)
    requests = make_requests(prompts(), GREEDY)
    follow(engine, requests)
    assert [r.output.tolist() for r in requests] == list(oracle.values())
    rates = engine.stats.speculation.acceptance_by_position
    assert len(rates) == depth, "the drafts never had their full depth"
    assert all(0 < rate < 1 for rate in rates), f"not every depth was kept sometimes and refused sometimes: {rates}"
    return forced.refused_at


def follow(engine: object, requests: list[Request]) -> None:
    """Run to the end and compare the cache with recomputation after every step."""
    for request in requests:
        engine.add(request)
    while not engine.idle:
        engine.step()
        check_cache(engine, requests)
    engine.check_integrity()


def check_cache_of(row: str | Build, cache: CacheKind = CACHES["paged"]) -> None:
    """L4 for any drafter, sampled, with whatever refusals come."""
    engine = make_engine(row, cache, batch_size=4, step_tokens=16)
    follow(engine, make_requests(prompts(), SAMPLED, seeds=True))
