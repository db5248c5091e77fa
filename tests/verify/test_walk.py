"""The walk and its rules against a walk over one request at a time, and their laws by counting."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from steeple.draft.base import chain_forest
from steeple.ops.law import Laws, draw
from steeple.ops.rng import Generators, Stream, uniform
from steeple.types import Draft, SamplingParams, Verdict
from steeple.verify import verify
from steeple.verify.chains import chosen_nodes, greedy_chains, reject_chains
from steeple.verify.greedy import Greedy
from steeple.verify.rejection import Rejection
from steeple.verify.walk import walk

V = 5


def random_forest(numbers: np.random.Generator, requests: int, most: int) -> Draft:
    """Chosen tokens, random trees of 0 to ``most`` nodes."""
    counts = numbers.integers(most + 1, size=requests)
    cu = np.concatenate(([0], np.cumsum(counts)))
    parent = [
        int(cu[b] + numbers.integers(j)) if j and numbers.random() < 0.7 else -1
        for b, count in enumerate(counts)
        for j in range(count)
    ]
    n = int(cu[-1])
    return Draft(
        torch.from_numpy(numbers.integers(V, size=n)),
        torch.tensor(parent, dtype=torch.int64),
        torch.from_numpy(cu),
        torch.full((n,), -1, dtype=torch.int64),
    )


def law_rows(draft: Draft) -> tuple[Tensor, Tensor]:
    """Rows as the engine lays them out: each request's root, then its nodes."""
    B = draft.counts.shape[0]
    root = draft.cu[:-1] + torch.arange(B)
    owner = torch.repeat_interleave(torch.arange(B), draft.counts)
    return root, torch.arange(draft.tokens.shape[0]) + owner + 1


def split(verdict: Verdict) -> list[list[int]]:
    cu = verdict.cu.tolist()
    return [verdict.tokens[a:b].tolist() for a, b in itertools.pairwise(cu)]


@pytest.mark.parametrize("seed", range(20))
def test_greedy_walk_equals_walking_one_by_one(seed: int) -> None:
    draft = random_forest(np.random.default_rng(seed), 7, 9)
    root, node = law_rows(draft)
    choice = torch.randint(V, (int(node.max() if len(node) else 0) + 8,), generator=torch.Generator().manual_seed(seed))
    verdict = walk(draft, Greedy(draft, choice), root, node)
    cu, kept, tokens, rows = draft.cu.tolist(), [], [], []
    for b in range(7):
        at, law, own = -1, int(root[b]), []
        for j in range(cu[b], cu[b + 1]):
            if int(draft.parent[j]) == at and int(draft.tokens[j]) == int(choice[law]):
                kept.append(j)
                rows.append(law)
                own.append(int(draft.tokens[j]))
                at, law = j, int(node[j])
        rows.append(law)
        tokens.append([*own, int(choice[law])])
    assert split(verdict) == tokens
    assert verdict.kept.tolist() == kept
    assert verdict.row.tolist() == rows
    assert len(verdict.kept) == len(verdict.tokens) - 7


def test_no_nodes_at_all() -> None:
    draft = Draft.empty(3)
    root, node = law_rows(draft)
    verdict = walk(draft, Greedy(draft, torch.tensor([4, 3, 2])), root, node)
    assert split(verdict) == [[4], [3], [2]]
    assert verdict.kept.size == 0


