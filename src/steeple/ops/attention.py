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
SCORED_QUERIES = 64  # rows x heads that share a key head: a tile of the native kernel


class PagedAttention(Protocol):
    """The one signature of reference and native attention.

    Args:
        q_TNH: queries, float32 or bfloat16; rows may be strided (a slice of a fused projection).
        keys, values: one layer of what ``allocate`` gave, float32 or bfloat16.
        layout: what every row sees.
        scale: what queries times keys are multiplied with.
        window: a row at rotary position ``r`` sees the key at ``p`` only if ``r - p < window``; 0 = no window.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 = none.
        page_scores: where to write the score of every page (block) of the block tables, float32 ``[K, E]`` with
            ``E = cu_blocks[B]``, page j of request b at ``cu_blocks[b] + j``: the largest scaled and capped score that
            one of the request's last ``min(rows, max(1, 64 // (N / K)))`` rows gives to a position of the page that it
            sees, over all query heads of the key head; -inf where none of them sees anything. A draft node counts at
            the position that it would have as text. None costs nothing.

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
        page_scores: Tensor | None = None,
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
        page_scores: Tensor | None = None,
    ) -> Tensor:
        return paged_attention(
            q_TNH, keys, values, layout, scale=scale, window=window, softcap=softcap, page_scores=page_scores
        )

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
    page_scores: Tensor | None = None,
) -> Tensor:
    """The reference, see ``PagedAttention``: request after request, all scores of a tile of rows at once."""
    check_cache(keys, values)
    check_attention(q_TNH, keys.dtype, (keys.shape[1], keys.shape[2], keys.shape[3]), layout)
    check_layout(layout)
    out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    cu_rows, cu_blocks = layout.cu_rows.tolist(), layout.cu_blocks.tolist()
    tables_KE = _tables(layout, keys.shape[1], cu_blocks[-1]).to(keys.device, torch.long)
    scored = scored_rows(q_TNH.shape[1] // keys.shape[1])
    if page_scores is not None:
        check_page_scores(page_scores, keys.shape[1], cu_blocks[-1])
        page_scores.fill_(float("-inf"))
    for b, text_len in enumerate(layout.text_len.tolist()):
        table_KE = tables_KE[:, cu_blocks[b] : cu_blocks[b + 1]]
        for first in range(cu_rows[b], cu_rows[b + 1], TILE):
            rows = slice(first, min(first + TILE, cu_rows[b + 1]))
            seen = _seen(layout, rows, text_len, window).to(keys.device)
            if not seen.any():
                continue  # zeros already
            k_KSH = _gather(keys, table_KE, seen.shape[1])
            v_KSH = _gather(values, table_KE, seen.shape[1])
            out_TNH[rows] = _attend(q_TNH[rows], k_KSH, v_KSH, seen, scale, softcap).to(q_TNH.dtype)
        rows = slice(max(cu_rows[b], cu_rows[b + 1] - scored), cu_rows[b + 1])
        if page_scores is not None and (layout.prefix[rows] | layout.ancestors[rows]).any():
            seen = _seen(layout, rows, text_len, window).to(keys.device)
            scores = _scores(q_TNH[rows], _gather(keys, table_KE, seen.shape[1]), seen, scale, softcap)
            page = _place(layout, rows, text_len, seen.shape[1]).to(keys.device) // layout.block_size
            _keep_most(page_scores[:, cu_blocks[b] : cu_blocks[b + 1]], scores, page)
    return out_TNH


def _tables(layout: KVLayout, kv_heads: int, entries: int) -> Tensor:
    """The block tables of every head, one after the other for all requests: ``[K, entries]``."""
    inside = (kv_heads - 1) * layout.head_stride + entries <= layout.blocks.shape[0]
    require(inside, f"{kv_heads} block tables of {entries} entries do not fit in {tuple(layout.blocks.shape)}")
    return layout.blocks.as_strided((kv_heads, entries), (layout.head_stride, 1))


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


def _place(layout: KVLayout, rows: slice, text_len: int, length: int) -> Tensor:
    """Int64 ``[rows, length]``: the position that each stored position has for a row; a node's is that of its depth."""
    place = torch.arange(length).expand(layout.prefix[rows].shape[0], -1).clone()
    bits = (layout.ancestors[rows].unsqueeze(1) >> torch.arange(MAX_NODES)) & 1
    nodes = place[:, text_len : text_len + MAX_NODES]
    stored = slice(nodes.shape[1])
    nodes[:] = torch.where(bits[:, stored] == 1, text_len + bits.cumsum(1)[:, stored] - 1, nodes)
    return place


