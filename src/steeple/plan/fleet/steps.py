"""How long a step takes, as the simulation asks for it: a protocol, a linear model, and a table of either."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from steeple.errors import ConfigError

CONTEXT_RATIO = 2**0.25
PROMPT_RATIO = 2**0.5
FIRST_CONTEXT = 256
Amount = TypeVar("Amount", float, NDArray[np.float64])
Segment = tuple[float, float, float, float]


class StepTime(Protocol):
    """A model of the time of one step of one replica."""

    def seconds(
        self, prompt_tokens: float, decode_requests: int, context_tokens: Amount, rows_per_request: int
    ) -> Amount:
        """Seconds of a step.

        Args:
            prompt_tokens: tokens of prompts that the step reads.
            decode_requests: requests that decode in it.
            context_tokens: cached positions of all requests in the step together, before it; a number, or an array
                of which each element is a step.
            rows_per_request: rows of each decoding request: 1, or the draft's depth and one.
        """
        ...


class DraftTime(Protocol):
    """A model of the time that drafting takes in one step of one replica."""

    def seconds(self, decode_requests: int, context_tokens: Amount) -> Amount:
        """Seconds of drafting for ``decode_requests`` requests with so many cached positions together."""
        ...


@dataclass(frozen=True, kw_only=True)
class LinearStep:
    """A step time that is linear in what is in it (the form of SmartSpec, arXiv 2406.14066). All terms in seconds.

    Attributes:
        fixed: of every step.
        per_token: for each prompt token and each row of a decoding request.
        per_request: for each decoding request.
        per_context: for each cached position.
    """

    fixed: float
    per_token: float = 0.0
    per_request: float = 0.0
    per_context: float = 0.0

    def seconds(
        self, prompt_tokens: float, decode_requests: int, context_tokens: Amount, rows_per_request: int
    ) -> Amount:
        """Seconds of a step; see ``StepTime``."""
        tokens = prompt_tokens + decode_requests * rows_per_request
        return (
            self.fixed
            + self.per_token * tokens
            + self.per_request * decode_requests
            + self.per_context * context_tokens
        )


class NoDraft:
    """Drafting that costs nothing."""

    def seconds(self, decode_requests: int, context_tokens: Amount) -> Amount:
        """Zero."""
        del decode_requests
        return context_tokens * 0.0


@dataclass(frozen=True)
class ShareOfStep:
    """Drafting that takes ``share`` of the time of a plain decoding step of the same batch."""

    step: StepTime
    share: float

    def seconds(self, decode_requests: int, context_tokens: Amount) -> Amount:
        """Seconds of drafting; see ``DraftTime``."""
        return self.share * self.step.seconds(0, decode_requests, context_tokens, 1)


class StepTable:
    """Verification and drafting of a step, tabulated: exact in the requests, linear between nodes elsewhere.

    A model may take as long as it likes: it is asked once per node, and only for batches that occur. Nodes of context
    are a factor ``CONTEXT_RATIO`` apart and those of prompt tokens ``PROMPT_RATIO``; a model that is linear in both
    is reproduced exactly. Beyond the last node the last stretch goes on.

    Args:
        rows: of each decoding request. most_context: positions that a replica holds. chunk: prompt tokens of a step.
    """

    def __init__(self, step: StepTime, draft: DraftTime, *, rows: int, most_context: float, chunk: int) -> None:
        self.step, self.draft, self.rows = step, draft, rows
        self.contexts = _nodes(FIRST_CONTEXT, most_context, CONTEXT_RATIO)
        self.prompts = [float(p) for p in dict.fromkeys(np.rint(_nodes(1, chunk, PROMPT_RATIO)).astype(int).tolist())]
        self._known: dict[tuple[int, int], list[Segment]] = {}

    def segment(self, requests: int, context: float, prompt: int = 0) -> Segment:
        """``(seconds at low, seconds per position, low, high)`` of the stretch that ``context`` lies in.

        ``prompt`` is the number of a node of prompt tokens.
        """
        found = self._known.get((requests, prompt))
        if found is None:
            found = self._known[requests, prompt] = self._ask(requests, self.prompts[prompt])
        return found[bisect_right(self.contexts, context) - 1]

    def mixed(self, prompt_tokens: float, requests: int, context: float) -> float:
        """Seconds of a step with prompt tokens in it."""
        place = min(max(bisect_right(self.prompts, prompt_tokens) - 1, 0), len(self.prompts) - 2)
        low, high = self.prompts[place], self.prompts[place + 1]
        seconds, slope, start, _ = self.segment(requests, context, place)
        below = seconds + slope * (context - start)
        seconds, slope, start, _ = self.segment(requests, context, place + 1)
        above = seconds + slope * (context - start)
        return below + (above - below) * (prompt_tokens - low) / (high - low)

    def _ask(self, requests: int, prompt: float) -> list[Segment]:
        """The stretches of one row of the table."""
        contexts = np.array(self.contexts)
        seconds = self.step.seconds(prompt, requests, contexts, self.rows)
        if requests:
            seconds = seconds + self.draft.seconds(requests, contexts)
        values: list[float] = seconds.tolist()
        if not all(0.0 < v < float("inf") for v in values):
            raise ConfigError(
                f"StepTime gives {min(values)} to {max(values)} seconds for {prompt:g} prompt tokens and {requests} "
                "requests; a step takes a time above 0."
            )
        found: list[Segment] = []
        for i in range(len(values) - 1):
            low, high = self.contexts[i], self.contexts[i + 1]
            found.append((values[i], (values[i + 1] - values[i]) / (high - low), low, high))
        found[-1] = (*found[-1][:3], float("inf"))
        found.append(found[-1])  # for a context at the last node or beyond
        return found


def _nodes(first: float, last: float, ratio: float) -> list[float]:
    """0, and from ``first`` to at least ``last`` in steps of ``ratio``."""
    count = max(1, int(np.ceil(np.log(max(last / first, 1.0)) / np.log(ratio))))
    return [0.0, *(float(first * ratio**i) for i in range(count + 1))]
