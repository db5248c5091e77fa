"""What every position of a training window sees of the target's keys and of the draft's own, block by block.

A window of S tokens is cut into blocks of k positions, as a round of drafting is: a row sees the target's keys before
its block, as far as the sink and the window of the block's first position show them, then the draft's own keys within
the block. Blocks are taken in groups, and a group gathers its stretch of the target's keys once; so the cost does not
grow with S.

Shape letters: B windows, S positions, X positions with those that fill up blocks and groups, G groups, g blocks per
group, Q query rows of a group, M committed keys of a group, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from steeple.config import ModelConfig
from steeple.draft.spire_model import SpireShape

GROUP_ROWS = 48  # query rows that share one stretch of keys
DENSE_ROWS = 256
FAR = -1e30  # a score that no softmax notices, yet no NaN where nothing is seen

KV = tuple[Tensor, Tensor]
Mask = tuple[Tensor, Tensor]
"""bool ``[G, 1, 1, Q, keys]`` of what is not seen, and ``[G, 1, 1, Q, 1]`` of whether anything is."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a window of ``length`` positions, the first of which begins at position ``-offset``.

    Positions below 0 and from ``length`` on only fill up. Every shape is the same for all offsets.
    """

    shape: SpireShape
    length: int
    offset: int
    device: torch.device

    @cached_property
    def group(self) -> int:
        """Blocks in a group."""
        return max(1, (DENSE_ROWS if self.shape.dense else GROUP_ROWS) // self.shape.k)

    @cached_property
    def groups(self) -> int:
        blocks = -(-(self.length + self.shape.k - 1) // self.shape.k)
        return -(-blocks // self.group)

    @cached_property
    def positions(self) -> Tensor:
        """int64 ``[G, g, k]``."""
        sizes = (self.groups, self.group, self.shape.k)
        return (torch.arange(self.groups * self.group * self.shape.k, device=self.device) - self.offset).view(sizes)

    @cached_property
    def places(self) -> Tensor:
        """``positions`` within the window, int64 ``[G, g, k]``: what fills up repeats the ends."""
        return self.positions.clamp(0, self.length - 1)

    @cached_property
    def candidates(self) -> Tensor:
        """Positions that a group's committed keys are gathered from, int64 ``[G, M]``: the sink, then one stretch."""
        shape = self.shape
        window = self.length if shape.dense else shape.window
        sink = torch.arange(shape.sink_pages * shape.page, device=self.device)
        stretch = torch.arange(window + shape.page - 1 + (self.group - 1) * shape.k, device=self.device)
        begin = self.positions[:, :1, 0] - (window + shape.page - 1)
        return torch.cat((sink.expand(self.groups, -1), begin + stretch), dim=1)

    @cached_property
    def gather(self) -> Tensor:
        """``candidates`` as indices into S positions, int64 ``[G * M]``."""
        return self.candidates.clamp(0, self.length - 1).flatten()

    @cached_property
    def gather_own(self) -> Tensor:
        """``candidates`` as indices into X positions, int64 ``[G * M]``."""
        return (self.candidates + self.offset).clamp(0, self.positions.numel() - 1).flatten()

    @cached_property
    def whole(self) -> Tensor:
        """Indices into X positions of the S real ones, int64 ``[S]``."""
        return torch.arange(self.length, device=self.device) + self.offset

    @cached_property
    def _sees_committed(self) -> Tensor:
        """bool ``[G, g, M]``: which candidates the rows of a block see."""
        shape, key, begin = self.shape, self.candidates.unsqueeze(1), self.positions[:, :, :1]
        page = key.div(shape.page, rounding_mode="floor")
        first = torch.zeros_like(begin) if shape.dense else (begin - shape.window).clamp(min=0) // shape.page
        sinks = shape.sink_pages * shape.page
        in_sink, from_sink = page < shape.sink_pages, torch.arange(key.shape[2], device=self.device) < sinks
        return (key >= 0) & (key < begin) & torch.where(from_sink, in_sink, ~in_sink & (page >= first))

    def mask(self, rows: slice, own: slice, window: int) -> Mask:
        """For the rows at these offsets of their blocks: committed candidates, then own keys at the offsets ``own``.

        Args: window: of the layer, 0 = none.
        """
        row, key = self.positions[:, :, rows], self.positions[:, :, own]
        block = torch.arange(self.group, device=self.device).unsqueeze(1)
        row_block, key_block = (block.expand(-1, x.shape[2]).flatten() for x in (row, key))
        flat_row, flat_key = row.flatten(1).unsqueeze(2), key.flatten(1).unsqueeze(1)
        sees_own = (row_block.unsqueeze(1) == key_block) & (flat_key >= 0) & (flat_key <= flat_row)
        committed = self._sees_committed.unsqueeze(2).expand(-1, -1, row.shape[2], -1).flatten(1, 2)
        sees = torch.cat((committed, sees_own), dim=2)
        if window:
            keys = torch.cat((self.candidates.unsqueeze(1), flat_key), dim=2)
            sees = sees & (flat_row - keys < window)
        sees = sees[:, None, None]
        return ~sees, sees.any(dim=-1, keepdim=True)

    def collect(self, x_TKH: Tensor) -> Tensor:
        """The committed candidates out of ``[B * S, K, H]``: ``[B, G, M, K, H]``."""
        return collect(x_TKH, self.gather, self.length, self.groups)


