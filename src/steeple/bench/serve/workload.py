"""The prompts of a load test: whole lines of a file, or pieces of text of given lengths, new ones at every point."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steeple.bench.serve.load import WHOLE, Lengths
from steeple.errors import ConfigError
from steeple.evidence.prompts import Source
from steeple.plan.fleet.load import Floats

CHARACTERS = 4  # taken for a token where nobody can count tokens
SHIFT = 7  # once the text is through it is cut again, so many places further on: no prompt comes twice

Encode = Callable[[str], Awaitable[list[int]]]


@dataclass(frozen=True, slots=True)
class Call:
    """One request. ``at``: intended seconds after the start; ``prompt_tokens``: None where only the server can tell."""

    index: int
    at: float
    prompt: str | list[int]
    prompt_tokens: int | None
    max_tokens: int
    seed: int


class Text:
    """An endless stream of text, cut off piece by piece: token ids if somebody can encode, else characters.

    Args: source: texts, put in an order by the seed. encode: of the server. start: what stands before every prompt.
    """

    def __init__(self, source: Source, seed: int, encode: Encode | None = None, start: Sequence[int] = ()) -> None:
        order = np.random.default_rng((seed, 0)).permutation(len(source.texts))
        self._texts = [text for i in order if (text := source.texts[i])]
        if not self._texts:
            raise ConfigError(f"prompts: {source.name} holds no text; give another file.")
        self._encode, self._start = encode, list(start)
        self._place, self.rounds = 0, 0
        self._tokens: list[int] = []
        self._text = ""
        self._offset = 0

    @property
    def counts_tokens(self) -> bool:
        """Whether lengths are exact."""
        return self._encode is not None

    async def take(self, length: int) -> tuple[str | list[int], int | None]:
        """The next prompt of ``length`` tokens, and its length where it is certain."""
        if self._encode is None:
            return await self._characters(length * CHARACTERS), None
        body = max(1, length - len(self._start))
        while len(self._tokens) - self._offset < body:
            self._tokens = self._tokens[self._offset :] + self._shifted(await self._encode(self._next()))
            self._offset = 0
        piece = self._tokens[self._offset : self._offset + body]
        self._offset += body
        return [*self._start, *piece], len(self._start) + body

    async def _characters(self, length: int) -> str:
        while len(self._text) - self._offset < length:
            self._text = self._text[self._offset :] + self._shifted(self._next())
            self._offset = 0
        piece = self._text[self._offset : self._offset + length]
        self._offset += length
        return piece

    def _next(self) -> str:
        if self._place == len(self._texts):
            self._place, self.rounds = 0, self.rounds + 1
        self._place += 1
        return self._texts[self._place - 1]

    def _shifted(self, piece: Any) -> Any:
        skipped = self.rounds * SHIFT if self._place == 1 else 0
        return piece[skipped % max(len(piece), 1) :]


class Lines:
    """Whole prompts in the order of their file, from the beginning again when they are through."""

    def __init__(self, source: Source) -> None:
        self._texts, self._place = source.texts, 0
        if not self._texts:
            raise ConfigError(f"prompts: {source.name} holds no line; give another file.")

    @property
    def rounds(self) -> int:
        """How many times all of them have been sent."""
        return max(0, self._place - 1) // len(self._texts)

    async def take(self, _length: int) -> tuple[str | list[int], int | None]:
        """The next prompt, which has its own length."""
        self._place += 1
        return self._texts[(self._place - 1) % len(self._texts)], None


async def calls(times: Floats, wanted: Lengths, prompts: Text | Lines, seed: int) -> list[Call]:
    """Requests for these intended times, ready to be sent; they take the next prompts."""
    seeds = np.random.default_rng((seed, 2)).integers(2**31, size=len(times))
    found = []
    for index, at in enumerate(times):
        place = index % len(wanted.prompt)
        prompt, tokens = await prompts.take(wanted.prompt[place])
        found.append(Call(index, float(at), prompt, tokens, wanted.output[place], int(seeds[index])))
    return found


def is_whole(wanted: Lengths) -> bool:
    """Whether prompts are sent as they stand in their file."""
    return wanted.prompt[0] == WHOLE
