"""The Triton kernels of paged attention: attend, combine the parts of a long context, write keys and values.

Shape letters: M rows x heads of a tile, G query heads that share a key head, S positions within a block, H head dim.

What a row sees is split at fixed positions (``SPLIT``), every split is summed by itself and the sums merge in order
(FlashDecoding: Dao et al. 2023; the fixed split: He et al. 2025, "Defeating nondeterminism in LLM inference"). Whether
one program does all splits of a tile or each does one is scheduling: the sums and their order are the same, so a row's
result depends on its own keys alone. Where rounding matters ``fma`` is spelled out, so that no compiler may choose.

All integers of a step lie in one int32 array, ``plan``; ``triton_plan.py`` says what is where.
"""

# mypy: ignore-errors
# Triton's language is not Python's: a kernel's arguments have no types that mypy could know.

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NODES = tl.constexpr(63)  # steeple.types.MAX_NODES

# Places in the header of a plan, and fields of an item: the same numbers as in triton_plan.py.
ITEMS_COUNT = tl.constexpr(0)
AT_ITEMS = tl.constexpr(1)
AT_PREFIX = tl.constexpr(2)
AT_POSITIONS = tl.constexpr(3)
AT_ANCESTORS = tl.constexpr(4)
AT_SLOT = tl.constexpr(5)
AT_SPLITS = tl.constexpr(6)
AT_BLOCKS = tl.constexpr(7)
HEAD_STRIDE = tl.constexpr(8)
ITEM = tl.constexpr(8)


@triton.jit
def _merge(peak, mass, acc, peak2, mass2, acc2):
    """Sums of two sets of keys to those of both: peak score, mass of weights, acc sum of weighted values."""
    top = tl.maximum(peak, peak2)
    safe = tl.where(top == float("-inf"), 0.0, top)  # neither has seen anything: weights 0, not nan
    a = tl.exp2(peak - safe)
    b = tl.exp2(peak2 - safe)
    acc = tl.fma(acc, tl.broadcast_to(a[:, None], acc.shape), acc2 * b[:, None])
    return top, tl.fma(mass, a, mass2 * b), acc


@triton.jit
def _ones(x):
    """Bits set in each int64."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return (x + (x >> 32)) & 0x7F


@triton.jit
def _seen(pos, prefix, positions, bits, text_len, TREE: tl.constexpr, WINDOW: tl.constexpr):
    """Bool [M, N]: which of the positions ``pos`` each row sees."""
    seen = pos[None, :] < prefix[:, None]
    if WINDOW:
        seen = seen & (positions[:, None] - pos[None, :] < WINDOW)
    if TREE:
        node = pos - text_len
        inside = (node >= 0) & (node < NODES)
        shift = tl.where(inside, node, 0).to(tl.int64)
        path = bits[:, None] >> shift[None, :]
        own = ((path & 1) != 0) & inside[None, :]
        if WINDOW > 0 and WINDOW < NODES:
            own = own & (_ones(path >> 1) < WINDOW)  # depth grows by one along a path
        seen = seen | own
    return seen


@triton.jit
def _keys(
    peak, mass, acc, q, pos, stop, head, keys, values, table, prefix, positions, bits, text_len, scale,
    K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    TREE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The next tile of keys into the running sums."""
    within = pos < stop
    h = tl.arange(0, BLOCK_H)
    block = tl.load(table + pos // S, mask=within, other=0).to(tl.int64)
    row = ((block * K + head) * S + pos % S) * H
    k = tl.load(keys + row[None, :] + h[:, None], mask=within[None, :] & (h[:, None] < H), other=0.0).to(q.dtype)
    scores = tl.dot(q, k, input_precision="ieee")
    if SOFTCAP > 0.0:
        # tanh from exp2; beyond +-40 it is 1 in float32, and exp2 of what is left stays finite
        x = tl.minimum(tl.maximum(scores * (scale / SOFTCAP), -40.0), 40.0)
        scores = (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)) * (SOFTCAP * LOG2E)
    else:
        scores = scores * (scale * LOG2E)
    seen = _seen(pos, prefix, positions, bits, text_len, TREE, WINDOW)
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(peak - safe)
    mass = tl.fma(mass, fade, tl.sum(weights, 1))
    v = tl.load(values + row[:, None] + h[None, :], mask=within[:, None] & (h[None, :] < H), other=0.0).to(q.dtype)
    acc = tl.dot(weights.to(q.dtype), v, acc * fade[:, None], input_precision="ieee")
    return top, mass, acc


