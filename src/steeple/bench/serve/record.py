"""What became of one request: when it was meant, sent, heard of and over, and how it failed if it did.

Glossary. *Intended*: when the schedule wanted it sent; *dispatched*: when the generator got to it; *sent*: when it went
out, after waiting for a place among those in flight. *Chunk*: an event of the stream that brought text, or whose
running count of tokens grew. All times are seconds of the event loop's clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DONE = "[DONE]"
TIMEOUT, CONNECT, BROKEN, MALFORMED, SERVER = (
    "timeout", "no connection", "broken stream", "malformed stream", "error in stream",
)  # fmt: skip
MESSAGE = 300  # characters of an answer that are kept
TEXTS = ("content", "reasoning_content", "reasoning")  # of a chat's delta


class Failed(Exception):
    """A request that failed. Args: kind, of few; message, of many."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message[:MESSAGE]


@dataclass(slots=True)
class Record:
    """One request. ``heard``: time of every chunk; ``counts``: tokens written by then, None where nobody said.

    ``output_tokens``: by the server's usage, None without one. ``error``: a kind, empty = it ended well.
    """

    index: int
    intended: float
    dispatched: float = 0.0
    sent: float = 0.0
    ended: float = 0.0
    heard: list[float] = field(default_factory=list)
    counts: list[int | None] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    speculation: Mapping[str, Any] | None = None
    error: str = ""
    message: str = ""
    finished: bool = False
    done: bool = False

    @property
    def tokens(self) -> int:
        """Output tokens; chunks, where the server does not count."""
        return len(self.heard) if self.output_tokens is None else self.output_tokens

    def ttft(self, *, from_send: bool = False) -> float:
        """Seconds to the first chunk, since the intended time, or since the request was sent."""
        return self.heard[0] - (self.sent if from_send else self.intended)

    def e2e(self, *, from_send: bool = False) -> float:
        """Seconds to the end."""
        return self.ended - (self.sent if from_send else self.intended)

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None if there is only one."""
        return (self.ended - self.heard[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk and the next."""
        return [after - before for before, after in zip(self.heard, self.heard[1:], strict=False)]

    @property
    def token_gaps(self) -> list[float] | None:
        """The gap before each chunk in equal shares to its tokens; None unless the server counted at every chunk."""
        if None in self.counts:
            return None
        shares: list[float] = []
        known = [count for count in self.counts if count is not None]
        waited = 0.0
        for gap, before, after in zip(self.gaps, known, known[1:], strict=False):
            waited += gap  # text without a new token is part of the wait for the next one
            if after > before:
                shares += [waited / (after - before)] * (after - before)
                waited = 0.0
        return shares

    def take(self, data: str, now: float) -> None:
        """An event of the stream, heard at ``now``. ``Failed`` if it is an error or makes no sense."""
        if data.strip() == DONE:
            self.done = True
            return
        try:
            self._take(json.loads(data), now)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise Failed(MALFORMED, f"{type(error).__name__}: {error}; in {data}") from error

    def _take(self, event: Mapping[str, Any], now: float) -> None:
        if event.get("error"):
            error = event["error"]
            raise Failed(SERVER, str(error.get("message", error) if isinstance(error, dict) else error))
        usage = event.get("usage") or {}
        running = usage.get("completion_tokens")
        if usage:
            self.output_tokens = int(running) if running is not None else self.output_tokens
            self.prompt_tokens = int(usage["prompt_tokens"]) if "prompt_tokens" in usage else self.prompt_tokens
        metrics = event.get("metrics") or {}
        self.speculation = metrics.get("speculative_decoding", self.speculation)
        for choice in event.get("choices") or ():
            self._choice(choice, running, now)

    def _choice(self, choice: Mapping[str, Any], running: int | None, now: float) -> None:
        delta = choice.get("delta") or {}
        text = choice.get("text") or any(delta.get(name) for name in TEXTS)
        last = self.counts[-1] if self.counts else 0
        opening = "role" in delta and not text  # of a chat; it may come before any token
        grew = running is not None and last is not None and running > last and not opening
        over = bool(choice.get("finish_reason"))
        # an answer of nothing but the end has its first token when it ends
        if text or grew or (over and not self.heard):
            self.heard.append(now)
            self.counts.append(running)
        self.finished |= over
        if self.heard:
            self.ended = now

    def fail(self, kind: str, message: str, now: float) -> None:
        """The request is over, and not well."""
        self.error, self.message, self.ended = kind, message[:MESSAGE], now

    def check(self) -> None:
        """After the end of the response. ``Failed`` if it is not whole."""
        if not self.done:
            raise Failed(BROKEN, f"the stream ended without {DONE}, after {len(self.heard)} chunks")
        if not self.heard:
            raise Failed(BROKEN, "the stream ended without text and without a reason")

    def shown(self, start: float) -> dict[str, Any]:
        """Everything but the text, in JSON types; seconds since ``start``."""
        return {
            "index": self.index,
            "intended": self.intended - start,
            "dispatched": self.dispatched - start,
            "sent": self.sent - start,
            "ended": self.ended - start,
            "chunks": [at - start for at in self.heard],
            "counts": self.counts,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.tokens,
            "speculation": self.speculation,
            "error": self.error or None,
            "message": self.message or None,
        }