def naive_rejection(
    draft: Draft, probs: Tensor, root: Tensor, node: Tensor, seed: Tensor, counter: Tensor
) -> list[list[int]]:
    """Speculative sampling as the papers write it, one request, one node at a time, in float64."""
    out = []
    cu = draft.cu.tolist()
    for b in range(len(cu) - 1):
        at, own = -1, []
        p = probs[root[b]].double()
        for j in range(cu[b], cu[b + 1]):
            if int(draft.parent[j]) != at:
                continue
            x, row = int(draft.tokens[j]), int(draft.row[j])
            q = torch.nn.functional.one_hot(torch.tensor(x), V).double() if row < 0 else draft.probs[row].double()
            u = float(uniform(seed[b : b + 1], counter[b : b + 1], Stream.ACCEPT, j - cu[b]))
            if u < min(1.0, float(p[x] / q[x])):
                own.append(x)
                at, p = j, probs[node[j]].double()
            else:
                p = (p - q).clamp(min=0)
                p = p / p.sum()
        u = uniform(seed[b : b + 1], counter[b : b + 1], Stream.FINAL)
        out.append([*own, int(draw(p[None], u))])
    return out


@pytest.mark.parametrize("seed", range(20))
def test_rejection_equals_the_papers_one_by_one(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    draft = random_forest(numbers, 6, 8)
    n = draft.tokens.shape[0]
    laws = torch.randn(n, V, generator=generator).softmax(-1)
    # Siblings share a row; about a third of the nodes are chosen.
    first = {}
    row = torch.tensor([first.setdefault((int(p), b), j) for j, (p, b) in enumerate(_places(draft))], dtype=torch.int64)
    row[torch.from_numpy(numbers.random(n) < 0.3)] = -1
    draft = Draft(draft.tokens, draft.parent, draft.cu, row, laws if n else None)
    root, node = law_rows(draft)
    probs = torch.randn(n + 6, V, generator=generator).softmax(-1)
    who, when = torch.arange(6) + 10 * seed, torch.arange(6)
    verdict = walk(draft, Rejection(draft, probs, who, when), root, node)
    assert split(verdict) == naive_rejection(draft, probs, root, node, who, when)


def _places(draft: Draft) -> list[tuple[int, int]]:
    owner = torch.repeat_interleave(torch.arange(draft.counts.shape[0]), draft.counts)
    return list(zip(draft.parent.tolist(), owner.tolist(), strict=True))


def sample(kind: str, p: Tensor, q: Tensor, n: int = 20_000) -> Tensor:
    """First tokens of ``n`` requests with three siblings under the root, judged by ``p``."""
    who, when = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    cu = torch.arange(n + 1) * 3
    owner = torch.arange(n).repeat_interleave(3)
    lane = torch.arange(3).repeat(n)
    drawn = draw(q.expand(3 * n, -1), uniform(who[owner], when[owner], Stream.DRAFT, lane))
    chosen = torch.tensor([2, 0, 2]).repeat(n)
    is_drawn = {"drawn": lane >= 0, "chosen": lane < 0, "both": lane != 1}[kind]
    draft = Draft(
        torch.where(is_drawn, drawn, chosen),
        torch.full((3 * n,), -1),
        cu,
        torch.where(is_drawn, 0, -1),
        q[None],
    )
    params = [SamplingParams(temperature=1.0)]
    laws = Laws.of(params * n)
    logits = p.log().expand(4 * n, -1)
    verdict = verify(logits, draft, laws, Generators(who.tolist()), when.numpy())
    return torch.from_numpy(verdict.tokens[verdict.cu[:-1]])


@pytest.mark.parametrize("kind", ["drawn", "chosen", "both"])
def test_the_law_is_the_targets(kind: str) -> None:
    """False alarm below 1e-6; draws are fixed."""
    p = torch.tensor([0.45, 0.05, 0.3, 0.2])
    q = torch.tensor([0.1, 0.6, 0.3, 0.0])
    counts = torch.bincount(sample(kind, p, q), minlength=4).double()
    assert stats.chisquare(counts.numpy(), (p.double() / p.double().sum() * counts.sum()).numpy()).pvalue > 1e-6


def test_equal_laws_accept_everything() -> None:
    p = torch.tensor([0.5, 0.25, 0.25])
    draft = Draft(
        torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 1]), torch.tensor([0, 3]), torch.tensor([0, 0, 0]), p[None]
    )
    for seed in range(50):
        rule = Rejection(draft, p.expand(4, -1), torch.tensor([seed]), torch.tensor([1]))
        assert split(walk(draft, rule, torch.tensor([0]), torch.arange(1, 4)))[0][:3] == [0, 1, 2]