@triton.jit
def _rows(plan, item, head, N: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of an item: live, row, flat row x head, prefix, positions, ancestor bits; each [M]."""
    at = tl.arange(0, BLOCK_M)
    row = tl.load(item) + at // G
    live = at < tl.load(item + 1) * G
    prefix = tl.load(plan + tl.load(plan + AT_PREFIX) + row, mask=live, other=0)
    positions = tl.load(plan + tl.load(plan + AT_POSITIONS) + row, mask=live, other=0x3FFFFFFF)
    words = plan + tl.load(plan + AT_ANCESTORS) + 2 * row
    low = tl.load(words, mask=live, other=0).to(tl.int64) & 0xFFFFFFFF
    bits = low | (tl.load(words + 1, mask=live, other=0).to(tl.int64) << 32)
    return live, row, row.to(tl.int64) * N + head * G + at % G, prefix, positions, bits


@triton.jit
def _split(
    q, begin, stop, tree_from, head, keys, values, table, prefix, positions, bits, text_len, scale,
    K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The sums of the keys ``begin..stop - 1``: first those before the tree, then those among which nodes are."""
    n = tl.arange(0, BLOCK_N)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_H], 0.0, tl.float32)
    for key in range(begin, tl.minimum(stop, tree_from), BLOCK_N):
        peak, mass, acc = _keys(
            peak, mass, acc, q, key + n, stop, head, keys, values, table, prefix, positions, bits, text_len, scale,
            K, S, H, BLOCK_H, False, WINDOW, SOFTCAP,
        )  # fmt: skip
    for key in range(tl.maximum(begin, tree_from), stop, BLOCK_N):
        peak, mass, acc = _keys(
            peak, mass, acc, q, key + n, stop, head, keys, values, table, prefix, positions, bits, text_len, scale,
            K, S, H, BLOCK_H, True, WINDOW, SOFTCAP,
        )  # fmt: skip
    return peak, mass, acc


