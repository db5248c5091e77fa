"""The flat batch against loops over requests and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steeple.cache.batch import Span, make_batch, tree_shape
from steeple.errors import InternalError
from steeple.types import MAX_NODES, Draft


def a_batch(seed: int) -> tuple[list[Span], Draft]:
    numbers = np.random.default_rng(seed)
    spans, tokens, parent, cu = [], [], [], [0]
    for b in range(6):
        start, length, nodes = int(numbers.integers(9)), int(numbers.integers(1, 8)), int(numbers.integers(5))
        blocks = numbers.permutation(100)[: -(-(start + length + nodes) // 3)].tolist()
        spans.append(Span(f"r{b}", start, numbers.integers(50, size=length), blocks))
        for j in range(nodes):
            above = int(numbers.integers(-1, j)) if j else -1
            parent.append(above + cu[-1] if above >= 0 else -1)
        tokens.extend(numbers.integers(50, size=nodes).tolist())
        cu.append(cu[-1] + nodes)
    whole = [torch.tensor(x, dtype=torch.int64) for x in (tokens, parent, cu)]
    return spans, Draft(*whole, torch.full((cu[-1],), -1))


@pytest.mark.parametrize("seed", range(10))
def test_equals_the_loop(seed: int) -> None:
    spans, draft = a_batch(seed)
    batch = make_batch(spans, draft, 3, "cpu")
    layout, cu, t = batch.layout, draft.cu.tolist(), 0
    node_rows = []
    for b, span in enumerate(spans):
        assert layout.cu_rows[b] == t
        table = span.blocks
        assert layout.blocks[layout.cu_blocks[b] : layout.cu_blocks[b + 1]].tolist() == table
        end = span.start + len(span.tokens)
        assert layout.text_len[b] == end
        for i, token in enumerate(span.tokens):
            where = span.start + i
            row = (batch.tokens[t], batch.positions[t], layout.positions[t], layout.prefix[t], layout.ancestors[t])
            assert [int(x) for x in row] == [token, where, where, where + 1, 0]
            assert batch.slots[t] == table[where // 3] * 3 + where % 3
            t += 1
        assert layout.node_row[b] == t
        for j in range(cu[b + 1] - cu[b]):
            line, bits = cu[b] + j, 0
            depth = -1
            while line >= 0:
                bits |= 1 << (line - cu[b])
                depth += 1
                line = int(draft.parent[line])
            where = end + j
            row = (batch.tokens[t], batch.positions[t], layout.positions[t], layout.prefix[t], layout.ancestors[t])
            assert [int(x) for x in row] == [int(draft.tokens[cu[b] + j]), end + depth, end + depth, end, bits]
            assert batch.slots[t] == table[where // 3] * 3 + where % 3
            node_rows.append(t)
            t += 1
    assert layout.cu_rows[-1] == t == len(batch.tokens)
    assert batch.node_rows.tolist() == node_rows
    assert batch.request_ids == tuple(s.request_id for s in spans)


def test_tree_shape_of_a_long_chain_and_a_star() -> None:
    chain, star = np.arange(-1, MAX_NODES - 1), np.full(4, -1)
    cu = np.array([0, MAX_NODES, MAX_NODES, MAX_NODES + 4])
    depth, bits = tree_shape(np.concatenate((chain, star)), cu)
    assert depth.tolist() == [*range(MAX_NODES), 0, 0, 0, 0]
    assert bits[MAX_NODES - 1] == 2**MAX_NODES - 1
    assert bits[-4:].tolist() == [1, 2, 4, 8]


def test_too_many_nodes_are_refused() -> None:
    n = MAX_NODES + 1
    nodes = torch.arange(n)
    draft = Draft(nodes, nodes - 1, torch.tensor([0, n]), torch.full((n,), -1))
    with pytest.raises(InternalError, match=f"{n} nodes; at most {MAX_NODES}"):
        make_batch([Span("r", 0, np.array([1]), list(range(n + 1)))], draft, 1, "cpu")
