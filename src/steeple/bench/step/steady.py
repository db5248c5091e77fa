"""Requests put into the middle of their decoding: a cache that is full already, and a drafter that proposes by rote.

Computing the prompts of 64 requests of 4,096 tokens takes minutes and changes nothing: how long a step takes depends on
how many keys it reads, not on which. So the cache is filled with normal random numbers, and every request begins as
if all of its text but the newest token had been found in it. From there on everything is the engine's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steeple.cache.paged import PagedCache
from steeple.config import ModelConfig
from steeple.draft.base import Needs, Surroundings, chains
from steeple.errors import InternalError
from steeple.model.decoder import Hidden
from steeple.ops.attention import PagedAttention
from steeple.request import Request
from steeple.types import Batch, Draft

SLOTS = 4096  # positions drawn; the cache repeats them


class FilledCache(PagedCache):
    """A ``PagedCache`` of random keys and values in which every request finds all of its text but the newest token."""

    def __init__(self, config: ModelConfig, *, attention: PagedAttention, seed: int, **others: Any) -> None:
        super().__init__(config, attention=attention, share_prefixes=False, **others)
        count = self.pool.count * self.block_size
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (2, min(SLOTS, count), config.num_kv_heads, config.head_dim)
        k_TKH, v_TKH = torch.randn(shape, generator=generator, device=self.device).to(self.keys.dtype)
        for keys, values in zip(self.keys, self.values, strict=True):
            for slots in torch.arange(count, device=self.device).split(SLOTS):
                rows = slots.shape[0]
                attention.write_kv(keys, values, slots, k_TKH[:rows], v_TKH[:rows])

    def attach(self, request_id: str, tokens: NDArray[np.int64], left: int = 1) -> int:
        """Begin a request and reserve its text; ``InternalError`` if there is no room, which the caller saw to."""
        super().attach(request_id, tokens, left)
        if not self.reserve(request_id, len(tokens) - 1):
            raise InternalError(f"the cache of a step bench has no room for request {request_id}")
        return len(tokens) - 1


@dataclass(frozen=True, slots=True)
class ScriptConfig:
    """Settings of ``ScriptedDrafter``. Args: k: nodes of every draft; vocab: tokens are below; seed: decides them."""

    k: int
    vocab: int
    seed: int = 0

    def build(self, around: Surroundings) -> ScriptedDrafter:
        return ScriptedDrafter(self, around.device)


class ScriptedDrafter:
    """Proposes a chain of ``k`` chosen tokens to every request, decided by the length of its text alone.

    Nothing is drawn and no model is asked, so a round costs what the engine's own part of it costs.
    """

    def __init__(self, config: ScriptConfig, device: torch.device | str) -> None:
        self.needs = Needs(nodes=config.k)
        self._config, self._device = config, device

    def prepare(self, cache: PagedCache) -> None:
        pass

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        """Chains of ``min(k, budget)`` tokens."""
        return chains([self._tokens(len(r), nodes) for r, nodes in zip(requests, budget, strict=True)], self._device)

    def _tokens(self, length: int, nodes: int) -> NDArray[np.int64]:
        # The golden ratio spreads the numbers over the vocabulary; a random one per token would cost a microsecond.
        start = self._config.seed + length * self._config.k
        return (np.arange(start, start + nodes, dtype=np.int64) * 0x9E3779B1 >> 7) % self._config.vocab

    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass

    def check_integrity(self) -> None:
        pass
