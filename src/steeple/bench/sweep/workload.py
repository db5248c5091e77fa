"""What a sweep runs: its cells in the order that shares most prompts, and the requests of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steeple.bench.sweep.config import SweepConfig
from steeple.errors import ConfigError
from steeple.evidence.lengths import draw_lengths
from steeple.evidence.prompts import PromptCutter
from steeple.request import Request
from steeple.types import SamplingParams

MIXED = 0  # the context of a cell whose requests have lengths of their own
SHORTEST = 16


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the comparison: ``batch`` requests, prompts of ``context`` tokens (0: mixed), ``temperature``."""

    batch: int
    context: int
    temperature: float

    @property
    def label(self) -> str:
        context = "mixed contexts" if self.context == MIXED else f"context {self.context}"
        return f"batch {self.batch}, {context}, T {self.temperature:g}"


def cells(config: SweepConfig) -> list[Cell]:
    """Small batches first, then short contexts: the prompts of a cell begin with those of the cells before it."""
    contexts = (MIXED,) if config.mixed else sorted(config.context)
    return [Cell(b, c, t) for b in sorted(config.batch) for c in contexts for t in config.temperature]


class Workload:
    """The requests of every cell: beginnings of the same texts, as many texts as the largest batch has requests.

    Repeats of a smaller batch take the next texts, so that tau does not hang on a few of them.

    Raises:
        ConfigError: a cell does not fit into the model's context, or the text does not suffice.
    """

    def __init__(self, config: SweepConfig, cutter: PromptCutter, max_context: int) -> None:
        self._config, self._max_context = config, max_context
        room = max_context - config.max_tokens
        longest = room if config.mixed else max(config.context)
        if longest > room or (config.mixed and longest <= SHORTEST):
            raise ConfigError(
                f"context {longest} + max_tokens {config.max_tokens} do not fit into the model's context of "
                f"{max_context}; lower one of them."
            )
        count = max(config.batch)
        lengths = [longest] * count
        if config.mixed:
            lengths = draw_lengths(config.trace, count, longest, SHORTEST, config.seed)
        self._texts = [text[:length] for text, length in zip(cutter.cut(longest, count), lengths, strict=True)]

    def prompts(self, cell: Cell, repeat: int) -> list[list[int]]:
        """The prompts of ``cell`` in its ``repeat``-th turn."""
        places = [(repeat * cell.batch + index) % len(self._texts) for index in range(cell.batch)]
        return [self._texts[place][: cell.context or None] for place in places]

    def requests(self, cell: Cell, repeat: int, max_tokens: int = 0) -> list[Request]:
        """Fresh requests, always the same for ``cell`` and ``repeat``.

        They may write as much as the model's context holds, or ``max_tokens``; the run decides when they end.
        """
        key = (self._config.seed, cell.batch, cell.context, repeat)
        draws = np.random.default_rng(key).integers(2**62, size=cell.batch)
        return [
            Request(
                f"{cell.context}-{repeat}-{index}",
                prompt,
                SamplingParams(
                    temperature=cell.temperature,
                    max_tokens=max_tokens or self._max_context - len(prompt),
                    ignore_eos=True,
                    seed=int(draws[index]),
                ),
            )
            for index, prompt in enumerate(self.prompts(cell, repeat))
        ]

    def kv_tokens(self, block_size: int) -> int:
        """Positions of cache with which prompts stay and nobody is preempted.

        What a run writes is remembered after it as well; the second half of the room behind the prompts lets the text
        of older runs give way instead of prompts. A request that may fill the model's context must fit alone, too.
        """
        written = self._config.max_tokens + max(self._config.ks) + 1
        alone = cache_positions([self._max_context], 0, block_size)
        return max(cache_positions(map(len, self._texts), written, block_size, spare=2), alone)


def cache_positions(lengths: Sequence[int] | map[int], written: int, block_size: int, spare: int = 1) -> int:
    """Positions for prompts of ``lengths`` with ``spare`` times the room for ``written`` tokens behind each."""
    behind = -(-written // block_size) + 1
    return sum(-(-length // block_size) + spare * behind for length in lengths) * block_size


def spread_of(lengths: Sequence[int]) -> dict[str, float]:
    """Least, median, mean and most of some context lengths."""
    return {
        "min": min(lengths),
        "median": float(np.median(lengths)),
        "mean": float(np.mean(lengths)),
        "max": max(lengths),
    }
