"""Rounds of the engine, a few at a time: what a calibration measures, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import numpy as np

from steeple.bench.calibrate.config import CalibrateConfig
from steeple.bench.calibrate.models import DraftKind, drafts_of, load
from steeple.bench.step.parts import WatchedEngine
from steeple.bench.step.steady import FilledCache, ScriptConfig
from steeple.engine import Engine, EngineConfig, LoadedModel, build_engine
from steeple.engine.stats import EngineStats
from steeple.errors import CapacityError, InternalError
from steeple.hardware import ReadProbe, available_memory
from steeple.request import Request
from steeple.types import SamplingParams

ROUNDS = 12  # most rounds of a visit
LEAST_ROUNDS = 3
VISIT_SECONDS = 0.05
DRAFT_POSITIONS = 4  # drafts are measured at so many times fewer positions: their windows are short
DRAFT_CONTEXTS = 2  # and at so many of the contexts, the shortest
MEMORY_SHARE = 0.5  # of what is free
SPARE = 4  # positions of a request beyond what its rounds write


@dataclass(frozen=True, slots=True)
class Place:
    """One kind of round: ``draft`` numbers the drafts of a model, -1 = none, the step verifies a script."""

    batch: int
    context: int
    k: int
    temperature: float
    draft: int = -1


@dataclass(frozen=True, slots=True)
class Visit:
    """Some rounds of a place: medians in seconds, the mean length of the texts, the memory's speed beside them.

    attention, linear: seconds within the forward of one watched round, where they can be told; else 0.
    """

    place: Place
    step: float
    draft: float
    context: float
    read_bytes_per_second: float
    attention: float = 0.0
    linear: float = 0.0


def places(config: CalibrateConfig, drafts: int, max_context: int) -> list[Place]:
    """All places of a model, in the order in which they are visited: shuffled, always the same.

    Beyond the first temperature only drawing costs more, so the others are measured at the shortest context alone.
    """
    found: list[Place] = []
    contexts = sorted(context for context in config.context if context + _grown(config) <= max_context)
    greedy = config.temperature[0]
    for batch, context in itertools.product(config.batch, contexts):
        if batch * context <= config.positions:
            found += [Place(batch, context, k, greedy) for k in config.ks]
        if batch * context * DRAFT_POSITIONS <= config.positions and context in contexts[:DRAFT_CONTEXTS]:
            found += [Place(batch, context, k, greedy, draft) for draft in range(drafts) for k in config.draft_ks]
    for batch, temperature in itertools.product(config.batch, config.temperature[1:]):
        found += [Place(batch, context, k, temperature) for context in contexts[:1] for k in _ends(config.ks)]
        found += [
            Place(batch, context, max(config.draft_ks), temperature, draft)
            for context in contexts[:1]
            for draft in range(drafts)
        ]
    order = np.random.default_rng(config.seed).permutation(len(found))
    return [found[index] for index in order]


def _ends(ks: Sequence[int]) -> list[int]:
    """The smallest and the largest."""
    return sorted({min(ks), max(ks)})


def _grown(config: CalibrateConfig) -> int:
    """Positions that a request may write during a visit."""
    return (ROUNDS + 2) * (1 + max(*config.ks, *config.draft_ks)) + SPARE


@dataclass(slots=True)
class Subject:
    """A model under measurement: its engines share a cache that is full already."""

    name: str
    target: LoadedModel
    kinds: tuple[DraftKind, ...]
    places: list[Place]
    engines: dict[int, Engine]
    visits: list[Visit] = field(default_factory=list)


def subject(name: str, config: CalibrateConfig) -> Subject:
    """Load a model, fill a cache for its largest place and build its engines.

    Raises:
        CapacityError: the cache is more than half of the free memory.
    """
    settings = EngineConfig(
        dtype=config.dtype,
        device=config.device,
        native=config.native,
        threads=config.threads,
        share_prefixes=False,
        batch_size=max(config.batch),
        step_tokens=max(2 * max(config.batch), 2048),
    )
    target = load(name, config, settings)
    shape = target.decoder.config
    kinds = drafts_of(shape)
    found = places(config, len(kinds), shape.max_context)
    size = settings.block_size
    blocks = max((place.batch * (-(-(place.context + _grown(config)) // size) + 1) for place in found), default=0)
    needed = blocks * size * shape.kv_elements_per_token * target.decoder.dtype.itemsize
    free = int(available_memory(target.device) * MEMORY_SHARE)
    if not found or needed > free:
        raise CapacityError(
            f"calibrating with {name} takes {needed / 2**20:.0f} MiB of keys, {free / 2**20:.0f} MiB may be used, and "
            f"its texts reach {shape.max_context} positions; lower --positions or --context."
        )
    cache = FilledCache(
        shape,
        blocks=blocks,
        block_size=size,
        dtype=target.decoder.dtype,
        device=target.device,
        attention=target.attention,
        seed=config.seed,
    )
    script = ScriptConfig(max(1, *config.ks), shape.vocab_size, config.seed)
    engines: dict[int, Engine] = {-1: WatchedEngine(build_engine(target, settings, script, cache).parts)}
    for number, kind in enumerate(kinds):
        engines[number] = build_engine(target, settings, kind.settings(max(config.draft_ks), config.seed), cache)
    return Subject(name, target, kinds, found, engines)


def visit(own: Subject, place: Place, probe: ReadProbe, seed: int) -> Visit:
    """Time some rounds of ``place``; those that join the requests and the first one do not count."""
    engine = own.engines[place.draft]
    engine.budget = lambda _request: place.k
    requests = _requests(place, own.target.decoder.config.vocab_size, seed)
    for request in requests:
        engine.add(request)
    engine.step()  # joins all requests: each computes the one token that its cache does not hold
    if not all(request.ready for request in requests):
        raise InternalError(f"calibration, {place}: not all requests decode")
    before = probe.now()
    engine.step()  # the probe has emptied the processor's caches
    steps: list[float] = []
    drafts: list[float] = []
    lengths: list[float] = []
    while len(steps) < ROUNDS and (len(steps) < LEAST_ROUNDS or sum(steps) + sum(drafts) < VISIT_SECONDS):
        lengths.append(fmean(len(request) for request in requests))
        engine.stats = EngineStats()
        engine.step()
        drafts.append(engine.stats.draft_seconds)
        steps.append(engine.stats.verify_seconds + engine.stats.other_seconds)
    parts = engine.watched_step() if isinstance(engine, WatchedEngine) else {}
    after = probe.now()
    for request in requests:
        if request.error is not None:
            raise InternalError(f"calibration, {place}: {request.error}")
        engine.abort(request.id)
    # drawing and judging begin before the draft's stopwatch ends: a script's own draft is part of the step
    scripted = place.draft < 0
    return Visit(
        place,
        median(a + b for a, b in zip(steps, drafts, strict=True)) if scripted else median(steps),
        0.0 if scripted else median(drafts),
        fmean(lengths),
        (before + after) / 2,
        parts.get("attention", 0.0),
        parts.get("linear", 0.0),
    )


def _requests(place: Place, vocab: int, seed: int) -> Sequence[Request]:
    """Fresh requests with texts of random tokens, always the same."""
    numbers = np.random.default_rng((seed, place.batch, place.context))
    texts = numbers.integers(vocab, size=(place.batch, place.context))
    most = (ROUNDS + 2) * (1 + place.k) + SPARE
    params = [
        SamplingParams(temperature=place.temperature, max_tokens=most, ignore_eos=True, seed=index)
        for index in range(place.batch)
    ]
    return [Request(f"calibrate-{index}", text, params[index]) for index, text in enumerate(texts.tolist())]
