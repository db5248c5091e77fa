"""The vote: which path wins, what a round teaches, who is paused, and what outlives a preemption."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from steeple.cache.paged import PagedCache
from steeple.config import ModelConfig
from steeple.draft import drafter_config
from steeple.draft.base import Needs, Surroundings, chains
from steeple.draft.minions import Minions, MinionsConfig
from steeple.draft.parts import Parts
from steeple.draft.small_lm import SmallLM, SmallLMConfig
from steeple.draft.sparse_self import SparseSelfConfig
from steeple.draft.votes import BACK, FIRST_REST, FLOOR, LONGEST_REST, LOW, PATIENCE, TRIAL, Votes, heaviest_paths
from steeple.errors import ConfigError, InternalError
from steeple.model.decoder import Decoder, Hidden
from steeple.ops.attention import ReferenceAttention
from steeple.request import FinishReason, Request
from steeple.types import Draft, SamplingParams

CPU = torch.device("cpu")
NO_HIDDEN = Hidden(torch.zeros(0, 1))


def walked(chains_of: Sequence[Sequence[int]], weights: Sequence[float]) -> list[int]:
    """The heaviest path by a walk over a trie of dictionaries."""
    path: list[int] = []
    while True:
        child: dict[int, float] = defaultdict(float)
        for chain, weight in zip(chains_of, weights, strict=True):
            if list(chain[: len(path)]) == path and len(chain) > len(path):
                child[chain[len(path)]] += weight
        if not child:
            return path
        path.append(max(child, key=lambda token: child[token]))  # the first of equals, by order of voters


@pytest.mark.parametrize("seed", range(8))
def test_the_heaviest_path_is_that_of_a_walk_over_the_trie(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    voters, B, k = 5, 40, 6
    lengths = numbers.integers(0, k + 1, size=(voters, B))
    table = np.where(np.arange(k) < lengths[..., None], numbers.integers(2, size=(voters, B, k)), -1)
    weights = numbers.choice([0.25, 0.5, 1.0], size=(voters, B))  # exact sums, so that there are ties
    found = heaviest_paths(table, weights)
    for b in range(B):
        each = [table[v, b, : lengths[v, b]].tolist() for v in range(voters)]
        expected = walked(each, weights[:, b].tolist())
        assert found[b].tolist() == expected + [-1] * (k - len(expected))
        assert expected in each, "a path that nobody proposed"


def test_many_light_voters_outweigh_a_heavy_one() -> None:
    table = np.array([[[1, 1]], [[2, 3]], [[2, 4]]])
    assert heaviest_paths(table, np.array([[1.0], [0.6], [0.6]])).tolist() == [[2, 3]]
    assert heaviest_paths(table, np.array([[1.3], [0.6], [0.6]])).tolist() == [[1, 1]]


def a_vote(**fields: float) -> Votes:
    settings = {"reward": 0.5, "penalty": 0.5, "threshold": 0.5, **fields}
    return Votes(3, 4, settings["reward"], settings["penalty"], settings["threshold"])


def test_a_round_rewards_and_punishes_winner_and_losers_by_what_was_tried() -> None:
    votes = a_vote()
    rows = votes.rows(["a", "b"])
    table = np.array(
        [
            [[1, 2, 3, 4], [1, -1, -1, -1]],
            [[1, 9, 9, 9], [5, 5, -1, -1]],
            [[7, 2, 3, 4], [-1, -1, -1, -1]],
        ]
    )
    votes.note(rows, table, np.array([10, 20]))
    assert votes.lengths(rows).tolist() == [10, 20]
    # Of a, "1 2 3 8" was written: voter 0 was right 3 times of 4, voter 1 once of 2 (not more than half), 2 never.
    # Of b, "5" was written: voter 0 was wrong, voter 1 right as far as can be told, voter 2 said nothing.
    votes.learn(rows, np.array([[1, 2, 3, 8], [5, -1, -1, -1]]))
    a, b = votes.weights(rows).T
    assert a == pytest.approx([1.0, 0.5 / 1.5, 0.5 / 1.5])
    assert b == pytest.approx([0.5 / 1.5, 1.0, 1.0 / 1.5])
    assert votes.lengths(rows).tolist() == [-1, -1]
    before = votes.weights(rows).copy()
    votes.learn(rows, np.full((2, 4), -1))
    assert (votes.weights(rows) == before).all(), "nothing was written, nothing was learnt"


def test_shared_weights_are_moved_by_the_mean_over_requests() -> None:
    votes = Votes(2, 2, 0.5, 0.5, 0.5, shared=True)
    rows = votes.rows(["a", "b", "c"])
    table = np.array([[[1, 1], [1, 1], [9, 9]], [[1, 9], [9, 9], [9, 9]]])
    votes.note(rows, table, np.zeros(3, dtype=np.int64))
    votes.learn(rows, np.ones((3, 2), dtype=np.int64))  # voter 0: 4 right of 5 tried; voter 1: 1 of 4
    assert votes.weights(rows).tolist() == [[1.0] * 3, [pytest.approx(1 / 3)] * 3]
    assert votes.weights(votes.rows(["d"])).ravel().tolist() == votes.weights(rows)[:, 0].tolist()


def rounds_asked(votes: Votes, good: Sequence[bool]) -> list[bool]:
    """Rounds of one request: voter 0 is always right, voter 1 is right in round i if ``good[i]``. Was voter 1 asked?"""
    rows, asked = votes.rows(["r"]), []
    for right in good:
        heard = votes.asked(rows)
        assert heard[0].all()
        asked.append(bool(heard[1, 0]))
        second = [1, 1] if right else [9, 9]
        votes.note(rows, np.array([[[1, 1]], [second if asked[-1] else [-1, -1]]]), np.array([5]))
        votes.learn(rows, np.array([[1, 1]]))
    return asked


def pauses(asked: Sequence[bool]) -> list[int]:
    """Lengths of the runs of rounds in which it was not asked."""
    return [len(run) for run in "".join("x" if one else "." for one in asked).split("x") if run]


def test_a_voter_that_stays_bad_is_asked_ever_more_rarely() -> None:
    asked = rounds_asked(Votes(2, 2, 0.2, 0.2, 0.5), [False] * 1500)
    runs = pauses(asked)
    assert runs[:4] == [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST, 8 * FIRST_REST]
    assert set(runs[4:-1]) == {LONGEST_REST}
    until = asked.index(False)
    falls = int(np.ceil(np.log(LOW) / np.log(0.8 / 1.2)))  # relative to the voter that is right
    assert until == falls - 1 + PATIENCE
    first_trial = asked[until + FIRST_REST :]
    assert first_trial[: TRIAL + 2] == [True] * (TRIAL + 1) + [False], "one more until it is below again"


def test_a_voter_that_becomes_good_is_heard_again() -> None:
    votes = Votes(2, 2, 0.2, 0.2, 0.5)
    asked = rounds_asked(votes, [False] * 60 + [True] * 600)
    after = asked[60:]
    assert not all(after[:20])
    assert all(after[-500:])
    # Two that are always right keep the ratio of their weights; once the other errs, it overtakes.
    assert votes.weights(votes.rows(["r"]))[1, 0] == pytest.approx(BACK)
    rows = votes.rows(["r"])
    for _ in range(10):
        votes.note(rows, np.array([[[9, 9]], [[1, 1]]]), np.array([5]))
        votes.learn(rows, np.array([[1, 1]]))
    assert votes.weights(rows)[:, 0].argmax() == 1


def test_after_good_rounds_a_pause_is_short_again() -> None:
    votes = Votes(2, 2, 0.2, 0.2, 0.5)
    bad = rounds_asked(votes, [False] * 100)
    assert pauses(bad)[:2] == [FIRST_REST, 2 * FIRST_REST]
    good = rounds_asked(votes, [True] * 200)
    assert all(good[-50:])
    again = rounds_asked(votes, [False] * 40)
    assert pauses(again)[0] == FIRST_REST


def test_a_new_request_inherits_nothing_from_one_that_ended() -> None:
    votes = Votes(2, 2, 0.2, 0.2, 0.5)
    rounds_asked(votes, [False] * 20)
    assert not votes.asked(votes.rows(["r"])).all()
    votes.forget("r")
    rows = votes.rows(["s"])
    assert votes.asked(rows).all()
    assert (votes.weights(rows) == 1).all()
    assert votes.lengths(rows).tolist() == [-1]
    assert pauses(rounds_asked(votes, [False] * 5)) == [], "r is another one now"


def test_no_weight_falls_below_the_floor() -> None:
    votes = Votes(2, 2, 0.0, 0.9, 0.5)
    rounds_asked(votes, [False] * 10)
    assert votes.weights(votes.rows(["r"]))[1, 0] == FLOOR


class Scripted:
    """A voter that proposes the same tokens whatever it reads."""

    def __init__(self, tokens: Sequence[int], nodes: int = 3) -> None:
        self.tokens, self.needs = np.array(tokens), Needs(nodes=nodes)
        self.budgets: list[list[int]] = []
        self.forgotten: list[str] = []

    def prepare(self, cache: PagedCache) -> None: ...

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        self.budgets.append(list(budget))
        return chains([self.tokens[:n] for n in budget], CPU)

    def observe(self, *_: object) -> None: ...

    def forget(self, request: Request) -> None:
        self.forgotten.append(request.id)

    def check_integrity(self) -> None: ...


def surroundings(target: Decoder | None = None) -> Surroundings:
    return Surroundings(
        decoder=target or a_decoder(),
        tokenizer=None,
        attention=ReferenceAttention(),
        device=CPU,
        dtype=torch.float32,
        block_size=4,
        step_tokens=64,
    )


def a_decoder(seed: int = 0) -> Decoder:
    config = ModelConfig(
        vocab_size=13,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=16,
        max_context=128,
        rope_inv_freq=(1.0, 0.1),
    )
    decoder = Decoder(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in decoder.named_parameters():
        if "norm" not in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.7)
    return decoder


def minions(*voters: object, **fields: object) -> Minions:
    config = MinionsConfig(k=3, **fields)  # type: ignore[arg-type]
    return Minions(config, Parts("minions", voters), surroundings())  # type: ignore[arg-type]


def a_round(drafter: Minions, request: Request, written: Sequence[int], nodes: int = 3) -> list[int]:
    """Propose, write, observe. Returns the draft."""
    draft = drafter.propose([request], [nodes])
    assert draft.chain
    assert draft.probs is None
    assert (draft.row == -1).all(), "a token that counts as drawn"
    request.append(written)
    drafter.observe([request], None, [()], NO_HIDDEN)  # type: ignore[arg-type]
    return draft.tokens.tolist()


def test_the_draft_follows_who_was_right() -> None:
    wrong, right = Scripted([9, 9, 9]), Scripted([1, 2, 3])
    drafter, request = minions(wrong, right), Request("r", [5], SamplingParams())
    assert a_round(drafter, request, [1, 2, 3, 4]) == [9, 9, 9], "of equals the first"
    assert a_round(drafter, request, [1, 2, 3, 4]) == [1, 2, 3]
    other = Request("s", [5], SamplingParams())
    assert a_round(drafter, other, [1]) == [9, 9, 9], "weights are each request's own"
    shared = minions(wrong, right, shared=True)
    a_round(shared, Request("t", [5], SamplingParams()), [1, 2, 3, 4])
    assert a_round(shared, Request("u", [5], SamplingParams()), [1]) == [1, 2, 3]


def test_a_paused_voter_costs_nothing() -> None:
    wrong, right = Scripted([9, 9, 9]), Scripted([1, 2, 3])
    drafter, request = minions(right, wrong), Request("r", [5], SamplingParams())
    for _ in range(100):
        a_round(drafter, request, [1, 2, 3, 4])
    assert len(right.budgets) == 100
    assert len(wrong.budgets) < 40


def test_budgets_hold_and_rounds_without_a_draft_teach_nothing() -> None:
    drafter = minions(Scripted([9, 9]), Scripted([1, 2, 3]))
    requests = [Request(name, [5], SamplingParams()) for name in "abc"]
    draft = drafter.propose(requests, [1, 0, 3])
    assert draft.counts.tolist() == [1, 0, 2]
    requests[1].append([1])
    drafter.observe(requests, None, [()] * 3, NO_HIDDEN)  # type: ignore[arg-type]
    assert (drafter.votes.weights(drafter.votes.rows(["a", "b", "c"])) == 1).all()


def test_rounds_of_disjoint_requests_may_overlap() -> None:
    drafter = minions(Scripted([9, 9]), Scripted([1, 2, 3]))
    a, b = (Request(name, [5], SamplingParams()) for name in "ab")
    drafter.propose([a], [3])
    drafter.propose([b], [3])
    a.append([1, 2])
    drafter.observe([a], None, [()], NO_HIDDEN)  # type: ignore[arg-type]
    b.append([9, 9])
    drafter.observe([b], None, [()], NO_HIDDEN)  # type: ignore[arg-type]
    weights = drafter.votes.weights(drafter.votes.rows(["a", "b"]))
    assert weights[0, 0] < weights[1, 0]
    assert weights[0, 1] > weights[1, 1]


def test_weights_outlive_a_preemption_but_not_the_request() -> None:
    voter = Scripted([1, 2, 3])
    drafter, request = minions(Scripted([9]), voter), Request("r", [5], SamplingParams())
    a_round(drafter, request, [1, 2, 3, 4])
    drafter.forget(request)  # preempted: it is not finished
    assert voter.forgotten == ["r"]
    assert a_round(drafter, request, [1]) == [1, 2, 3]
    with pytest.raises(InternalError, match="votes on"):
        drafter.check_integrity()
    request.finish(FinishReason.STOP)
    drafter.forget(request)
    drafter.check_integrity()


def test_real_voters_choose_for_requests_that_sample() -> None:
    around = surroundings()
    cache = PagedCache(around.decoder.config, blocks=64, block_size=4, dtype=torch.float32, attention=around.attention)
    choosing, drawing = (
        SmallLM(SmallLMConfig(k=3), a_decoder(1), replace(around, chooses=chooses)) for chooses in (True, False)
    )
    choosing.prepare(cache)
    drawing.prepare(cache)
    hot, cold = (
        [Request(f"{t}{i}", [3, 1, i], SamplingParams(temperature=t, seed=1, repetition_penalty=1.3)) for i in range(4)]
        for t in (1.0, 0.0)
    )
    sampled, greedy = choosing.propose(hot, [3] * 4), drawing.propose(cold, [3] * 4)
    assert drawing.propose([Request("warm", [3, 1], SamplingParams(temperature=1.0))], [3]).probs is not None
    assert sampled.tokens.tolist() == greedy.tokens.tolist()
    assert sampled.probs is None
    assert (sampled.row == -1).all()


def test_a_tree_cannot_vote() -> None:
    with pytest.raises(ConfigError, match=r"minions: .* proposes 6 nodes where k = 3; only chains can vote"):
        minions(Scripted([1]), Scripted([1], nodes=6))


def test_settings_by_name() -> None:
    spec = "minions:models=ngram:min_match=1,sparse_self+k=3+shared=true"
    assert drafter_config(spec) == MinionsConfig(models="ngram:min_match=1,sparse_self", k=3, shared=True)
    drafter = MinionsConfig(models=("ngram", "sparse_self"), k=2).build(surroundings())
    assert drafter.needs == Needs(nodes=2, shares_cache=SparseSelfConfig(k=2).build(surroundings()).needs.shares_cache)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ""}, r"minions\.models = '' names no drafter"),
        ({"models": "ngram,none"}, r"'none' drafts nothing; leave it out"),
        ({"models": "ngram,ngarm"}, "Did you mean 'ngram'"),
        ({"k": 0}, r"minions\.k = 0"),
        ({"penalty": 1.0}, r"minions\.penalty = 1\.0"),
        ({"reward": -0.1}, r"minions\.reward"),
        ({"threshold": 1.5}, r"minions\.threshold"),
    ],
)
def test_bad_settings(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MinionsConfig(**fields)  # type: ignore[arg-type]
