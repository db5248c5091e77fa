"""The forest of chains with their leaves, against building it node by node."""

from __future__ import annotations

import numpy as np
import pytest

from steeple.draft.tree import chain_with_leaves


def by_hand(chain: list[int], leaves: list[list[int]], depth: int, nodes: int) -> list[tuple[int, int]]:
    """(token, parent within the request) of each node: the chain, then leaves from the root on."""
    out = [(chain[d], d - 1) for d in range(min(depth, nodes))]
    for d in range(depth):
        out += [(leaf, d - 1) for leaf in leaves[d]]
    return out[:nodes]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_forest_is_what_one_builds_by_hand(width: int) -> None:
    rng = np.random.default_rng(width)
    chain, leaves = rng.integers(0, 99, (6, 4)), rng.integers(0, 99, (6, 4, width - 1))
    depth, nodes = np.array([4, 0, 2, 4, 1, 3]), np.array([63, 0, 3, 4, 2, 5])
    draft = chain_with_leaves(chain, leaves, depth, nodes, "cpu")
    cu = draft.cu.tolist()
    for b in range(6):
        expected = by_hand(chain[b].tolist(), leaves[b].tolist(), int(depth[b]), int(nodes[b]))
        own = slice(cu[b], cu[b + 1])
        parents = [p - cu[b] if p >= 0 else -1 for p in draft.parent[own].tolist()]
        assert list(zip(draft.tokens[own].tolist(), parents, strict=True)) == expected
    assert draft.row.tolist() == [-1] * cu[-1]
    assert draft.chain == (width == 1)
