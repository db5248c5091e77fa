"""Requests and their draft to one flat batch: positions, slots, block table and who sees whom, without a Python loop
over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.errors import InternalError
from steeple.types import MAX_NODES, Batch, Draft, KVLayout

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """The text rows of one request in a step: ``tokens`` stand at positions ``start``..``start + len(tokens) - 1``.

    ``blocks``: the request's block table, with room for the text and the nodes behind it.
    """

    request_id: str
    start: int
    tokens: Ints
    blocks: Sequence[int]


def tree_shape(parent: Ints, cu: Ints) -> tuple[Ints, Ints]:
    """Depth (0 = child of the root) and ancestor bits (itself included) of every node of a forest."""
    counts = np.diff(cu)
    depth = np.zeros(parent.shape[0], dtype=np.int64)
    bits = np.zeros(parent.shape[0], dtype=np.int64)
    for j in range(int(counts.max()) if counts.size else 0):
        node = cu[:-1][counts > j] + j
        above = parent[node]
        has = above >= 0
        safe = np.where(has, above, 0)
        depth[node] = np.where(has, depth[safe] + 1, 0)
        bits[node] = np.where(has, bits[safe], 0) | (1 << j)
    return depth, bits


def make_batch(spans: Sequence[Span], draft: Draft, block_size: int, device: torch.device | str) -> Batch:
    """The flat batch of ``spans`` with the nodes of ``draft`` behind each request's text rows."""
    B = len(spans)
    starts = np.fromiter((s.start for s in spans), np.int64, B)
    lengths = np.fromiter((s.tokens.shape[0] for s in spans), np.int64, B)
    node_cu = draft.cu.numpy()
    nodes = np.diff(node_cu)
    if nodes.size and nodes.max() > MAX_NODES:
        raise InternalError(f"a draft of {nodes.max()} nodes; at most {MAX_NODES} fit")
    rows = lengths + nodes
    cu_rows = np.concatenate(([0], np.cumsum(rows)))
    T = int(cu_rows[-1])
    owner = np.repeat(np.arange(B), rows)
    within = np.arange(T) - cu_rows[owner]
    text_len = starts + lengths
    is_node = within >= lengths[owner]
    node_rows = np.flatnonzero(is_node)
    storage = starts[owner] + within  # sequence position that the row's keys are staged at
    depth, bits = tree_shape(draft.parent.numpy(), node_cu)
    positions = storage.copy()
    positions[node_rows] = text_len[owner[node_rows]] + depth
    prefix = np.where(is_node, text_len[owner], storage + 1)
    ancestors = np.zeros(T, dtype=np.int64)
    ancestors[node_rows] = bits

    block_counts = np.fromiter((len(s.blocks) for s in spans), np.int64, B)
    cu_blocks = np.concatenate(([0], np.cumsum(block_counts)))
    blocks = np.fromiter((b for s in spans for b in s.blocks), np.int64, int(cu_blocks[-1]))
    slots = blocks[cu_blocks[owner] + storage // block_size] * block_size + storage % block_size

    tokens = np.zeros(T, dtype=np.int64)
    tokens[~is_node] = np.concatenate([s.tokens for s in spans]) if B else []
    tokens_T = torch.from_numpy(tokens).to(device)
    node_rows_N = torch.from_numpy(node_rows)
    if node_rows.size:
        tokens_T[node_rows_N.to(device)] = draft.tokens
    layout = KVLayout(
        cu_rows=_int32(cu_rows),
        blocks=_int32(blocks),
        cu_blocks=_int32(cu_blocks),
        block_size=block_size,
        prefix=_int32(prefix),
        ancestors=torch.from_numpy(ancestors),
        text_len=_int32(text_len),
        positions=_int32(positions),
        node_row=_int32(cu_rows[:-1] + lengths),
    )
    return Batch(
        tuple(s.request_id for s in spans),
        tokens_T,
        torch.from_numpy(positions).to(device),
        torch.from_numpy(slots).to(device),
        layout,
        node_rows_N,
    )


def _int32(values: Ints) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
