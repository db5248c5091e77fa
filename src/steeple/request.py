"""A request: its text and two counters. Everything else about it is derived or bookkeeping for people."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from steeple.errors import InternalError
from steeple.types import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


class FinishReason(StrEnum):
    """Why a request ended. The values are OpenAI's where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(slots=True)
class SpeculationStats:
    """What speculation did for one request, counted per verification round.

    ``accepted_at[j]`` and ``proposed_at[j]``: rounds in which a node at depth j was accepted, or proposed.
    """

    rounds: int = 0
    committed: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    proposed_at: list[int] = field(default_factory=list)

    def record(self, proposed_depth: int, drafted: int, accepted: int) -> None:
        """One round: the draft was ``proposed_depth`` deep with ``drafted`` nodes, ``accepted`` of them were kept."""
        self.rounds += 1
        if not drafted:
            return
        missing = proposed_depth - len(self.accepted_at)
        self.accepted_at.extend([0] * missing)
        self.proposed_at.extend([0] * missing)
        for depth in range(proposed_depth):
            self.proposed_at[depth] += 1
        for depth in range(accepted):
            self.accepted_at[depth] += 1
        self.drafted += drafted
        self.accepted += accepted

    def merge(self, other: SpeculationStats) -> None:
        """Add another request's counts."""
        missing = len(other.accepted_at) - len(self.accepted_at)
        self.accepted_at.extend([0] * missing)
        self.proposed_at.extend([0] * missing)
        for depth, (kept, proposed) in enumerate(zip(other.accepted_at, other.proposed_at, strict=True)):
            self.accepted_at[depth] += kept
            self.proposed_at[depth] += proposed
        self.rounds += other.rounds
        self.committed += other.committed
        self.drafted += other.drafted
        self.accepted += other.accepted

    @property
    def tau(self) -> float:
        """Committed tokens per target pass."""
        return self.committed / self.rounds if self.rounds else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of all rounds in which the node at each depth was accepted (unconditional)."""
        return [kept / self.rounds for kept in self.accepted_at] if self.rounds else []


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the unprocessed target, and the likeliest tokens with theirs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Constraint(Protocol):
    """What else shapes the law of one request: biases, a grammar. It depends on the request's text alone."""

    def shape(self, request: Request, logits_RV: Tensor, paths: Sequence[Sequence[int]]) -> None:
        """Change float32 logits of the unprocessed target in place, before penalties and temperature.

        Row i is predicted after the request's text and the drafted tokens ``paths[i]`` behind it; the first row's path
        is empty. A row behind a path that cannot be must stay a law (not all -inf); it is never drawn from.
        """
        ...


class Request:
    """One sequence on its way through the engine.

    Law: ``cached <= len(tokens) - 1``, with equality between steps once the prompt is in. ``cached`` counts the
    tokens whose keys and values the target's cache holds; the newest token (the root) never has any.
    """

    def __init__(self, id: str, prompt: Sequence[int], params: SamplingParams) -> None:
        self.id = id
        self.params = params
        self.constraint: Constraint | None = None
        self.prompt_len = len(prompt)
        self.cached = 0
        self.limit = len(prompt) + params.max_tokens  # most tokens of the text; the engine's context may lower it
        self.stops = frozenset(params.stop_token_ids)  # tokens that end the text; the engine adds the model's own
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.arrived = time.perf_counter()
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.stats = SpeculationStats()
        self.logprobs: list[TokenLogprob] = []
        self.preemptions = 0
        self._buffer: NDArray[np.int64] = np.zeros(len(prompt) + min(params.max_tokens, 256), dtype=np.int64)
        self._buffer[: len(prompt)] = prompt
        self._length = len(prompt)

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Prompt and output so far; a view, not to be kept over an ``append``."""
        return self._buffer[: self._length]

    @property
    def output(self) -> NDArray[np.int64]:
        """Tokens written so far."""
        return self._buffer[self.prompt_len : self._length]

    @property
    def newest(self) -> np.int64:
        """The last token: the root of the next draft."""
        return self._buffer[self._length - 1]

    @property
    def written(self) -> int:
        """Number of tokens written so far."""
        return self._length - self.prompt_len

    @property
    def ready(self) -> bool:
        """Between two rounds: something is written and only the root awaits its forward. Then it may be drafted for.

        The first token never follows a draft, and a preempted request becomes ready before it goes on. So what is
        drawn does not depend on the chunks, shared prefixes and preemptions that the neighbours caused.
        """
        return self.prompt_len <= self.cached == self._length - 1

    @property
    def unread(self) -> int:
        """Tokens to compute before the next round: the whole prompt, or after a preemption all but the root."""
        return self._length - self.cached - (1 if self.written else 0)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, tokens: Sequence[int]) -> None:
        """Commit tokens to the text."""
        end = self._length + len(tokens)
        if end > self._buffer.shape[0]:
            self._buffer = np.concatenate((self._buffer, np.zeros(max(end, 256), dtype=np.int64)))
        if len(tokens) == 1:  # a slice would take three times as long
            self._buffer[self._length] = tokens[0]
        else:
            self._buffer[self._length : end] = tokens
        self._length = end

    def check(self) -> None:
        """Raise ``InternalError`` if the law of the two counters is broken."""
        if not 0 <= self.cached < max(self._length, 1):
            raise InternalError(f"request {self.id}: cached = {self.cached} with {self._length} tokens")

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the request; later calls change nothing."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.finished_at = time.perf_counter()
