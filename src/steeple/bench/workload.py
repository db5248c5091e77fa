"""What the bench runs: its cells, the requests of each, and the order in which drafters take their turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from steeple.bench.config import BenchConfig
from steeple.errors import ConfigError
from steeple.evidence.prompts import PromptCutter
from steeple.request import Request
from steeple.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the comparison: ``batch`` requests with prompts of ``context`` tokens at ``temperature``."""

    batch: int
    context: int
    temperature: float


def cells(config: BenchConfig) -> list[Cell]:
    """All cells, batch by batch, then context, then temperature."""
    return [Cell(b, c, t) for b in config.batch for c in config.context for t in config.temperature]


def turns(methods: Sequence[str], repeat: int) -> Iterator[tuple[int, str]]:
    """``(repeat, method)``: every repeat runs every method once, starting one later each time.

    So a machine that slows down or warms up slows all methods alike.
    """
    for number in range(repeat):
        for place in range(len(methods)):
            yield number, methods[(number + place) % len(methods)]


class Workload:
    """The requests of every cell. Prompts of a larger batch begin with those of a smaller one.

    Raises:
        ConfigError: a cell does not fit into the model's context, or the text does not suffice.
    """

    def __init__(self, config: BenchConfig, cutter: PromptCutter, max_context: int) -> None:
        self._config = config
        for context in config.context:
            if context + config.max_tokens > max_context:
                raise ConfigError(
                    f"context {context} + max_tokens {config.max_tokens} exceed the model's context of {max_context}; "
                    "lower one of them."
                )
        self.prompts = {context: cutter.cut(context, max(config.batch)) for context in config.context}

    def requests(self, cell: Cell, *, count: int = 0, max_tokens: int = 0) -> list[Request]:
        """Fresh requests of ``cell``, always the same. Args: count, max_tokens: instead of the cell's own."""
        draws = np.random.default_rng((self._config.seed, cell.batch, cell.context)).integers(2**62, size=cell.batch)
        return [
            Request(
                f"{cell.context}-{index}",
                prompt,
                SamplingParams(
                    temperature=cell.temperature,
                    max_tokens=max_tokens or self._config.max_tokens,
                    ignore_eos=True,
                    seed=int(draws[index]),
                ),
            )
            for index, prompt in enumerate(self.prompts[cell.context][: count or cell.batch])
        ]

    def kv_tokens(self, block_size: int) -> int:
        """Positions of cache with which no cell ever has to preempt: a block to spare for each request."""
        longest = max(self._config.context) + self._config.max_tokens
        return max(self._config.batch) * (-(-longest // block_size) + 1) * block_size
