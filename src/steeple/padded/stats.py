"""What a padded generation did: seconds by part, rows per call, how often rows were grouped, moved or refilled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from steeple.request import SpeculationStats

PARTS = ("probe", "prefill", "draft", "verify", "judge", "align", "group", "join")


@dataclass(slots=True)
class PaddedStats:
    """Counts of one call of ``generate``.

    seconds     by part: ``align`` moves keys into a rectangle or together, ``group`` picks rows of equal length out of
                a pool and puts them back, ``join`` adds rows that were prefilled, ``judge`` is sampling and bookkeeping
    rounds      calls of the target that are no prefill; ``rows`` their rows together
    grouped     rounds whose rows were equally long, so that none was padded
    moved       rounds after (or before) which keys had to be moved; ``compactions`` those that closed holes
    refills     rows that were given to another prompt while neighbours were running
    slots, held cache slots that the target's rounds read, and those of them that hold a token
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    rounds: int = 0
    rows: int = 0
    committed: int = 0
    prefills: int = 0
    prompt_tokens: int = 0
    grouped: int = 0
    moved: int = 0
    compactions: int = 0
    refills: int = 0
    slots: int = 0
    held: int = 0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def mean_rows(self) -> float:
        """Requests per round."""
        return self.rows / self.rounds if self.rounds else 0.0

    @property
    def grouping_rate(self) -> float:
        """Share of the rounds whose rows were equally long."""
        return self.grouped / self.rounds if self.rounds else 0.0

    @property
    def waste(self) -> float:
        """Share of the slots that rounds read in vain: padding and holes."""
        return 1.0 - self.held / self.slots if self.slots else 0.0

    @property
    def total_seconds(self) -> float:
        """All parts together, without the probe."""
        return sum(seconds for part, seconds in self.seconds.items() if part != "probe")

    @contextmanager
    def timed(self, part: str, device: torch.device | None = None) -> Iterator[None]:
        """Add the time of a block to a part. A GPU is waited for, or its time would fall on whoever waits next."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds[part] += time.perf_counter() - start