def test_an_impossible_token_is_refused_and_a_certain_one_kept() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0]])
    for seed in range(50):
        draft = Draft(torch.tensor([0, 1]), torch.tensor([-1, -1]), torch.tensor([0, 2]), torch.tensor([-1, -1]))
        rule = Rejection(draft, p.expand(3, -1), torch.tensor([seed]), torch.tensor([1]))
        verdict = walk(draft, rule, torch.tensor([0]), torch.arange(1, 3))
        assert verdict.kept.tolist() == [1]
        assert verdict.tokens.tolist() == [1, 1]


def test_greedy_requests_beside_sampled_ones_are_greedy() -> None:
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(1))
    best = logits.argmax(-1)
    draft = Draft(best[:1].clone(), torch.tensor([-1]), torch.tensor([0, 1, 1, 1]), torch.tensor([-1]))
    params = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams()]
    for seed in range(20):
        verdict = verify(logits, draft, Laws.of(params), Generators([seed] * 3), np.array([5, 5, 5]))
        tokens = split(verdict)
        assert tokens[0] == best[:2].tolist()
        assert tokens[2] == [int(best[3])]


def random_chains(numbers: np.random.Generator, generator: torch.Generator, most: int, *, even: bool) -> Draft:
    """Chains of drawn and chosen tokens; ``even``: all of the same length."""
    counts = np.full(7, most) if even else numbers.integers(most + 1, size=7)
    cu, parent = chain_forest(counts)
    n = int(cu[-1])
    row = np.where(numbers.random(n) < 0.7, np.arange(n), -1)
    laws = torch.randn(n, V, generator=generator).softmax(-1)
    tokens = torch.from_numpy(numbers.integers(V, size=n))
    return Draft(tokens, parent, cu, torch.from_numpy(row), laws if n and numbers.random() < 0.8 else None, chain=True)


def assert_same(found: Verdict, expected: Verdict) -> None:
    for name in ("tokens", "cu", "kept", "row"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_chains_are_judged_as_by_the_walk(seed: int, even: bool) -> None:
    numbers, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    draft = random_chains(numbers, generator, seed % 5, even=even)
    if draft.probs is None:
        draft = replace(draft, row=torch.full_like(draft.row, -1))
    root, node = law_rows(draft)
    rows = 7 + draft.tokens.shape[0]
    choice = torch.from_numpy(numbers.integers(2, size=rows))  # two tokens, so that much is right
    draft_of_two = replace(draft, tokens=draft.tokens % 2)
    greedy = greedy_chains(draft_of_two, choice.numpy())
    assert_same(greedy, walk(draft_of_two, Greedy(draft_of_two, choice), root, node))
    assert chosen_nodes(draft_of_two, choice.numpy()).tolist() == (np.diff(greedy.cu) - 1).tolist()
    probs = torch.randn(rows, V, generator=generator).softmax(-1)
    numbers_of = Generators(list(range(seed, seed + 7)))
    counter = numbers.integers(100, size=7)
    rule = Rejection(draft, probs, torch.from_numpy(numbers_of.seeds), torch.from_numpy(counter))
    assert_same(reject_chains(draft, probs, numbers_of, counter), walk(draft, rule, root, node))


def test_chains_that_are_as_long_only_on_average() -> None:
    cu, parent = chain_forest(np.array([2, 1, 3]))
    tokens = torch.tensor([1, 1, 1, 1, 1, 0])
    draft = Draft(tokens, parent, cu, torch.full((6,), -1), chain=True)
    assert chosen_nodes(draft, np.ones(9, dtype=np.int64)).tolist() == [2, 1, 2]
