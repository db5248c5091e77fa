"""Drafting from keys of its own: a SPIRe draft whose key projections were trained, as in the paper.

After every step of the target, the draft's keys of the committed positions are projected from the target's activations
(the residual stream that enters the layers it was cut from) into a ring of pages. So it still reads no prompt, but it
needs the target's hidden states of every row, and so prefixes cannot be shared while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from steeple.cache.batch import Ints
from steeple.cache.paged import PagedCache
from steeple.cache.ring import PageRings
from steeple.draft.base import Needs, Surroundings
from steeple.draft.spire_model import embedding, keys_values
from steeple.draft.windowed import DraftShape, SpireParts, View, WindowDrafter
from steeple.model.decoder import Hidden
from steeple.request import Request
from steeple.types import Batch, Draft


class RingDrafter(WindowDrafter):
    """Args: view: ``first_layer`` says which of the target's layers the draft's first one was."""

    def __init__(self, depth: DraftShape, view: View, around: Surroundings, parts: SpireParts) -> None:
        super().__init__(
            depth, view, around, lambda cache: parts.passes(cache, around.attention), carries=parts.carry is not None
        )
        self._decoder = parts.decoder

    @property
    def needs(self) -> Needs:
        layers = range(self._view.first_layer, self._view.first_layer + self._decoder.config.num_layers)
        own = self._decoder.config.kv_elements_per_token * self.around.dtype.itemsize
        hidden = tuple(layer - 1 for layer in layers if layer)
        return Needs(
            nodes=self._k * self._width,
            hidden=hidden,
            every_row=True,
            own_cache_bytes_per_token=own,
            last_row=self._states is not None,
        )

    def prepare(self, cache: PagedCache) -> None:
        """Pages of its own: as many as the target has, which no request ever fills."""
        around = self.around
        own = PagedCache(
            self._decoder.config,
            blocks=cache.pool.count,
            block_size=cache.block_size,
            dtype=around.dtype,
            device=around.device,
            share_prefixes=False,
            attention=around.attention,
        )
        self._rings = PageRings(own, self._view.window, self._k)
        super().prepare(own)

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        """As ``WindowDrafter``; nothing for requests that got no pages."""
        allowed = [n if self._rings.has(r.id) else 0 for r, n in zip(requests, budget, strict=True)]
        return super().propose(requests, allowed)

    def _table(self, id: str, length: int) -> Sequence[int]:
        return self._rings.table(id, length)

    @torch.inference_mode()
    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        """Project the committed rows' activations into keys and values."""
        super().observe(requests, batch, kept, hidden)
        rows, slots = self._committed(requests, batch, kept)
        if not rows.size:
            return
        device = batch.tokens.device
        rows_R, slots_R = torch.from_numpy(rows).to(device), torch.from_numpy(slots).to(device)
        positions_R = batch.positions[rows_R]
        attention, own = self.around.attention, self._rings.cache
        for layer in range(self._decoder.config.num_layers):
            below = self._view.first_layer + layer - 1
            y_RD = embedding(self.around.decoder, batch.tokens[rows_R]) if below < 0 else hidden.kept[below][rows_R]
            k_RKH, v_RKH = keys_values(self._decoder, layer, y_RD, positions_R)
            attention.write_kv(*own.layer(layer), slots_R, k_RKH, v_RKH)

    def _committed(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
        """Flat rows whose positions are text now, as far as the ring keeps them, and the slots that they go to."""
        layout = batch.layout
        first, nodes = layout.cu_rows.tolist(), layout.node_row.tolist()
        positions = layout.positions.numpy().astype(np.int64)
        rows, slots = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for b, request in enumerate(requests):
            begins = bool(positions[first[b]] == 0)  # pages that were not filled from the start would hold nothing
            if request.finished or not (self._rings.has(request.id) or (begins and self._rings.admit(request.id))):
                continue
            own = np.concatenate((np.arange(first[b], nodes[b]), nodes[b] + np.array(kept[b], dtype=np.int64)))
            own = own[self._rings.lasting(positions[own])]
            rows.append(own)
            slots.append(self._rings.slots(request.id, positions[own]))
        return np.concatenate(rows), np.concatenate(slots)

    def forget(self, request: Request) -> None:
        """Give back its pages."""
        super().forget(request)
        self._rings.free(request.id)

    def check_integrity(self) -> None:
        """No page of its own may be held."""
        super().check_integrity()
        self._rings.cache.check_integrity(idle=True)