def collect(x_TKH: Tensor, index: Tensor, length: int, groups: int) -> Tensor:
    """Rows ``index`` of each of the B sequences of ``length`` rows in ``[B * length, K, H]``: ``[B, G, M, K, H]``."""
    return x_TKH.unflatten(0, (-1, length)).index_select(1, index).unflatten(1, (groups, -1))


def two_sources(q_BGQNH: Tensor, committed: KV, own: KV, mask: Mask, config: ModelConfig) -> Tensor:
    """Attention with one softmax over two sources of keys; a row that sees nothing gives zeros.

    Args: committed, own: keys and values ``[B, G, keys, K, H]``.

    Returns ``[B * G * Q, N, H]``.
    """
    B, G, Q, N, H = q_BGQNH.shape
    K = committed[0].shape[3]
    q = q_BGQNH.unflatten(3, (K, N // K)).permute(0, 1, 3, 4, 2, 5).reshape(B, G, K, (N // K) * Q, H)
    keys, values = (
        [x.transpose(2, 3) for x in (committed[0], own[0])],
        [x.transpose(2, 3) for x in (committed[1], own[1])],
    )
    scores = torch.cat([q @ k.transpose(-1, -2) for k in keys], dim=-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * config.scale
    if config.attention_softcap:
        scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
    blocked, some = mask
    weights = scores.unflatten(3, (N // K, Q)).masked_fill(blocked, FAR).softmax(dim=-1) * some
    parts = weights.flatten(3, 4).to(values[0].dtype).split([k.shape[-2] for k in keys], dim=-1)
    out = parts[0] @ values[0] + parts[1] @ values[1]
    return out.view(B, G, K, N // K, Q, H).permute(0, 1, 4, 2, 3, 5).reshape(B * G * Q, N, H)


@dataclass(frozen=True, slots=True)
class OnePass:
    """The draft's attention where its own keys in flight are those of its layers: one pass over all X positions.

    Args:
        groups: G. masks: for each layer.
        committed: for each layer the target's keys and values ``[B * S, K, H]``; empty: the draft's own.
        gather: of the committed candidates, into S positions or, where they are the draft's own, into X.
    """

    groups: int
    config: ModelConfig
    masks: Sequence[Mask]
    committed: Sequence[KV]
    gather: Tensor
    length: int
    rows: int

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        q, k = q_TNH.to(v_TKH.dtype), k_TKH.to(v_TKH.dtype)  # under autocast the rotary tables made them float32
        keys, values = self.committed[layer] if self.committed else (k, v_TKH)
        length = self.length if self.committed else q.shape[0] // self.rows
        q, k, v = (x.unflatten(0, (self.rows, self.groups, -1)) for x in (q, k, v_TKH))
        pair = (
            collect(keys.to(q.dtype), self.gather, length, self.groups),
            collect(values.to(q.dtype), self.gather, length, self.groups),
        )
        return two_sources(q, pair, (k, v), self.masks[layer], self.config)


@dataclass(frozen=True, slots=True)
class BlockPass:
    """The draft's attention in one of k passes: one row per block, ``[B * G * g]`` in all.

    Args:
        masks: for each layer.
        committed: for each layer, gathered already, ``[B, G, M, K, H]``.
        own: for each layer and earlier offset, keys and values ``[B * G * g, K, H]``.
        sees_itself: a row's own keys and values are put there first; without, somebody else does it afterwards.
    """

    blocks: Blocks
    config: ModelConfig
    masks: Sequence[Mask]
    committed: Sequence[KV]
    own: Sequence[list[KV]]
    sees_itself: bool

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        if self.sees_itself:
            self.own[layer].append((k_TKH.to(v_TKH.dtype), v_TKH))
        q = q_TNH.to(v_TKH.dtype).unflatten(0, (-1, self.blocks.groups, self.blocks.group))
        own = (self._earlier(layer, 0, q, k_TKH), self._earlier(layer, 1, q, v_TKH))
        return two_sources(q, self.committed[layer], own, self.masks[layer], self.config)

    def _earlier(self, layer: int, part: int, q: Tensor, like_TKH: Tensor) -> Tensor:
        """Keys (part 0) or values (1) of the offsets so far, ``[B, G, g * offsets, K, H]``, block after block."""
        heads = like_TKH.shape[1:]
        if not self.own[layer]:
            return q.new_zeros((*q.shape[:2], 0, *heads))
        parts = [pair[part].to(q.dtype).view(*q.shape[:3], *heads) for pair in self.own[layer]]
        return torch.stack(parts, dim=3).flatten(2, 3)