def _keep_most(pages_KE: Tensor, scores: Tensor, page_TS: Tensor) -> None:
    """Bring the scores ``[K, N / K, T, S]`` of positions that lie in ``page_TS`` into those of the pages."""
    most_KX = scores.amax(1).flatten(1)
    pages_KE.scatter_reduce_(1, page_TS.reshape(1, -1).expand_as(most_KX), most_KX, "amax")


def _gather(cache: Tensor, table_KE: Tensor, length: int) -> Tensor:
    """The first ``length`` positions of one request, float32 ``[K, length, H]``."""
    K, S = cache.shape[1:3]
    used = table_KE[:, : -(-length // S)]
    return cache[used, torch.arange(K, device=cache.device).unsqueeze(1)].flatten(1, 2)[:, :length].float()


def _attend(q_TNH: Tensor, k_KSH: Tensor, v_KSH: Tensor, seen_TS: Tensor, scale: float, softcap: float) -> Tensor:
    T, N, H = q_TNH.shape
    K = k_KSH.shape[0]
    if not v_KSH.isfinite().all() and not seen_TS.all():  # nan times a weight of zero is nan: only what a row sees
        each = [(q_TNH[t : t + 1], k_KSH[:, s], v_KSH[:, s], s[s].unsqueeze(0)) for t, s in enumerate(seen_TS)]
        return torch.cat([_attend(*row, scale, softcap) for row in each])
    scores = _scores(q_TNH, k_KSH, seen_TS, scale, softcap)
    weights = scores.softmax(-1).nan_to_num_(0.0)  # nan: a row that sees nothing
    out = (weights.view(K, -1, weights.shape[-1]) @ v_KSH).view(K, N // K, T, H)
    return out.permute(2, 0, 1, 3).reshape(T, N, H)


def _scores(q_TNH: Tensor, k_KSH: Tensor, seen_TS: Tensor, scale: float, softcap: float) -> Tensor:
    """``[K, N / K, T, S]``, scaled and capped; -inf for what a row does not see."""
    (T, N, H), K = q_TNH.shape, k_KSH.shape[0]
    q = q_TNH.float().view(T, K, N // K, H).permute(1, 2, 0, 3).reshape(K, -1, H)
    scores = (q @ k_KSH.transpose(1, 2)).view(K, N // K, T, -1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill_(~seen_TS, float("-inf"))


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
    """Raise ``InternalError`` unless the fields of ``layout`` have the dtypes and sizes of the contract for a layer."""
    B, T = layout.text_len.shape[0], layout.prefix.shape[0]
    ints = (layout.cu_rows, layout.blocks, layout.cu_blocks, layout.prefix, layout.text_len, layout.positions)
    require(all(x.dtype == torch.int32 and x.is_contiguous() for x in ints), "the layout is not contiguous int32")
    require(layout.ancestors.dtype == torch.int64, f"ancestors are {layout.ancestors.dtype}; int64 is needed")
    sizes = (layout.cu_rows.shape[0], layout.cu_blocks.shape[0], layout.ancestors.shape[0], layout.positions.shape[0])
    require(sizes == (B + 1, B + 1, T, T), f"the layout has sizes {sizes} for {B} requests and {T} rows")
    require(layout.layer_stride == 0, "the layout is that of all layers; give layout.of_layer(layer)")
    require(layout.head_stride >= 0, f"head_stride is {layout.head_stride}")


def scored_rows(group: int) -> int:
    """How many of a request's last rows give page scores, at most; ``group``: query heads of a key head."""
    return max(1, SCORED_QUERIES // group)


def check_page_scores(page_scores: Tensor, kv_heads: int, entries: int) -> None:
    """Raise ``InternalError`` unless ``page_scores`` has room for every page of the block tables."""
    fits = page_scores.shape == (kv_heads, entries) and page_scores.dtype == torch.float32
    if not (fits and page_scores.is_contiguous()):
        wanted = f"contiguous float32 {(kv_heads, entries)} is needed"
        require(False, f"page_scores are {page_scores.dtype} {tuple(page_scores.shape)}; {wanted}")


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
