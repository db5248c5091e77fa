"""The native sampler against its slow twins: the same laws, the same tokens, the same refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.draft.base import chain_forest
from steeple.ops.law import Laws, draw, probabilities
from steeple.ops.native import library_path
from steeple.ops.rng import Generators
from steeple.ops.sampling import NativeSampler, sampler
from steeple.types import Draft, SamplingParams
from steeple.verify.chains import reject_chains, reject_chains_natively

PATH = library_path("cpu")
pytestmark = pytest.mark.skipif(PATH is None, reason="no native library here")
VOCABS = (1, 2, 7, 16, 63, 64, 65, 300, 4096, 32_003)
ALMOST_ONE = 1 - 2.0**-53


def native() -> NativeSampler:
    found = sampler(PATH)
    assert found is not None
    return found


def some_logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def laws_of(temperatures: list[float], **fields: object) -> Laws:
    return Laws.of([SamplingParams(temperature=t, **fields) for t in temperatures])


def within(law: Tensor, token: int, share: float) -> bool:
    """Whether ``share`` lies in the token's part of the cumulative law, up to rounding."""
    cumulative = law.double().cumsum(0)
    low = float(cumulative[token - 1]) if token else 0.0
    return low - 1e-5 <= share * float(cumulative[-1]) <= float(cumulative[token]) + 1e-5


@pytest.mark.parametrize("vocab", VOCABS)
def test_draws_are_those_of_the_law(vocab: int) -> None:
    rows = 40
    logits, temperature = some_logits(rows, vocab), torch.linspace(0.05, 3.0, rows)
    u = np.random.default_rng(1).random(rows)
    u[:2] = 0.0, ALMOST_ONE
    out = torch.full((rows, vocab), torch.nan)
    tokens = native().draw(logits, temperature, u, out)
    expected = torch.softmax(logits / temperature[:, None], dim=-1)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=2e-5)
    assert torch.allclose(out.double().sum(-1), torch.ones(rows, dtype=torch.float64), atol=1e-5)
    for row in range(rows):
        assert within(out[row], int(tokens[row]), float(u[row]))
        assert out[row, tokens[row]] > 0
    same = draw(out, torch.from_numpy(u)) == tokens
    assert same.float().mean() > 0.9


@pytest.mark.parametrize("vocab", [5, 64, 200])
def test_what_has_no_weight_is_never_drawn(vocab: int) -> None:
    logits = torch.full((vocab * 2, vocab), -torch.inf)
    only = torch.arange(vocab).repeat(2)
    logits[torch.arange(vocab * 2), only] = 1.0
    u = np.repeat([0.0, ALMOST_ONE], vocab)
    tokens = native().draw(logits, torch.ones(2 * vocab), u, torch.empty_like(logits))
    assert tokens.tolist() == only.tolist()


def a_draft(counts: list[int], vocab: int, seed: int, *, chosen: float, near: Tensor | None = None) -> Draft:
    """Chains of drawn nodes, a share of them chosen; ``near``: laws like these logits' (as many as nodes)."""
    generator = torch.Generator().manual_seed(seed)
    N = sum(counts)
    base = torch.zeros(N, vocab) if near is None else near
    probs = torch.softmax(base + torch.randn(N, vocab, generator=generator) * 0.7, dim=-1)
    tokens = torch.multinomial(probs, 1, generator=generator).squeeze(1) if N else torch.zeros(0, dtype=torch.int64)
    row = torch.arange(N)
    row[torch.rand(N, generator=generator) < chosen] = -1
    cu, parent = chain_forest(np.array(counts))
    return Draft(tokens, parent, cu, row, probs, chain=True)


def judging(logits: Tensor, counts: list[int]) -> Tensor:
    """The rows that judge the nodes: all but the last of each request."""
    keep, at = [], 0
    for count in counts:
        keep += list(range(at, at + count))
        at += count + 1
    return logits[torch.tensor(keep, dtype=torch.int64)]


def both(logits: Tensor, draft: Draft, laws: Laws, seeds: NDArray[np.int64]) -> tuple[object, object]:
    generators, counter = Generators(seeds.tolist()), np.arange(seeds.shape[0], dtype=np.int64) + 5
    owner = torch.repeat_interleave(torch.arange(seeds.shape[0]), draft.counts + 1)
    slow = reject_chains(draft, probabilities(logits, laws, owner), generators, counter)
    return slow, reject_chains_natively(draft, logits, laws.temperature, native(), generators, counter)


@pytest.mark.parametrize("chosen", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("vocab", [6, 64, 1000])
def test_chains_are_judged_as_by_the_slow_twin(vocab: int, chosen: float) -> None:
    kept = 0
    for seed in range(12):
        counts = np.random.default_rng(seed).integers(0, 6, 9).tolist()
        logits = some_logits(sum(counts) + len(counts), vocab, seed)
        draft = a_draft(counts, vocab, seed, chosen=chosen, near=judging(logits, counts))
        laws = laws_of(np.linspace(0.3, 2.0, len(counts)).tolist() if seed % 2 else [1.0] * len(counts))
        slow, fast = both(logits, draft, laws, np.arange(9) + 100 * seed)
        for name in ("tokens", "cu", "kept", "row"):
            assert getattr(fast, name).tolist() == getattr(slow, name).tolist(), (seed, name)
        kept += len(slow.kept)  # type: ignore[attr-defined]
    assert kept > 10, "nothing was accepted, so nothing was compared"


def test_no_draft_at_all_is_a_draw() -> None:
    logits = some_logits(4, 50)
    slow, fast = both(logits, Draft.empty(4), laws_of([1.0] * 4), np.arange(4))
    assert fast.tokens.tolist() == slow.tokens.tolist()  # type: ignore[attr-defined]
    assert fast.kept.size == 0  # type: ignore[attr-defined]


def test_where_nothing_is_left_the_law_itself_remains() -> None:
    """A token that the target has no weight for, refused; and the draft's law is the target's elsewhere."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 1.0, 2.0]])
    probs = torch.tensor([[0.5, 0.5, 0.0]])
    cu, parent = chain_forest(np.array([1]))
    draft = Draft(torch.tensor([2]), parent, cu, torch.tensor([0]), probs, chain=True)
    seen = set()
    for seed in range(30):
        verdict = both(logits, draft, laws_of([1.0]), np.array([seed]))[1]
        seen.add(int(verdict.tokens[0]))  # type: ignore[attr-defined]
    assert seen == {0, 1}


def test_laws_that_are_cut_off_or_greedy_are_declined() -> None:
    logits = some_logits(2, 8)
    for fields in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        assert not native().serves(laws_of([1.0, 0.7], **fields), logits)
    assert not native().serves(laws_of([1.0, 0.0]), logits)
    assert not native().serves(laws_of([1.0, 1.0]), some_logits(8, 2).T)
    assert native().serves(laws_of([1.0, 0.7], frequency_penalty=0.5), logits)
