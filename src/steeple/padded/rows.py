"""Rows of one model's cache while requests are generated: what every layout of them can do, and left-padded rows.

EQSPEC (Zhang et al. 2025, arXiv 2510.22876) keeps a rectangle: every row ends at the last slot, and what it lacks in
length is padding in front. Rows that accept different numbers of tokens are moved after each round: here by one
indexed copy for the keys of a layer and one for its values, and not at all where all rows move equally far.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.padded.kv import KV, ROOM
from steeple.padded.net import Net

Ints = NDArray[np.int64]


class Rows(Protocol):
    """B rows of a model's cache. ``lengths [B]``: tokens of each whose keys are held, without those fed since.

    Between two ``keep`` every row is fed the same number of tokens; ``keep`` says how many of them count.
    """

    net: Net
    moved: int  # how often rows were copied because they lay wrong

    @property
    def lengths(self) -> Ints: ...

    @property
    def width(self) -> int: ...

    def feed(self, tokens_Bn: Tensor, last: int = 0) -> Tensor:
        """Append n tokens to every row; float32 logits ``[B, n, V]``, or of the ``last``."""
        ...

    def keep(self, count_B: Ints, staying: Ints) -> None:
        """Of the tokens fed since the last ``keep`` the first ``count_B`` stay, in the rows ``staying`` [indices]."""
        ...

    def join(self, other: LeftPadded) -> None:
        """Add rows."""
        ...


class LeftPadded:
    """The rectangle. ``pad_B``: unused slots in front of each row; a row holds all slots behind them.

    Args: net: the model; pad_B: of each row; kv: what is held already.
    """

    def __init__(self, net: Net, pad_B: Ints, kv: KV | None = None) -> None:
        self.net, self.pad_B = net, pad_B
        self.kv = KV() if kv is None else kv
        self.moved = 0
        self._settled = self.kv.width

    @classmethod
    def empty(cls, net: Net) -> LeftPadded:
        """No rows yet."""
        return cls(net, np.zeros(0, dtype=np.int64))

    @property
    def lengths(self) -> Ints:
        return self._settled - self.pad_B

    @property
    def width(self) -> int:
        return self.kv.width

    @property
    def fed(self) -> int:
        """Tokens per row since the last ``keep``."""
        return self.kv.width - self._settled

    def feed(self, tokens_Bn: Tensor, last: int = 0) -> Tensor:
        device, first = self.net.device, self.kv.width
        end = first + tokens_Bn.shape[1]
        pad_B1 = torch.from_numpy(self.pad_B).to(device).unsqueeze(1)
        positions = torch.arange(first, end, device=device) - pad_B1
        mask = torch.arange(end, device=device) >= pad_B1 if self.pad_B.any() else None
        return self.net.forward(tokens_Bn.to(device), self.kv, mask, positions, last)

    def keep(self, count_B: Ints, staying: Ints) -> None:
        length = (self.lengths + count_B)[staying]
        width = int(length.max(initial=0))
        pad = width - length
        shift = pad - self.pad_B[staying]
        everyone = staying.shape[0] == self.pad_B.shape[0]
        if not staying.shape[0]:
            self.kv = KV()
        elif everyone and not shift.any():
            # All have accepted equally many: the rectangle only grows (corollary B.3 of the paper).
            self.kv.narrow(0, width)
        else:
            self._move(staying, shift, width)
        self.pad_B, self._settled = pad, width

    def _move(self, staying: Ints, shift: Ints, width: int) -> None:
        device = self.net.device
        slot = torch.arange(width + ROOM, device=device) - torch.from_numpy(shift).to(device).unsqueeze(1)
        slot = slot.clamp_(min=0, max=self.kv.width - 1)
        self.kv = self.kv.take(torch.from_numpy(staying).to(device), slot, width)
        self.moved += 1

    def join(self, other: LeftPadded) -> None:
        if not self.pad_B.shape[0]:
            self.kv, self.pad_B, self._settled = other.kv, other.pad_B, other._settled
            return
        width = max(self.width, other.width)
        self.pad_B = np.concatenate((self.pad_B + width - self.width, other.pad_B + width - other.width))
        self.kv, self._settled = self.kv.joined(other.kv), width
