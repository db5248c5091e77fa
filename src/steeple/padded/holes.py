"""Rows whose rejected slots stay where they are, as holes that a mask hides: nothing moves after a round.

A cached key carries the rotation (or embedding) of its own position, and attention does not ask in which order keys
lie, as long as positions are given and the mask is right. So a round only notes which of its slots count. Slots are
won back by one indexed copy when too many are lost. Wrong for models that tell positions by slots: ALiBi biases made
from the mask, windows counted in slots.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from steeple.padded.kv import KV, ROOM
from steeple.padded.net import Net
from steeple.padded.rows import Ints, LeftPadded


class Holes:
    """Rows with holes. ``valid_BS``: on the device, which slots count.

    Args: net: the model; waste: share of the slots that may be lost, in the row that loses least, before compaction.
    """

    def __init__(self, net: Net, waste: float) -> None:
        self.net, self._waste = net, waste
        self.kv = KV()
        self.valid_BS = torch.zeros(0, 0, dtype=torch.bool, device=net.device)
        self.moved = 0
        self._lengths: Ints = np.zeros(0, dtype=np.int64)

    @property
    def lengths(self) -> Ints:
        return self._lengths

    @property
    def width(self) -> int:
        return self.kv.width

    def feed(self, tokens_Bn: Tensor, last: int = 0) -> Tensor:
        device, (B, n), S = self.net.device, tokens_Bn.shape, self.kv.width
        start = self._lengths + S - self.valid_BS.shape[1]  # the tokens fed since the last keep are not noted yet
        positions = torch.from_numpy(start).to(device).unsqueeze(1) + torch.arange(n, device=device)
        later = torch.arange(S + n, device=device) > torch.arange(S, S + n, device=device).unsqueeze(1)
        seen_BS = torch.ones(B, S + n, dtype=torch.bool, device=device)
        seen_BS[:, : self.valid_BS.shape[1]] = self.valid_BS
        mask = seen_BS.view(B, 1, 1, -1) & ~later
        return self.net.forward(tokens_Bn.to(device), self.kv, mask, positions, last)

    def keep(self, count_B: Ints, staying: Ints) -> None:
        device, noted = self.net.device, self.valid_BS.shape[1]
        count = count_B[staying]
        self._lengths = self._lengths[staying] + count
        row = torch.from_numpy(staying).to(device)
        # Slots at the end that no row keeps are no holes: the next tokens take them.
        width = noted + int(count.max(initial=0))
        new = torch.arange(width - noted, device=device) < torch.from_numpy(count).to(device).unsqueeze(1)
        everyone = staying.shape[0] == count_B.shape[0]
        self.valid_BS = torch.cat((self.valid_BS if everyone else self.valid_BS[row], new), dim=1)
        longest = int(self._lengths.max(initial=0))
        if not staying.shape[0]:
            self.kv, self.valid_BS = KV(), self.valid_BS[:, :0]
        elif width - longest > self._waste * width:
            self._compact(row, longest)
        elif everyone:
            self.kv.narrow(0, width)
        else:
            slot = torch.arange(width + ROOM, device=device).clamp_(max=self.kv.width - 1)
            self.kv = self.kv.take(row, slot.expand(row.shape[0], -1), width)

    def _compact(self, row: Tensor, width: int) -> None:
        """Move what counts to the last ``width`` slots, in its order."""
        order = self.valid_BS.to(torch.uint8).argsort(dim=1, stable=True)[:, -width:]
        self.valid_BS = self.valid_BS.gather(1, order)
        slot = torch.cat((order, order[:, -1:].expand(-1, ROOM)), dim=1)
        self.kv = self.kv.take(row, slot, width)
        self.moved += 1

    def join(self, other: LeftPadded) -> None:
        device = self.net.device
        own = torch.from_numpy(other.pad_B).to(device).unsqueeze(1) <= torch.arange(other.width, device=device)
        if not self._lengths.shape[0]:
            self.kv, self.valid_BS, self._lengths = other.kv, own, other.lengths
            return
        width = max(self.width, other.width)
        parts = [torch.nn.functional.pad(part, (width - part.shape[1], 0)) for part in (self.valid_BS, own)]
        self.valid_BS = torch.cat(parts)
        self.kv = self.kv.joined(other.kv)
        self._lengths = np.concatenate((self._lengths, other.lengths))
