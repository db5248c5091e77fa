"""The exact paged cache: blocks of keys and values, full blocks shared between requests with the same prefix.

Paged attention: Kwon et al. 2023 (arXiv 2309.06180). Pending nodes are staged behind the text of their request; commit
moves the accepted path to its place (nothing moves for a chain) and drops the rest by not counting it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.cache.blocks import ROOT, BlockPool, block_name
from steeple.config import ModelConfig
from steeple.errors import InternalError
from steeple.ops.attention import PagedAttention
from steeple.types import Batch, CacheSpec, KVView


@dataclass(slots=True)
class _Sequence:
    """What one request holds: its blocks, and the names of those that are full and committed."""

    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)


class PagedCache:
    """Args: config: whose keys; blocks x block_size positions in all; dtype of the keys;
        attention: who will read them; it decides how they lie. scratch: room for rows that are no request's.

    Memory: ``blocks * block_size * spec.bytes_per_token``, reserved at once; a CPU's pages are taken when written.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        share_prefixes: bool = True,
        attention: PagedAttention,
        scratch: bool = False,
    ) -> None:
        self.block_size = block_size
        self.device = torch.device(device)
        # Rows that only fill a recorded forward up to its size write behind the last block that a request can have.
        self.scratch_slot = blocks * block_size if scratch else None
        sizes = (config.num_layers, blocks + scratch, config.num_kv_heads, block_size, config.head_dim)
        self.keys, self.values = attention.allocate(*sizes, dtype, self.device)
        self.spec = CacheSpec(config.kv_elements_per_token * dtype.itemsize, exact=True)
        self.pool = BlockPool(blocks)
        self._share, self.attention = share_prefixes, attention
        self._sequences: dict[str, _Sequence] = {}
        # Views per layer, made once: indexing [layer] costs a dispatch in every call.
        self._layers = list(zip(self.keys.unbind(0), self.values.unbind(0), strict=True))

    def blocks_for(self, length: int) -> int:
        """Blocks that ``length`` positions take."""
        return -(-length // self.block_size)

    def attach(self, request_id: str, tokens: NDArray[np.int64], left: int = 1) -> int:
        """Begin a request; take over the longest shared prefix of full blocks. Returns the positions found.

        ``left`` tokens at least are left to compute: the step needs the law after the newest one.
        """
        if request_id in self._sequences:
            raise InternalError(f"request {request_id} is already in the cache")
        sequence = self._sequences[request_id] = _Sequence()
        if self._share:
            names = self._names(sequence, tokens, (len(tokens) - left) // self.block_size)
            sequence.blocks = self.pool.find(names)
            sequence.names = names[: len(sequence.blocks)]
        return len(sequence.blocks) * self.block_size

    def _names(self, sequence: _Sequence, tokens: NDArray[np.int64], full: int) -> list[bytes]:
        names = list(sequence.names)
        for index in range(len(names), full):
            before = names[-1] if names else ROOT
            names.append(block_name(before, tokens[index * self.block_size : (index + 1) * self.block_size]))
        return names

    def has(self, request_id: str) -> bool:
        return request_id in self._sequences

    def missing(self, request_id: str, length: int) -> int:
        """Blocks that ``reserve`` would have to take."""
        return max(0, self.blocks_for(length) - len(self._sequences[request_id].blocks))

    def reserve(self, request_id: str, length: int) -> bool:
        """Room for ``length`` positions; False (and nothing changed) if there is none."""
        missing = self.missing(request_id, length)
        if missing > self.pool.available:
            return False
        if missing:
            self._sequences[request_id].blocks.extend(self.pool.take(missing))
        return True

    def table(self, request_id: str) -> Sequence[int]:
        """The request's blocks in order of position."""
        return self._sequences[request_id].blocks

    def stage(self, layer: int, batch: Batch, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Write the rows' keys and values, ``[T, K, H]``, at their slots."""
        keys, values = self._layers[layer]
        self.attention.write_kv(keys, values, batch.slots, k_TKH, v_TKH)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, as ``attention`` keeps them."""
        return self._layers[index]

    def view(self, layer: int, batch: Batch) -> KVView:
        """Committed and pending keys of the batch, and the layout of this layer."""
        keys, values = self._layers[layer]
        return KVView(keys, values, batch.layout.of_layer(layer))

    def commit(self, batch: Batch, kept: Sequence[Sequence[int]], texts: Sequence[NDArray[np.int64]]) -> None:
        """Move accepted nodes to their positions, drop the rest, name the blocks that are now full."""
        source: list[int] = []
        target: list[int] = []
        text_len = batch.layout.text_len.tolist()
        for request_id, nodes, length, text in zip(batch.request_ids, kept, text_len, texts, strict=True):
            sequence = self._sequences[request_id]
            for depth, node in enumerate(nodes):
                if node != depth:
                    source.append(self._slot(sequence, length + node))
                    target.append(self._slot(sequence, length + depth))
            if self._share:
                self._remember(sequence, text, length + len(nodes))
        if source:
            places = torch.tensor(source, device=self.device), torch.tensor(target, device=self.device)
            for keys, values in self._layers:
                self.attention.move_kv(keys, values, *places)

    def name_full(self, request_id: str, text: NDArray[np.int64], cached: int) -> None:
        """Commit where no key moves: name the blocks that ``cached`` positions of ``text`` fill."""
        if self._share:
            self._remember(self._sequences[request_id], text, cached)

    def _slot(self, sequence: _Sequence, position: int) -> int:
        return sequence.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def _remember(self, sequence: _Sequence, text: NDArray[np.int64], cached: int) -> None:
        known = len(sequence.names)
        full = min(cached, len(text)) // self.block_size
        if full > known:
            sequence.names = self._names(sequence, text, full)
            for index in range(known, full):
                self.pool.remember(sequence.blocks[index], sequence.names[index])

    def shrink(self, request_id: str, length: int) -> None:
        """Give back the blocks behind the first ``length`` positions (slots of refused nodes)."""
        sequence = self._sequences[request_id]
        keep = self.blocks_for(length)
        self.pool.release(sequence.blocks[keep:])
        del sequence.blocks[keep:]

    def free(self, request_id: str) -> None:
        """End the request and give back its blocks; a request without any is fine."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            # Leaves first, so that the start of a prefix outlives its end.
            self.pool.release(reversed(sequence.blocks))

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise ``InternalError`` if a block leaked; ``idle``: no request may be left."""
        if idle and self._sequences:
            raise InternalError(f"requests {sorted(self._sequences)[:4]} still hold cache blocks")
        self.pool.check_integrity(s.blocks for s in self._sequences.values())
