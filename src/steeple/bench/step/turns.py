"""Turns of a step bench: which cells fit, the engines that run them, and a few timed rounds of one cell at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from steeple.bench.step.config import StepConfig
from steeple.bench.step.parts import WatchedEngine
from steeple.bench.step.steady import FilledCache, ScriptConfig
from steeple.config import ModelConfig
from steeple.engine import EngineConfig, LoadedModel, build_engine
from steeple.errors import ConfigError, InternalError
from steeple.hardware import ReadProbe, available_memory
from steeple.request import Request
from steeple.types import SamplingParams

ROUNDS = 16  # most rounds of a turn: the text grows by one token in each, and is as long as asked in the middle
LEAST_ROUNDS = 2  # of a turn: one that nobody watches, one that is watched
TURN_SECONDS = 0.2  # short, because the machine's bandwidth is taken at its two ends
MEMORY_SHARE = 0.9  # of what is free; the rest is for activations
LOGIT_COPIES = 3  # float32: raw, processed, and as laws


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the result: ``rows`` rows of each of ``batch`` requests whose texts have ``context`` tokens."""

    batch: int
    context: int
    rows: int

    @property
    def label(self) -> str:
        return f"batch {self.batch}, context {self.context}, rows {self.rows}"


@dataclass(slots=True)
class Turn:
    """Some rounds of a cell, one after the other.

    seconds: rounds that nobody watched; parts: watched ones, seconds by part; lengths: mean length of the texts in each
    round; read_bytes_per_second: the machine's bandwidth right before and after.
    """

    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    read_bytes_per_second: float = 0.0

    @property
    def rounds(self) -> int:
        return len(self.seconds) + len(self.parts)

    @property
    def spent(self) -> float:
        return sum(self.seconds) + sum(sum(parts.values()) for parts in self.parts)


def cells(config: StepConfig) -> list[Cell]:
    """All cells, batch by batch, then context, then rows."""
    return [Cell(b, c, r) for b in config.batch for c in config.context for r in config.rows]


def check_context(config: StepConfig, model: str, shape: ModelConfig) -> None:
    """Raise ``ConfigError`` if ``model`` does not reach as far as the longest context."""
    longest = max(config.context)
    if longest > shape.max_context:
        raise ConfigError(
            f"StepConfig.context = {longest} exceeds the {shape.max_context} positions of {model}; "
            f"give at most {shape.max_context}."
        )
    most = max(config.rows)
    if shape.max_context < ROUNDS + most + 2:
        raise ConfigError(
            f"StepConfig.rows = {most} needs a model of {ROUNDS + most + 2} positions, but {model} has "
            f"{shape.max_context}; lower rows."
        )


