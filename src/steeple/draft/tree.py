"""A chain with its runners-up: at every depth the likeliest token goes on, the next likeliest are leaves beside it.

It costs no pass more than the chain. Where verification of a few rows more is free, each leaf is another chance at its
depth. For chosen (greedy) tokens only.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from steeple.cache.batch import Ints
from steeple.types import Draft


def chain_with_leaves(chain: Ints, leaves: Ints, depth: Ints, nodes: Ints, device: torch.device | str) -> Draft:
    """The forest.

    Args:
        chain: ``[B, deepest]`` tokens that go on.
        leaves: ``[B, deepest, W]`` tokens beside them, likeliest first.
        depth: ``[B]`` depth of each request's chain, 0 for none.
        nodes: ``[B]`` most nodes of each; the leaves nearest to the root come first.

    The nodes of a chain come first, so that a path along it need not move in the cache.
    """
    W = leaves.shape[2]
    counts = np.minimum(nodes, depth * (1 + W))
    cu = np.concatenate(([0], np.cumsum(counts)))
    owner = np.repeat(np.arange(counts.shape[0]), counts)
    number = np.arange(int(cu[-1])) - cu[owner]
    beside = number - depth[owner]  # number of the leaf, negative for a node of the chain
    is_leaf = beside >= 0
    at: NDArray[np.int64] = np.where(is_leaf, beside // max(W, 1), number)
    tokens = np.concatenate((chain[:, :, None], leaves), axis=2)[
        owner, at, np.where(is_leaf, 1 + beside % max(W, 1), 0)
    ]
    parent = np.where(at > 0, cu[owner] + at - 1, -1)
    flat = torch.from_numpy(tokens).to(device)
    chosen = torch.full_like(flat, -1)
    return Draft(flat, torch.from_numpy(parent), torch.from_numpy(cu), chosen, chain=not is_leaf.any())
