"""Keys and values of a batch behind a cache of ``transformers``: the only file that knows how that cache is made.

B rows, K heads, S slots, D head size. All layers hold the same slots of the same rows. Slots are moved by one
``index_select`` for the keys of a layer and one for its values, whatever rows leave and however far they move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # slots that a full layer is given beyond what it needs now


class SlotLayer(DynamicLayer):
    """A layer of a ``DynamicCache`` that appends in place while it has room, instead of copying all at every call.

    ``keys`` and ``values`` are what a model expects of them: views ``[B, K, S, D]`` of tensors with room behind.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.room: list[Tensor] = []  # keys and values, [B, K, capacity, D] and contiguous
        self.first = self.end = 0  # the slots that count

    @classmethod
    def of(cls, keys_BKSD: Tensor, values_BKSD: Tensor, end: int) -> SlotLayer:
        """A layer that holds these tensors; the slots from ``end`` on are room."""
        layer = cls()
        layer.begin(keys_BKSD)
        layer.room = [keys_BKSD, values_BKSD]
        layer.show(0, end)
        return layer

    def begin(self, states: Tensor) -> None:
        """Note what transformers wants to know of a layer that is in use."""
        self.dtype, self.device = states.dtype, states.device
        self.is_initialized: bool = True

    def show(self, first: int, end: int) -> None:
        """Let the slots ``first..end`` of what is held be those that count."""
        self.first, self.end = first, end
        self.keys, self.values = (part[:, :, first:end] for part in self.room)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append, and return all."""
        new = key_states.shape[2]
        if not self.is_initialized:
            self.begin(key_states)
            parts = [part[:, :, :0] for part in (key_states, value_states)]
            self.room = [_roomier(part, new + ROOM) for part in parts]
        elif self.end + new > self.room[0].shape[2]:
            grown = self.end - self.first + new
            self.room = [_roomier(part, grown + max(ROOM, grown // 4)) for part in (self.keys, self.values)]
            self.first, self.end = 0, self.end - self.first
        for part, states in zip(self.room, (key_states, value_states), strict=True):
            part[:, :, self.end : self.end + new] = states
        self.show(self.first, self.end + new)
        return self.keys, self.values


def _roomier(part_BKSD: Tensor, slots: int) -> Tensor:
    """A copy with room for ``slots`` slots. What is in the room is finite, for masked slots are multiplied with 0."""
    B, K, S, D = part_BKSD.shape
    copy = part_BKSD.new_zeros(B, K, slots, D)
    copy[:, :, :S] = part_BKSD
    return copy


class KV:
    """Keys and values of one model for B rows. ``cache`` is what the model is given; it appends to it."""

    def __init__(self, layers: Sequence[SlotLayer] = ()) -> None:
        self.cache = DynamicCache()
        self.cache.layer_class_to_replicate = SlotLayer
        self.cache.layers = list(layers)

    @property
    def layers(self) -> list[SlotLayer]:
        """The layers, all of the same width."""
        return self.cache.layers

    @property
    def width(self) -> int:
        """Slots per row."""
        return self.layers[0].end - self.layers[0].first if self.layers else 0

    @property
    def rows(self) -> int:
        """Rows; 0 before the first forward."""
        return self.layers[0].room[0].shape[0] if self.layers else 0

    def narrow(self, first: int, end: int) -> None:
        """Keep the slots ``first..end`` of all rows. Nothing is copied."""
        for layer in self.layers:
            layer.show(layer.first + first, layer.first + end)

    def take(self, row_B: Tensor, slot_BS: Tensor, width: int) -> KV:
        """New keys and values: those of rows ``row_B`` at their slots ``slot_BS``; slots from ``width`` on are room."""
        found = _Places(row_B, slot_BS)
        layers = []
        for layer in self.layers:
            index = found.of(layer)
            parts = [
                part.view(-1, part.shape[3]).index_select(0, index).view(*found.shape(part), part.shape[3])
                for part in layer.room
            ]
            layers.append(SlotLayer.of(parts[0], parts[1], width))
        return KV(layers)

    def put(self, row_B: Tensor, slot_Bn: Tensor, other: KV) -> None:
        """Write the last n slots of ``other``'s rows to the slots ``slot_Bn`` of the rows ``row_B``."""
        found, first = _Places(row_B, slot_Bn), other.width - slot_Bn.shape[1]
        for layer, source in zip(self.layers, other.layers, strict=True):
            index = found.of(layer)
            for part, states in zip(layer.room, (source.keys, source.values), strict=True):
                part.view(-1, part.shape[3]).index_copy_(0, index, states[:, :, first:].reshape(-1, part.shape[3]))

    def joined(self, other: KV) -> KV:
        """The rows of both, the narrower ones with unused slots in front."""
        width = max(self.width, other.width)
        layers = []
        for own, new in zip(self.layers, other.layers, strict=True):
            parts = []
            for first, second in ((own.keys, new.keys), (own.values, new.values)):
                (A, K, S, D), (B, _, T, _) = first.shape, second.shape
                both = first.new_zeros(A + B, K, width + ROOM, D)
                both[:A, :, width - S : width] = first
                both[A:, :, width - T : width] = second
                parts.append(both)
            layers.append(SlotLayer.of(parts[0], parts[1], width))
        return KV(layers)

    def like(self, rows: int, slots: int) -> KV:
        """Zeros for ``rows`` rows of ``slots`` slots, with the first rows and slots of this one, as far as they go."""
        layers = []
        for layer in self.layers:
            parts = []
            for part in (layer.keys, layer.values):
                B, K, S, D = part.shape
                bigger = part.new_zeros(rows, K, slots, D)
                bigger[: min(B, rows), :, : min(S, slots)] = part[:rows, :, :slots]
                parts.append(bigger)
            layers.append(SlotLayer.of(parts[0], parts[1], slots))
        return KV(layers)


class _Places:
    """Where slots of rows lie in the flat tensors of a layer; layers of one shape share the answer."""

    def __init__(self, row_B: Tensor, slot_BS: Tensor) -> None:
        self._row_B11, self._slot_B1S = row_B.view(-1, 1, 1), slot_BS.unsqueeze(1)
        self._known: dict[tuple[int, int, int], Tensor] = {}

    def of(self, layer: SlotLayer) -> Tensor:
        """Flat places ``[B * K * S]``."""
        _, K, capacity, _ = layer.room[0].shape
        key = (K, capacity, layer.first)
        if key not in self._known:
            head_1K1 = torch.arange(K, device=self._row_B11.device).view(1, -1, 1)
            slot = self._slot_B1S + layer.first
            self._known[key] = ((self._row_B11 * K + head_1K1) * capacity + slot).flatten()
        return self._known[key]

    def shape(self, part: Tensor) -> tuple[int, int, int]:
        """Rows, heads and slots of what is found."""
        return self._row_B11.shape[0], part.shape[1], self._slot_B1S.shape[2]
