"""Copies of the first pages of a text, turned so that they stand right before the window: positions within the cache.

StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) counts positions within what is kept, so that no query is further from
the sink than the model has learned. Between query and window nothing changes by that: both move together. Only the
sink's keys must be turned, by as many positions as were left out: a page or two per request, each time the window has
moved by a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steeple.cache.batch import Ints
from steeple.cache.paged import PagedCache
from steeple.cache.slice import LayerCache

SPARE = 4  # a copy is made only while one block in so many is free: texts come first


@dataclass(frozen=True, slots=True)
class Turn:
    """Rotary tables, ``[max_context, R]``, of unit length: ``cos[d]`` and ``sin[d]`` turn a key by d positions."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, k_TKH: torch.Tensor, by_T: torch.Tensor) -> torch.Tensor:
        """Keys turned by ``by_T`` positions; dims beyond the rotary ones as they were."""
        R = self.cos.shape[-1]
        cos, sin = self.cos[by_T].unsqueeze(1), self.sin[by_T].unsqueeze(1)
        wide = k_TKH.float()
        first, second, rest = wide[..., :R], wide[..., R : 2 * R], wide[..., 2 * R :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(k_TKH.dtype)


class SinkCopies:
    """Args: cache that lends the blocks; layers: of it, those to copy; pages of the sink; turn."""

    def __init__(self, cache: PagedCache, layers: LayerCache, num_layers: int, pages: int, turn: Turn) -> None:
        self._cache, self._layers, self._pages, self._turn = cache, layers, pages, turn
        self._num_layers = num_layers
        self._turned: dict[str, int] = {}  # by how much a request's copy is turned

    def of(self, ids: Sequence[str], tables: Sequence[Sequence[int]], skipped: Ints) -> list[Sequence[int]]:
        """The sink's blocks of each request, turned by ``skipped[b]`` positions: its own where nothing is skipped, or
        where there is no room for a copy."""
        found: list[Sequence[int]] = []
        source: list[int] = []
        target: list[int] = []
        by: list[int] = []
        for id, table, turn in zip(ids, tables, skipped.tolist(), strict=True):
            own = table[: self._pages]
            if turn and self._room(id):
                copy = self._cache.table(_name(id))
                if self._turned.get(id) != turn:
                    source += own
                    target += copy
                    by += [turn] * self._pages
                    self._turned[id] = turn
                own = copy
            found.append(own)
        if source:
            self._copy(np.array(source), np.array(target), np.array(by))
        return found

    def _room(self, id: str) -> bool:
        name, pool = _name(id), self._cache.pool
        if self._cache.has(name):
            return True
        if pool.available * SPARE < pool.count or self._pages * 2 * SPARE > pool.count:
            return False
        self._cache.attach(name, np.zeros(0, dtype=np.int64))
        return self._cache.reserve(name, self._pages * self._cache.block_size)

    def _copy(self, source: Ints, target: Ints, by: Ints) -> None:
        size, device = self._cache.block_size, self._cache.device
        within = np.arange(size)
        from_, to = (torch.from_numpy((x[:, None] * size + within).ravel()).to(device) for x in (source, target))
        turns = torch.from_numpy(np.repeat(by, size)).to(device)
        attention = self._cache.attention
        for layer in range(self._num_layers):
            keys, values = self._layers.layer(layer)
            k_TKH, v_TKH = attention.read_kv(keys, values, from_)
            attention.write_kv(keys, values, to, self._turn(k_TKH, turns), v_TKH)

    def forget(self, id: str) -> None:
        """Give back the copy of a request, if it has one."""
        if self._turned.pop(id, None) is not None or self._cache.has(_name(id)):
            self._cache.free(_name(id))

    @property
    def remembered(self) -> list[str]:
        """Requests that have a copy."""
        return list(self._turned)


def _name(id: str) -> str:
    return f"{id}\0sink"
