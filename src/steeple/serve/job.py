"""One sequence on its way through the server: what it asks of the engine, and what the engine tells of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

from steeple.engine import Committed
from steeple.request import FinishReason, Request, TokenLogprob
from steeple.serve.errors import ApiError

PLAIN, ACCEPTED, RECOVERED, BONUS = "plain", "accepted", "recovered", "bonus"


class Round(NamedTuple):
    """What one step wrote: ``written`` tokens, of which ``accepted`` were drafted; the draft was ``depth`` deep.

    ``drafted``: nodes of the draft, 0 for plain decoding and for the step that ends a prompt.
    """

    written: int
    accepted: int
    depth: int
    drafted: int

    @property
    def origins(self) -> list[str]:
        """How each token came. The one behind a draft that was accepted to its end is a bonus."""
        last = PLAIN if not self.drafted else BONUS if self.accepted == self.depth else RECOVERED
        return [ACCEPTED] * self.accepted + [last] * (self.written - self.accepted)


@dataclass(frozen=True, slots=True)
class Update:
    """News of a job. ``text`` is what is certain since the last one; a job that does not stream gets one, at its end.

    ``pieces``: the text of each token, for those who want to know origins; a stop string may cut the text shorter.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    origins: tuple[str, ...] = ()
    pieces: tuple[str, ...] = ()
    finish: FinishReason | None = None
    error: ApiError | None = None

    @property
    def last(self) -> bool:
        return self.finish is not None


@dataclass(slots=True, eq=False)
class Job:
    """A request for the engine and who waits for it.

    Args:
        request: until the last update the engine's thread alone touches it.
        index: the number of its choice in the answer.
        tenant: whose turn it takes in the queue.
        deliver: called with job and update in ``loop``'s thread.
        deadline: in ``perf_counter`` seconds; then it is given up.
        nodes: most drafted nodes per round, None = what the server drafts.
        drafter: name under which its speculation is counted.
    """

    request: Request
    index: int
    tenant: str
    loop: asyncio.AbstractEventLoop
    deliver: Callable[[Job, Update], None]
    stream: bool = False
    origins: bool = False
    deadline: float | None = None
    nodes: int | None = None
    drafter: str = ""
    rounds: list[Round] = field(default_factory=list)
    heard: float = 0.0  # time of the last tokens
    admitted: float | None = None  # when it came into the engine
    times: list[float] = field(default_factory=list)  # of the rounds' ends, seconds from its arrival
    over: bool = False  # it has had its last update
    _sent: int = 0
    _pieces: Any = None
    _drafted: int = 0
    _accepted: int = 0
    _depth: int = 0

    @property
    def written(self) -> int:
        """Tokens of the output so far."""
        return self.request.written

    def advance(self, committed: Committed, tokenizer: Any) -> Update | None:
        """Note what a step wrote; the update for whoever waits, if there is one. For the engine's thread."""
        request, tokens, text = committed
        before = len(request.logprobs) - len(tokens)
        self.rounds.append(self._round(len(tokens)))
        if not self.stream and not request.finished:
            return None
        finish = request.finish_reason
        if not self.stream:
            whole = final_text(tokenizer, request, text.text if text is not None and text.stopped else None)
            return Update(text=whole, finish=finish)
        assert text is not None  # a job that streams was added with a text stream
        stopped = text.text if text.stopped else None
        whole = final_text(tokenizer, request, stopped) if request.finished else text.text
        end = len(whole) if request.finished else text.safe_length()
        start, self._sent = self._sent, max(self._sent, end)
        return Update(
            tokens=tokens,
            text=whole[start:end],
            logprobs=tuple(request.logprobs[before:]) if request.params.logprobs is not None else (),
            origins=tuple(self.rounds[-1].origins) if self.origins else (),
            pieces=self._cut(tokens, tokenizer) if self.origins else (),
            finish=finish,
        )

    def _round(self, written: int) -> Round:
        """The newest round, as the difference of what the request's statistics say now and said before."""
        stats = self.request.stats
        drafted = stats.drafted - self._drafted
        accepted = stats.accepted - self._accepted
        depth = sum(stats.proposed_at) - self._depth
        self._drafted, self._accepted, self._depth = stats.drafted, stats.accepted, self._depth + depth
        return Round(written, accepted, depth, drafted)

    def _cut(self, tokens: tuple[int, ...], tokenizer: Any) -> tuple[str, ...]:
        if self._pieces is None:
            self._pieces = DecodeStream(skip_special_tokens=True)
        return tuple(self._pieces.step(tokenizer.backend_tokenizer, token) or "" for token in tokens)


def final_text(tokenizer: Any, request: Request, stopped: str | None) -> str:
    """The text before a stop string, or all of it without the token that ended it; as ``LLM`` gives it."""
    if stopped is not None:
        return stopped
    output = request.output
    if request.finish_reason is FinishReason.STOP:
        output = output[:-1]
    return str(tokenizer.decode(output.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
