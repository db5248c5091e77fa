"""What is sent and when: points of the sweep, intended times of their requests, and lengths; all fixed before a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steeple.bench.serve.config import PROMPT_TOKENS, ServeBenchConfig
from steeple.evidence.lengths import draw_lengths
from steeple.plan.fleet.load import Floats, Load, poisson, read_trace

WHOLE = 0  # the length of a prompt that is sent as it stands in its file
SHORTEST = 8  # of drawn lengths


@dataclass(frozen=True, slots=True)
class Point:
    """A row of the result: intended seconds ``[N]`` after the start, and how many requests may be in flight (0: all).

    ``rate``: requests per second, inf = all at once; ``arrivals``: ``poisson``, ``trace`` or ``at once``.
    """

    rate: float
    limit: int
    arrivals: str
    times: Floats

    @property
    def label(self) -> str:
        pace = "all at once" if math.isinf(self.rate) else f"{self.rate:g} requests/s"
        return f"{pace}, at most {self.limit} in flight" if self.limit else pace


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt tokens (``WHOLE``: as in the file) and most output tokens of each request, the same at every point."""

    prompt: list[int]
    output: list[int]
    clipped: int = 0


def points(config: ServeBenchConfig) -> list[Point]:
    """Every rate with every limit. ``StorageError`` or ``ConfigError`` if the trace does not serve."""
    load = None if config.trace is None else read_trace(Path(config.trace)).first(config.requests)
    paces = [_pace(config, load, rate) for rate in config.rate or (None,)]
    return [Point(rate, limit, kind, times) for rate, kind, times in paces for limit in config.concurrency]


def _pace(config: ServeBenchConfig, load: Load | None, rate: float | None) -> tuple[float, str, Floats]:
    count = config.requests
    if rate is None and load is not None:
        times = load.arrival * config.time_scale
        return load.rate / config.time_scale, "trace", times
    if rate is None or math.isinf(rate):
        return math.inf, "at once", np.zeros(count)
    if load is not None:
        return rate, "trace", load.at_rate(rate).arrival
    # the same draws for every rate: the points differ in pace and in nothing else
    return rate, "poisson", poisson(rate, count, np.random.default_rng((config.seed, 1)))


def lengths(config: ServeBenchConfig, whole: bool) -> Lengths:
    """How long prompts and outputs are. Args: whole: prompts are lines of a file, if no length is asked for."""
    count = config.requests
    output = [config.max_tokens] * count
    if config.trace is not None:
        load = read_trace(Path(config.trace)).first(count)
        most = config.max_prompt or int(load.prompt.max())
        return Lengths(
            [int(length) for length in np.minimum(load.prompt, most)],
            [int(length) for length in np.minimum(load.output, config.max_tokens)],
            int((load.prompt > most).sum()),
        )
    if config.lengths:
        longest = config.prompt_tokens or PROMPT_TOKENS
        return Lengths(draw_lengths(config.lengths, count, longest, min(SHORTEST, longest), config.seed), output)
    fixed = config.prompt_tokens or (WHOLE if whole else PROMPT_TOKENS)
    return Lengths([fixed] * count, output)
