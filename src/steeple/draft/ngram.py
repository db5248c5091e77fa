"""Prompt lookup: what followed the last time the text ended like this is proposed again.

Source: prompt lookup decoding (Saxena 2023), as in LLMA (Yang et al. 2023, arXiv 2304.04487), over prompt and output.
Cost: one hash lookup per committed token, no forward. Loses where the text does not repeat: then the target verifies
nodes for nothing, which costs where verification is bound by arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from steeple.cache.paged import PagedCache
from steeple.config import check_range
from steeple.draft.base import Drafter, Needs, Surroundings, chains
from steeple.errors import ConfigError, InternalError
from steeple.model.decoder import Hidden
from steeple.plan.memory_parts import DraftMemory, Lay
from steeple.request import Request
from steeple.types import MAX_NODES, Batch, Draft

ENTRY_BYTES = 224  # of a key of bytes, its position, and their place in a dictionary, while that grows


@dataclass(frozen=True, kw_only=True)
class NGramConfig:
    """Settings of prompt lookup.

    Fields: k nodes per round; the longest suffix of ``max_match`` down to ``min_match`` tokens that occurred before
    decides, its latest occurrence first.
    """

    k: int = field(default=4, metadata={"help": "nodes per round"})
    min_match: int = field(default=2, metadata={"help": "shortest suffix to look up"})
    max_match: int = field(default=4, metadata={"help": "longest suffix to look up"})

    def __post_init__(self) -> None:
        check_range("ngram", "k", self.k, 1, MAX_NODES)
        check_range("ngram", "min_match", self.min_match, 1, 64)
        check_range("ngram", "max_match", self.max_match, 1, 64)
        if self.max_match < self.min_match:
            raise ConfigError(f"ngram.max_match = {self.max_match} is below ngram.min_match = {self.min_match}.")

    def build(self, around: Surroundings) -> Drafter:
        return NGram(self, around.device)

    def memory(self, around: Surroundings, lay: Lay) -> DraftMemory:
        """An index on the host: an entry for every length at every position of the text."""
        del around, lay
        return DraftMemory(position_state=ENTRY_BYTES * (self.max_match - self.min_match + 1))


class _Index:
    """For one request: where each n-gram of its text ended last, by length."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest = shortest, longest
        self._ends: list[dict[bytes, int]] = [{} for _ in range(longest - shortest + 1)]
        self._done = 0

    def extend(self, text: NDArray[np.int64]) -> None:
        """Index the n-grams that have a successor in ``text``; those that end it are looked up, not stored."""
        size, first = text.itemsize, max(self._done, 1)
        from_ = max(first - self._longest, 0)
        raw = text[from_:].tobytes()
        for end in range(first, len(text)):
            at = (end - from_) * size
            for length, ends in enumerate(self._ends, self._shortest):
                if length > end:
                    break
                ends[raw[at - length * size : at]] = end
        self._done = len(text)

    def lookup(self, text: NDArray[np.int64]) -> int | None:
        """Position after the latest occurrence of the longest suffix seen before."""
        size = text.itemsize
        longest = min(self._longest, len(text) - 1)
        raw = text[len(text) - longest :].tobytes()
        for length in range(longest, self._shortest - 1, -1):
            end = self._ends[length - self._shortest].get(raw[(longest - length) * size :])
            if end is not None:
                return end
        return None


class NGram:
    """The drafter. It chooses tokens, so they are judged as draws from a one-hot law."""

    def __init__(self, config: NGramConfig, device: torch.device) -> None:
        self.config, self._device = config, device
        self._indices: dict[str, _Index] = {}

    @property
    def needs(self) -> Needs:
        return Needs(nodes=self.config.k)

    def prepare(self, cache: PagedCache) -> None:
        """Nothing to allocate."""

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        """The tokens that followed last time; where the match runs into the end, it repeats itself."""
        return chains([self._continuation(r, n) for r, n in zip(requests, budget, strict=True)], self._device)

    def offers(self, request: Request) -> bool:
        """Whether the text ends as it did somewhere before."""
        return self._found(request) is not None

    def _found(self, request: Request) -> int | None:
        index = self._indices.get(request.id)
        if index is None:
            index = self._indices[request.id] = _Index(self.config.min_match, self.config.max_match)
        index.extend(request.tokens)
        return index.lookup(request.tokens)

    def _continuation(self, request: Request, nodes: int) -> NDArray[np.int64]:
        text = request.tokens
        start = self._found(request) if nodes else None
        if start is None:
            return text[:0]
        # A loop of period p continues with itself: position len(text) + i repeats start + i, wrapped to the period.
        period = len(text) - start
        return text[start : start + nodes] if period >= nodes else text[start + np.arange(nodes) % period]

    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        """Nothing to learn: the text says it all."""

    def forget(self, request: Request) -> None:
        self._indices.pop(request.id, None)

    def check_integrity(self) -> None:
        """Every index must have gone with its request."""
        if self._indices:
            raise InternalError(f"n-gram indices of {sorted(self._indices)[:4]} are left over")
