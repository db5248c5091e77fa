"""Some layers of a paged cache, for a decoder that has only these: layer i of it reads layer ``first + i``."""

from __future__ import annotations

from torch import Tensor

from steeple.cache.paged import PagedCache
from steeple.types import Batch, KVView


class CacheSlice:
    """What a runner needs of a cache. Blocks are reserved, committed and freed through ``whole`` alone."""

    def __init__(self, whole: PagedCache, first: int) -> None:
        self._whole, self._first = whole, first
        self.block_size, self.attention, self.pool = whole.block_size, whole.attention, whole.pool
        self.scratch_slot, self.device = whole.scratch_slot, whole.device

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the decoder's layer ``index``."""
        return self._whole.layer(self._first + index)

    def stage(self, layer: int, batch: Batch, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """See ``PagedCache.stage``."""
        self._whole.stage(self._first + layer, batch, k_TKH, v_TKH)

    def view(self, layer: int, batch: Batch) -> KVView:
        """See ``PagedCache.view``; block tables count the decoder's layers."""
        return KVView(*self.layer(layer), batch.layout.of_layer(layer))

    def blocks_for(self, length: int) -> int:
        """See ``PagedCache.blocks_for``."""
        return self._whole.blocks_for(length)


LayerCache = PagedCache | CacheSlice
