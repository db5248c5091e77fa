"""Random steps for attention: prompts, chunks, decode rows and trees, laid out as the engine lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steeple.cache.batch import Span, make_batch
from steeple.types import Draft, KVLayout


@dataclass(frozen=True)
class Ask:
    """``cached`` positions, then ``text`` rows, then a node per entry of ``parents`` (-1 = the newest text)."""

    cached: int
    text: int
    parents: Sequence[int] = ()


TREE = (-1, -1, 0, 0, 1, 2, 2, 3, 5, -1, 9)
CHAIN = tuple(range(-1, 62))
MIXED = (
    Ask(0, 21),  # a prompt
    Ask(37, 13),  # a chunk of one, with a cached prefix
    Ask(70, 1),  # plain decoding
    Ask(5, 0),  # nothing to do in this step
    Ask(64, 1, (-1, 0, 1, 2, 3)),  # a chain
    Ask(90, 1, TREE),
    Ask(0, 1, (-1, -1)),
    Ask(130, 3, (-1, 0, 0, 1, 1, 2, 2, -1)),
)
LONG = (Ask(330, 1, TREE), Ask(200, 40), Ask(170, 1, CHAIN), Ask(257, 1))
FEW = (Ask(140, 1, TREE), Ask(70, 9), Ask(101, 1))


def forest(asks: Sequence[Ask]) -> Draft:
    counts = np.array([len(a.parents) for a in asks], dtype=np.int64)
    cu = np.concatenate(([0], counts.cumsum()))
    parent = [p + int(base) if p >= 0 else -1 for a, base in zip(asks, cu, strict=False) for p in a.parents]
    N = len(parent)
    return Draft(
        torch.zeros(N, dtype=torch.int64),
        torch.tensor(parent, dtype=torch.int64),
        torch.from_numpy(cu),
        torch.full((N,), -1),
    )


def blocks_needed(asks: Sequence[Ask], size: int) -> int:
    return sum(-(-(a.cached + a.text + len(a.parents)) // size) for a in asks)


def layout_of(asks: Sequence[Ask], size: int, *, seed: int = 0, spare: int = 3) -> KVLayout:
    """Blocks in random order, with ``spare`` ones that nobody owns."""
    free = np.random.default_rng(seed).permutation(blocks_needed(asks, size) + spare).tolist()
    spans = []
    for number, ask in enumerate(asks):
        held = [free.pop() for _ in range(blocks_needed([ask], size))]
        spans.append(Span(f"r{number}", ask.cached, np.zeros(ask.text, dtype=np.int64), held))
    return make_batch(spans, forest(asks), size, "cpu").layout


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32


@dataclass
class Step:
    """Queries ``[T, N, H]`` and a layer of the cache ``[P, K, S, H]``, on the CPU."""

    q: Tensor
    keys: Tensor
    values: Tensor
    layout: KVLayout


def make_step(asks: Sequence[Ask], shape: Shape, seed: int = 0) -> Step:
    layout = layout_of(asks, shape.block_size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_needed(asks, shape.block_size) + 3
    cache = torch.randn((2, blocks, shape.kv_heads, shape.block_size, shape.head_dim), generator=generator)
    q = torch.randn((layout.prefix.shape[0], shape.heads, shape.head_dim), generator=generator)
    keys, values = cache.to(shape.dtype).unbind(0)
    return Step(q.to(shape.dtype), keys, values, layout)


def random_asks(rng: np.random.Generator, longest: int) -> list[Ask]:
    asks = []
    for _ in range(rng.integers(1, 6)):
        parents = [int(rng.integers(-1, j)) if j else -1 for j in range(rng.integers(0, 30))]
        asks.append(Ask(int(rng.integers(0, longest)), int(rng.integers(1 if parents else 0, 40)), parents))
    return asks
