"""The flat batch against loops over requests and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steeple.cache.batch import BatchMaker, Span, make_batch, tree_shape
from steeple.draft.base import chain_forest
from steeple.errors import InternalError
from steeple.types import MAX_NODES, Batch, Draft


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


def made(maker: BatchMaker, spans: list[Span], draft: Draft) -> Batch:
    """The same batch from the fast twin."""
    return maker.make(
        [s.request_id for s in spans],
        [s.blocks for s in spans],
        np.array([s.start for s in spans]),
        np.array([len(s.tokens) for s in spans]),
        np.concatenate([s.tokens for s in spans]),
        draft,
    )


def assert_equal(found: Batch, expected: Batch) -> None:
    """All fields equal; the tables as far as they go."""
    assert found.request_ids == expected.request_ids
    for name in ("tokens", "positions", "slots", "node_rows"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    own, other = found.layout, expected.layout
    for name in ("cu_rows", "prefix", "ancestors", "text_len", "positions", "node_row"):
        one, two = getattr(own, name), getattr(other, name)
        assert one.dtype == two.dtype, name
        assert torch.equal(one, two), name
    assert own.block_size == other.block_size
    for b in range(len(found.request_ids)):
        table = other.blocks[other.cu_blocks[b] : other.cu_blocks[b + 1]]
        first, end = own.cu_blocks[b : b + 2].tolist()
        assert own.blocks[first : first + len(table)].tolist() == table.tolist()
        assert not own.blocks[first + len(table) : end].any(), "room reads as block 0"


@pytest.mark.parametrize("seed", range(10))
def test_the_maker_equals_make_batch(seed: int) -> None:
    """Any batches one after the other through one maker, the same shapes among them."""
    maker = BatchMaker(3, "cpu")
    for other in (seed, seed + 1, seed, seed + 100):
        spans, draft = a_batch(other)
        assert_equal(made(maker, spans, draft), make_batch(spans, draft, 3, "cpu"))


@pytest.mark.parametrize("nodes", [0, 1, 4])
def test_the_maker_follows_decoding(nodes: int) -> None:
    """One row each and a chain, round after round: tables grow, requests leave, join, and come back with new blocks."""
    numbers = np.random.default_rng(nodes)
    maker, free = BatchMaker(4, "cpu"), iter(numbers.permutation(4000).tolist())
    names = ["a", "b", "c"]
    start = {"a": 0, "b": 7, "c": 30, "d": 2}
    table: dict[str, list[int]] = {name: [] for name in start}
    for turn in range(60):
        if turn == 20:
            names = ["a", "c", "d"]
        if turn == 40:
            names, table["b"], table["c"] = ["b", "c", "a"], [], []
        for name in names:
            start[name] += int(numbers.integers(1, nodes + 2))
            while len(table[name]) * 4 < start[name] + 1 + nodes:
                table[name].append(next(free))
        counts = [nodes if turn % 3 else int(numbers.integers(nodes + 1)) for _ in names]
        cu, parent = chain_forest(np.array(counts))
        draft = Draft(
            torch.from_numpy(numbers.integers(50, size=sum(counts))),
            parent,
            cu,
            torch.full((sum(counts),), -1),
            chain=bool(turn % 2),
        )
        spans = [Span(name, start[name], numbers.integers(50, size=1), table[name]) for name in names]
        assert_equal(made(maker, spans, draft), make_batch(spans, draft, 4, "cpu"))


def test_the_maker_tells_a_chain_from_a_tree_of_its_size() -> None:
    maker, cu = BatchMaker(4, "cpu"), torch.tensor([0, 3])
    spans = [Span("r", 5, np.array([1]), [3, 1, 2])]
    for parent, chain in (([-1, -1, 1], False), ([-1, 0, 1], True), ([-1, 0, 0], False)):
        draft = Draft(torch.arange(3), torch.tensor(parent), cu, torch.full((3,), -1), chain=chain)
        assert_equal(made(maker, spans, draft), make_batch(spans, draft, 4, "cpu"))


def test_too_many_nodes_are_refused_by_the_maker() -> None:
    n = MAX_NODES + 1
    nodes = torch.arange(n)
    draft = Draft(nodes, nodes - 1, torch.tensor([0, n]), torch.full((n,), -1), chain=True)
    with pytest.raises(InternalError, match=f"{n} nodes; at most {MAX_NODES}"):
        made(BatchMaker(1, "cpu"), [Span("r", 0, np.array([1]), list(range(n + 1)))], draft)