@triton.jit
def attend(
    q, q_stride, keys, values, plan, out, part_acc, part_ml, scale,
    N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Items of the plan, each for every key head, in turn over the programs of the grid.

    ``EXACT`` computes in float32, for queries and cache of different dtypes; else in the dtype of the queries.
    """
    G: tl.constexpr = N // K
    h = tl.arange(0, BLOCK_H)
    for turn in range(tl.program_id(0), tl.load(plan + ITEMS_COUNT) * K, tl.num_programs(0)):
        head = turn % K
        item = plan + tl.load(plan + AT_ITEMS) + (turn // K) * ITEM
        table = plan + tl.load(plan + AT_BLOCKS) + tl.load(item + 2) + head * tl.load(plan + HEAD_STRIDE)
        first = tl.load(item + 4)
        stop = tl.load(item + 5)
        live, row, column, prefix, positions, bits = _rows(plan, item, head, N, G, BLOCK_M)
        mask = live[:, None] & (h[None, :] < H)
        query_at = row.to(tl.int64) * (q_stride - N * H) + column * H  # = row * q_stride + head of queries * H
        query = tl.load(q + query_at[:, None] + h[None, :], mask=mask, other=0.0)
        if EXACT:
            query = query.to(tl.float32)
        oldest = 0
        if WINDOW > 0:
            oldest = tl.maximum(tl.min(positions, 0) - (WINDOW - 1), 0)
        PEAK = tl.full([BLOCK_M], float("-inf"), tl.float32)
        MASS = tl.full([BLOCK_M], 0.0, tl.float32)
        ACC = tl.full([BLOCK_M, BLOCK_H], 0.0, tl.float32)
        for split in range(tl.maximum(first, oldest // SPLIT * SPLIT), stop, SPLIT):
            peak, mass, acc = _split(
                query, tl.maximum(split, oldest // BLOCK_N * BLOCK_N), tl.minimum(split + SPLIT, stop),
                tl.load(item + 6), head, keys, values, table, prefix, positions, bits, tl.load(item + 3), scale,
                K, S, H, BLOCK_M, BLOCK_N, BLOCK_H, WINDOW, SOFTCAP,
            )  # fmt: skip
            PEAK, MASS, ACC = _merge(PEAK, MASS, ACC, peak, mass, acc)
        if tl.load(item + 7):
            result = ACC / tl.where(MASS == 0.0, 1.0, MASS)[:, None]
            tl.store(out + (column * H)[:, None] + h[None, :], result.to(out.dtype.element_ty), mask=mask)
        else:
            slot = tl.load(plan + tl.load(plan + AT_SLOT) + row, mask=live, other=0) + first // SPLIT
            where = (slot - row).to(tl.int64) * N + column  # = slot * N + head of queries
            tl.store(part_acc + (where * H)[:, None] + h[None, :], ACC, mask=mask)
            tl.store(part_ml + 2 * where, PEAK, mask=live)
            tl.store(part_ml + 2 * where + 1, MASS, mask=live)


@triton.jit
def combine(
    plan, out, part_acc, part_ml,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row (grid axis 0) and key head (axis 1) in order; rows done at once are left alone."""
    G: tl.constexpr = N // K
    t = tl.program_id(0)
    splits = tl.load(plan + tl.load(plan + AT_SPLITS) + t)
    if splits > 0:
        at = tl.arange(0, BLOCK_G)
        h = tl.arange(0, BLOCK_H)
        live = at < G
        mask = live[:, None] & (h[None, :] < H)
        column = tl.program_id(1) * G + at
        slot = tl.load(plan + tl.load(plan + AT_SLOT) + t).to(tl.int64)
        PEAK = tl.full([BLOCK_G], float("-inf"), tl.float32)
        MASS = tl.full([BLOCK_G], 0.0, tl.float32)
        ACC = tl.full([BLOCK_G, BLOCK_H], 0.0, tl.float32)
        for split in range(0, splits):
            where = (slot + split) * N + column
            peak = tl.load(part_ml + 2 * where, mask=live, other=float("-inf"))
            mass = tl.load(part_ml + 2 * where + 1, mask=live, other=0.0)
            acc = tl.load(part_acc + (where * H)[:, None] + h[None, :], mask=mask, other=0.0)
            PEAK, MASS, ACC = _merge(PEAK, MASS, ACC, peak, mass, acc)
        result = ACC / tl.where(MASS == 0.0, 1.0, MASS)[:, None]
        where = (t.to(tl.int64) * N + column) * H
        tl.store(out + where[:, None] + h[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def write(
    k, k_stride, v, v_stride, keys, values, slots,
    K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row (grid axis 0) of keys and values to its slot."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    i = tl.arange(0, BLOCK)
    live = i < K * H
    where = ((slot // S * K + i // H) * S + slot % S) * H + i % H
    tl.store(keys + where, tl.load(k + t * k_stride + i, mask=live).to(keys.dtype.element_ty), mask=live)
    tl.store(values + where, tl.load(v + t * v_stride + i, mask=live).to(values.dtype.element_ty), mask=live)


@triton.jit
def move(
    keys, values, slots, held, K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """One slot (grid axis 0) of keys and values to its row of ``held``, ``[slots, 2, K, H]``; ``BACK``: from there."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    i = tl.arange(0, BLOCK)
    live = i < K * H
    where = ((slot // S * K + i // H) * S + slot % S) * H + i % H
    aside = held + t * (2 * K * H) + i
    if BACK:
        tl.store(keys + where, tl.load(aside, mask=live), mask=live)
        tl.store(values + where, tl.load(aside + K * H, mask=live), mask=live)
    else:
        tl.store(aside, tl.load(keys + where, mask=live), mask=live)
        tl.store(aside + K * H, tl.load(values + where, mask=live), mask=live)
