"""Attention over a paged cache of keys and values, for a flat and ragged batch of prompts, decode rows and draft trees.

Shape letters: L layers, B requests, T flat query rows, N query heads, K key/value heads, H head dim, P blocks in the
cache, S positions within a block.

How keys and values lie in the cache is the backend's own business: it allocates, writes, moves and reads them. This
file is the reference, clear rather than fast, with caches ``[L, P, K, S, H]``; ``native_attention.py`` has the fast
twin with the same signature and ``attention_backend``, which chooses.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from steeple.errors import InternalError
from steeple.ops.memory import zeros
from steeple.types import MAX_NODES, KVLayout

DTYPES = (torch.float32, torch.bfloat16)
TILE = 256  # query rows for which the reference holds all scores at once


class PagedAttention(Protocol):
    """The one signature of reference and native attention.

    Args:
        q_TNH: queries, float32 or bfloat16; rows may be strided (a slice of a fused projection).
        keys, values: one layer of what ``allocate`` gave, float32 or bfloat16.
        layout: what every row sees.
        scale: what queries times keys are multiplied with.
        window: a row at rotary position ``r`` sees the key at ``p`` only if ``r - p < window``; 0 = no window.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 = none.

    Returns ``[T, N, H]`` in the dtype of ``q_TNH``, accumulated in float32; a row that sees nothing gives zeros.
    Raises ``InternalError`` for a shape, stride or dtype that is none of these.
    """

    def __call__(
        self,
        q_TNH: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: KVLayout,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor: ...

    def allocate(
        self,
        layers: int,
        blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> tuple[Tensor, Tensor]:
        """Zeroed keys and values of ``layers`` layers in this backend's layout; layer after layer along the first dim.

        Nobody else may assume the other dims. A *slot* of it is block * block_size + offset.
        """
        ...

    def write_kv(self, keys: Tensor, values: Tensor, slots: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Stage: write the rows ``k_TKH`` and ``v_TKH`` to ``slots``, int64 ``[T]``, of one layer.

        Rows may be strided (slices of a fused projection). Slots must differ from each other.
        """
        ...

    def move_kv(self, keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
        """Commit of a path: copy slots ``source`` to ``target`` of one layer, all read before any is written."""
        ...

    def read_kv(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``slots``, int64 ``[n]``, of one layer: copies ``[n, K, H]``."""
        ...


class ReferenceAttention:
    """The reference as a ``PagedAttention``; see there."""

    def __call__(
        self,
        q_TNH: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: KVLayout,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        return paged_attention(q_TNH, keys, values, layout, scale=scale, window=window, softcap=softcap)

    def allocate(
        self,
        layers: int,
        blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> tuple[Tensor, Tensor]:
        shape = (layers, blocks, kv_heads, block_size, head_dim)
        return zeros(shape, dtype, device), zeros(shape, dtype, device)

    def write_kv(self, keys: Tensor, values: Tensor, slots: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        check_cache(keys, values)
        check_write(keys.shape[1], keys.shape[3], slots, k_TKH, v_TKH)
        rows = _slot_rows(keys, slots)
        H = keys.shape[3]
        keys.view(-1, H)[rows] = k_TKH.reshape(-1, H).to(keys.dtype)
        values.view(-1, H)[rows] = v_TKH.reshape(-1, H).to(values.dtype)

    def move_kv(self, keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
        check_cache(keys, values)
        from_rows, to_rows = _slot_rows(keys, source), _slot_rows(keys, target)
        for cache in (keys.view(-1, keys.shape[3]), values.view(-1, keys.shape[3])):
            cache[to_rows] = cache[from_rows]

    def read_kv(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        check_cache(keys, values)
        rows, (_, K, _, H) = _slot_rows(keys, slots), keys.shape
        return keys.view(-1, H)[rows].view(-1, K, H), values.view(-1, H)[rows].view(-1, K, H)


def paged_attention(
    q_TNH: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: KVLayout,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """The reference, see ``PagedAttention``: request after request, all scores of a tile of rows at once."""
    check_cache(keys, values)
    check_attention(q_TNH, keys.dtype, (keys.shape[1], keys.shape[2], keys.shape[3]), layout)
    check_layout(layout)
    out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    cu_rows, cu_blocks = layout.cu_rows.tolist(), layout.cu_blocks.tolist()
    for b, text_len in enumerate(layout.text_len.tolist()):
        blocks = layout.blocks[cu_blocks[b] : cu_blocks[b + 1]].to(keys.device, torch.long)
        for first in range(cu_rows[b], cu_rows[b + 1], TILE):
            rows = slice(first, min(first + TILE, cu_rows[b + 1]))
            seen = _seen(layout, rows, text_len, window).to(keys.device)
            if not seen.any():
                continue  # zeros already
            used = blocks[: -(-seen.shape[1] // layout.block_size)]
            k_KSH = _gather(keys, used, seen.shape[1])
            v_KSH = _gather(values, used, seen.shape[1])
            out_TNH[rows] = _attend(q_TNH[rows], k_KSH, v_KSH, seen, scale, softcap).to(q_TNH.dtype)
    return out_TNH


def _seen(layout: KVLayout, rows: slice, text_len: int, window: int) -> Tensor:
    """Bool ``[rows, S]``: whether each row sees position ``s``; S is the least that holds all that is seen."""
    prefix = layout.prefix[rows].unsqueeze(1)
    bits = (layout.ancestors[rows].unsqueeze(1) >> torch.arange(MAX_NODES)) & 1
    nodes = int(bits.any(0).nonzero().max()) + 1 if bits.any() else 0
    length = max(int(prefix.max()), text_len + nodes if nodes else 0)
    position = torch.arange(length)
    seen = position < prefix
    if window:
        seen &= layout.positions[rows].unsqueeze(1) - position < window
        # Depth grows by one along a path, so a window holds the deepest nodes of the mask.
        deeper = bits.flip(1).cumsum(1).flip(1) - bits
        bits = bits * (deeper < window)
    if nodes:
        seen[:, text_len : text_len + nodes] |= bits[:, :nodes].bool()
    return seen


def _gather(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first ``length`` positions of one request, float32 ``[K, length, H]``."""
    return cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float()


def _attend(q_TNH: Tensor, k_KSH: Tensor, v_KSH: Tensor, seen_TS: Tensor, scale: float, softcap: float) -> Tensor:
    T, N, H = q_TNH.shape
    K = k_KSH.shape[0]
    if not v_KSH.isfinite().all() and not seen_TS.all():  # nan times a weight of zero is nan: only what a row sees
        each = [(q_TNH[t : t + 1], k_KSH[:, s], v_KSH[:, s], s[s].unsqueeze(0)) for t, s in enumerate(seen_TS)]
        return torch.cat([_attend(*row, scale, softcap) for row in each])
    q = q_TNH.float().view(T, K, N // K, H).permute(1, 2, 0, 3).reshape(K, -1, H)
    scores = (q @ k_KSH.transpose(1, 2)).view(K, N // K, T, -1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores.masked_fill_(~seen_TS, float("-inf"))
    weights = scores.softmax(-1).nan_to_num_(0.0)  # nan: a row that sees nothing
    out = (weights.view(K, -1, weights.shape[-1]) @ v_KSH).view(K, N // K, T, H)
    return out.permute(2, 0, 1, 3).reshape(T, N, H)


def _slot_rows(cache: Tensor, slots: Tensor) -> Tensor:
    """Rows of ``cache.view(-1, H)`` that ``slots`` stand for, int64 ``[T * K]``, slot after slot."""
    K, S = cache.shape[1:3]
    slots = slots.to(cache.device).unsqueeze(1)
    return ((slots // S * K + torch.arange(K, device=cache.device)) * S + slots % S).view(-1)


def check_cache(keys: Tensor, values: Tensor) -> None:
    """Raise ``InternalError`` unless keys and values are two contiguous caches of this file's layout."""
    require(keys.shape == values.shape and keys.dtype == values.dtype, "keys and values differ in shape or dtype")
    require(keys.dim() == 4, f"keys are {tuple(keys.shape)}; [P, K, S, H] is needed")
    require(keys.is_contiguous() and values.is_contiguous(), "keys or values are not contiguous")


def check_attention(q_TNH: Tensor, dtype: torch.dtype, sizes: tuple[int, int, int], layout: KVLayout) -> None:
    """Raise ``InternalError`` unless q fits the contract and a cache of ``dtype`` with ``sizes`` K, S and H."""
    (T, N, H), (K, S, kv_H) = q_TNH.shape, sizes
    if dtype not in DTYPES or q_TNH.dtype not in DTYPES:  # messages cost more than the checks
        require(False, f"q is {q_TNH.dtype}, keys are {dtype}")
    if kv_H != H or N % K or layout.block_size != S or layout.prefix.shape[0] != T:
        require(False, f"q {tuple(q_TNH.shape)} does not fit a cache with (K, S, H) = {sizes} or the layout")
    if q_TNH.stride()[1:] != (H, 1):
        require(False, f"q has strides {q_TNH.stride()}; only rows may be strided")


def check_layout(layout: KVLayout) -> None:
    """Raise ``InternalError`` unless the fields of ``layout`` have the dtypes and sizes of the contract."""
    B, T = layout.text_len.shape[0], layout.prefix.shape[0]
    ints = (layout.cu_rows, layout.blocks, layout.cu_blocks, layout.prefix, layout.text_len, layout.positions)
    require(all(x.dtype == torch.int32 and x.is_contiguous() for x in ints), "the layout is not contiguous int32")
    require(layout.ancestors.dtype == torch.int64, f"ancestors are {layout.ancestors.dtype}; int64 is needed")
    sizes = (layout.cu_rows.shape[0], layout.cu_blocks.shape[0], layout.ancestors.shape[0], layout.positions.shape[0])
    require(sizes == (B + 1, B + 1, T, T), f"the layout has sizes {sizes} for {B} requests and {T} rows")


def check_write(kv_heads: int, head_dim: int, slots: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
    """Raise ``InternalError`` unless the arguments of ``write_kv`` fit each other and the cache."""
    check_slots(slots)
    rows = (slots.shape[0], kv_heads, head_dim)
    for name, x in (("k", k_TKH), ("v", v_TKH)):
        if x.shape != rows:
            require(False, f"{name} is {tuple(x.shape)}; {rows} is needed")
        if x.stride()[1:] != (head_dim, 1):
            require(False, f"{name} has strides {x.stride()}; only rows may be strided")


def check_slots(slots: Tensor) -> None:
    """Raise ``InternalError`` unless ``slots`` are a contiguous int64 vector."""
    fits = slots.dtype == torch.int64 and slots.dim() == 1 and slots.is_contiguous()
    require(fits, f"slots are {slots.dtype} {tuple(slots.shape)}; a contiguous int64 vector is needed")


def require(fact: bool, message: str) -> None:
    """Raise ``InternalError`` with ``message`` unless ``fact``."""
    if not fact:
        raise InternalError(f"Paged attention: {message}.")
