"""Drafters that exist to be difficult: trees of chosen and of drawn tokens, of every shape, and mixtures of drafters.

Their shapes and chosen tokens are functions of the committed text, so that they never look at what was drawn.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.cache.paged import PagedCache
from steeple.draft.base import Drafter, Needs
from steeple.errors import InternalError
from steeple.model.decoder import Hidden
from steeple.ops.rng import Stream, uniform
from steeple.request import Request
from steeple.types import Batch, Draft, concat_drafts

Law = NDArray[np.float32]


@dataclass
class Tree:
    """The nodes of one request, numbered within it; ``row`` -1 = chosen, else a row of ``laws``."""

    tokens: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    laws: list[Law] = field(default_factory=list)

    def path(self, node: int) -> list[int]:
        """Tokens from the root down to ``node``; none for -1."""
        return [] if node < 0 else [*self.path(self.parent[node]), self.tokens[node]]


def forest(trees: Sequence[Tree]) -> Draft:
    """One forest out of a tree per request."""
    tokens, parent, row, cu = [], [], [], [0]
    laws: list[Law] = []
    for tree in trees:
        base = cu[-1]
        tokens += tree.tokens
        parent += [p + base if p >= 0 else -1 for p in tree.parent]
        row += [r + len(laws) if r >= 0 else -1 for r in tree.row]
        laws += tree.laws
        cu.append(base + len(tree.tokens))

    def whole(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return Draft(
        whole(tokens), whole(parent), whole(cu), whole(row), torch.from_numpy(np.stack(laws)) if laws else None
    )


def text_key(request: Request, path: Sequence[int] = ()) -> int:
    """A number that is a function of the committed text, and of a path below it."""
    return zlib.crc32(request.tokens.tobytes() + np.array(path, dtype=np.int64).tobytes())


def dice(request: Request) -> np.random.Generator:
    """Numbers that are a function of the committed text."""
    return np.random.default_rng(text_key(request))


@functools.lru_cache(maxsize=100_000)
def some_law(vocab: int, key: int) -> Law:
    """A random law, neither flat nor one-hot."""
    weight = np.exp(np.random.default_rng(key).normal(size=vocab) * 1.5)
    return (weight / weight.sum()).astype(np.float32)


class Stateless:
    """What the test drafters share. They remember whom they served, to be caught if nobody tells them to forget."""

    def __init__(self, vocab: int, nodes: int) -> None:
        self.vocab, self.needs = vocab, Needs(nodes=nodes)
        self._served: set[str] = set()

    def prepare(self, cache: PagedCache) -> None: ...

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        self._served.update(r.id for r in requests)
        return forest([self.grow(r, n) for r, n in zip(requests, budget, strict=True)])

    def grow(self, request: Request, nodes: int) -> Tree:
        raise NotImplementedError

    def observe(
        self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden
    ) -> None: ...

    def forget(self, request: Request) -> None:
        self._served.discard(request.id)

    def check_integrity(self) -> None:
        if self._served:
            raise InternalError(f"{sorted(self._served)} were not forgotten")


class RandomTree(Stateless):
    """A random tree of chosen tokens; siblings may repeat a token."""

    def grow(self, request: Request, nodes: int) -> Tree:
        numbers = dice(request)
        parent = [int(numbers.integers(-1, i)) if i else -1 for i in range(nodes)]
        return Tree([int(t) for t in numbers.integers(self.vocab, size=nodes)], parent, [-1] * nodes)


class DrawnTree(Stateless):
    """A random tree of drawn tokens: siblings are i.i.d. draws that share the row of their law."""

    def chosen(self, numbers: np.random.Generator) -> bool:
        """Whether the next node is chosen after all."""
        return False

    def grow(self, request: Request, nodes: int) -> Tree:
        numbers = dice(request)
        tree = Tree()
        law_of: dict[int, int] = {}
        seed, counter = torch.full((nodes,), request.seed), torch.full((nodes,), len(request))
        u = uniform(seed, counter, Stream.DRAFT, torch.arange(nodes)).numpy()
        for node in range(nodes):
            # Shapes with many siblings near the root, so that refusals are followed by siblings.
            parent = int(numbers.integers(-1, max(1, node // 2))) if node else -1
            choose, token = self.chosen(numbers), int(numbers.integers(self.vocab))
            row = -1
            if not choose:
                if parent not in law_of:
                    law_of[parent] = len(tree.laws)
                    tree.laws.append(some_law(self.vocab, text_key(request, tree.path(parent))))
                row = law_of[parent]
                total = tree.laws[row].astype(np.float64).cumsum()
                token = int(np.searchsorted(total, u[node] * total[-1], side="right"))
            tree.tokens.append(token)
            tree.parent.append(parent)
            tree.row.append(row)
        return tree


class Motley(DrawnTree):
    """Chosen and drawn tokens mixed, also among siblings."""

    def chosen(self, numbers: np.random.Generator) -> bool:
        return bool(numbers.random() < 0.5)


class Ragged(Stateless):
    """Chains of every length from none to the whole budget, of tokens that stand in the text."""

    def grow(self, request: Request, nodes: int) -> Tree:
        numbers = dice(request)
        length = int(numbers.integers(nodes + 1))
        tokens = numbers.choice(request.tokens, size=length).tolist()
        return Tree(tokens, list(range(-1, length - 1)), [-1] * length)


class Mixed:
    """Several drafters, each for its share of the requests, by their ids."""

    def __init__(self, *parts: Drafter) -> None:
        self._parts = parts
        self.needs = Needs(nodes=max(p.needs.nodes for p in parts))

    def _whose(self, request: Request) -> int:
        return zlib.crc32(request.id.encode()) % len(self._parts)

    def prepare(self, cache: PagedCache) -> None:
        for part in self._parts:
            part.prepare(cache)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        shares = []
        for index, part in enumerate(self._parts):
            # Backwards, because no order of the places is promised.
            places = [b for b, r in enumerate(requests) if self._whose(r) == index][::-1]
            if places:
                shares.append((places, part.propose([requests[b] for b in places], [budget[b] for b in places])))
        return concat_drafts(shares[::-1], len(requests))

    def observe(
        self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden
    ) -> None: ...

    def forget(self, request: Request) -> None:
        self._parts[self._whose(request)].forget(request)

    def check_integrity(self) -> None:
        for part in self._parts:
            part.check_integrity()


class Forced(Stateless):
    """Knows the greedy outputs and makes the target refuse at depth ``len(text) % (nodes + 1)``, decoys before truths.

    ``decoys``: every depth holds a wrong token in front of the right one, so that accepted paths must be moved.
    """

    def __init__(self, vocab: int, depth: int, oracle: dict[str, list[int]], *, decoys: bool) -> None:
        super().__init__(vocab, depth * (2 if decoys else 1))
        self._oracle, self._decoys, self._depth = oracle, decoys, depth
        self.refused_at: set[int] = set()

    def grow(self, request: Request, nodes: int) -> Tree:
        right = self._oracle[request.id][request.written :][: self._depth]
        refuse_at = len(request) % (self._depth + 1)
        tree, above = Tree(), -1
        for depth, token in enumerate(right):
            wrong = (token + 1) % self.vocab
            for proposal in (wrong, token) if self._decoys else (token,):
                if len(tree.tokens) < nodes:
                    tree.tokens.append(wrong if depth >= refuse_at else proposal)
                    tree.parent.append(above)
                    tree.row.append(-1)
            if depth == refuse_at:
                self.refused_at.add(depth)
            above = len(tree.tokens) - 1
        return tree


class Checked:
    """Passes everything on, and checks every proposal by the law of drafts."""

    def __init__(self, drafter: Drafter, vocab: int) -> None:
        self.drafter, self._vocab = drafter, vocab
        self.needs = drafter.needs
        self.prepare, self.observe, self.forget = drafter.prepare, drafter.observe, drafter.forget
        self.check_integrity = drafter.check_integrity

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        draft = self.drafter.propose(requests, budget)
        check_draft(draft, budget, self._vocab)
        return draft


def check_draft(draft: Draft, budget: Sequence[int], vocab: int) -> None:
    """Law: parents before children and of the same request, offsets monotone, laws normalised, draws possible."""
    cu, N = draft.cu, draft.tokens.shape[0]
    assert cu.shape[0] == len(budget) + 1, "offsets for another number of requests"
    assert int(cu[0]) == 0, "the offsets do not begin at 0"
    assert int(cu[-1]) == N, "the offsets do not end at the last node"
    assert (draft.counts >= 0).all(), "the offsets go backwards"
    assert (draft.counts <= torch.tensor(list(budget))).all(), "more nodes than the budget"
    assert draft.parent.shape == draft.row.shape == (N,), "arrays of unequal length"
    owner = torch.repeat_interleave(torch.arange(len(budget)), draft.counts)
    has = draft.parent >= 0
    assert (draft.parent < torch.arange(N)).all(), "a child before its parent"
    assert (draft.parent >= -1).all(), "a parent that is nothing"
    assert (owner[draft.parent[has]] == owner[has]).all(), "a parent of another request"
    assert ((draft.tokens >= 0) & (draft.tokens < vocab)).all(), "a token outside the vocabulary"
    drawn = draft.row >= 0
    assert (draft.row >= -1).all(), "a row that is nothing"
    if drawn.any():
        assert draft.probs is not None, "drawn tokens without laws"
        assert draft.probs.shape[1] == vocab, "laws over another vocabulary"
        assert torch.isfinite(draft.probs).all(), "laws that are no numbers"
        assert (draft.probs >= 0).all(), "negative probabilities"
        assert torch.allclose(draft.probs.sum(-1), torch.ones(len(draft.probs)), atol=1e-5), "laws that do not sum to 1"
        rows = draft.row[drawn]
        assert (draft.probs[rows, draft.tokens[drawn]] > 0).all(), "a drawn token of probability 0"
        first = {}
        for row, parent in zip(rows.tolist(), draft.parent[drawn].tolist(), strict=True):
            assert first.setdefault(row, parent) == parent, "a law shared by nodes that are no siblings"