def begin(cell: Cell, max_context: int) -> int:
    """Length of the prompt with which a turn begins; the middle of the turn is ``context``, if the model allows it."""
    return max(min(cell.context - ROUNDS // 2 - 1, max_context - ROUNDS - 1 - cell.rows), 1)


def limit(cell: Cell, max_context: int) -> int:
    """Most tokens that a request may hold at the end of a turn."""
    return begin(cell, max_context) + 1 + ROUNDS + cell.rows


class Steady:
    """The engines of one model, one for each number of rows, over one cache that holds the largest cell that fits.

    ``reason[cell]``: why a cell is left out; no cell is both there and in ``cells``.
    """

    def __init__(self, config: StepConfig, target: LoadedModel, probe: ReadProbe) -> None:
        self._config, self._target, self._probe = config, target, probe
        self._shape = target.decoder.config
        self._settings = EngineConfig(
            dtype=config.dtype,
            device=config.device,
            native=config.native,
            share_prefixes=False,
            batch_size=max(config.batch),
            step_tokens=max(2 * max(config.batch), 2048),
        )
        self.reason: dict[Cell, str] = {}
        self.cells = self._that_fit(cells(config))
        self._engines: dict[int, WatchedEngine] = {}
        if self.cells:
            cache = self._cache(max(self._blocks(cell) for cell in self.cells))
            self._engines = {rows: self._engine(rows, cache) for rows in {cell.rows for cell in self.cells}}

    def _that_fit(self, wanted: Sequence[Cell]) -> list[Cell]:
        free = int(available_memory(self._target.device) * MEMORY_SHARE)
        found = []
        for cell in wanted:
            needed = self._blocks(cell) * self._block_bytes
            needed += LOGIT_COPIES * 4 * cell.batch * cell.rows * self._shape.vocab_size
            if needed <= free:
                found.append(cell)
            else:
                self.reason[cell] = f"needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
        return found

    def _blocks(self, cell: Cell) -> int:
        """Blocks of the cell; one to spare for each request, which the scheduler keeps for it to grow into."""
        return cell.batch * (-(-limit(cell, self._shape.max_context) // self._settings.block_size) + 1)

    @property
    def _block_bytes(self) -> int:
        return self._shape.kv_elements_per_token * self._target.decoder.dtype.itemsize * self._settings.block_size

    def _cache(self, blocks: int) -> FilledCache:
        target = self._target
        return FilledCache(
            self._shape,
            blocks=blocks,
            block_size=self._settings.block_size,
            dtype=target.decoder.dtype,
            device=target.device,
            attention=target.attention,
            seed=self._config.seed,
        )

    def _engine(self, rows: int, cache: FilledCache) -> WatchedEngine:
        """The engine that ``build_engine`` makes, with the full cache instead of an empty one."""
        script = ScriptConfig(rows - 1, self._shape.vocab_size, self._config.seed) if rows > 1 else None
        settings = replace(self._settings, kv_tokens=self._settings.block_size)
        parts = build_engine(self._target, settings, script).parts
        return WatchedEngine(replace(parts, cache=cache, batch_size=self._settings.batch_size))

    def turn(self, cell: Cell, rounds: int) -> Turn:
        """Time at most ``rounds`` rounds of ``cell``, every second one watched."""
        engine = self._engines[cell.rows]
        requests = self._requests(cell)
        for request in requests:
            engine.add(request)
        engine.step()  # joins all requests: each computes the one token that its cache does not hold
        if not all(request.ready for request in requests):
            raise InternalError(f"{cell.label}: not all requests decode")
        turn = Turn()
        before = self._probe.now()
        engine.step()  # the probe has emptied the processor's caches
        while turn.rounds < rounds and all(r.limit - len(r) >= cell.rows for r in requests):
            turn.lengths.append(float(np.mean([len(request) for request in requests])))
            if turn.rounds % 2:
                turn.parts.append(engine.watched_step())
            else:
                turn.seconds.append(engine.timed_step())
        turn.read_bytes_per_second = (before + self._probe.now()) / 2
        self._check(cell, requests, turn.rounds + 1)
        for request in requests:
            engine.abort(request.id)
        return turn

    def _check(self, cell: Cell, requests: Sequence[Request], rounds: int) -> None:
        drafted = {request.stats.drafted for request in requests}
        if any(request.error for request in requests) or drafted != {rounds * (cell.rows - 1)}:
            raise InternalError(f"{cell.label}: {rounds} rounds drafted {sorted(drafted)} nodes per request")

    def _requests(self, cell: Cell) -> list[Request]:
        """Fresh requests with texts of random tokens, always the same."""
        length, most = begin(cell, self._shape.max_context), limit(cell, self._shape.max_context)
        numbers = np.random.default_rng((self._config.seed, cell.batch, cell.context))
        texts = numbers.integers(self._shape.vocab_size, size=(cell.batch, length))
        return [
            Request(
                f"step-{index}",
                text,
                SamplingParams(
                    temperature=self._config.temperature, max_tokens=most - length, ignore_eos=True, seed=index
                ),
            )
            for index, text in enumerate(texts.tolist())
        ]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not in the middle of a round: a collection takes as long as many of them."""
    gc.collect()
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
