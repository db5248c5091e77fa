"""What the laws are tested with: tiny decoders in memory, engines of every row of the matrix, and the slow truth."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from forests import Checked, DrawnTree, Mixed, Motley, Ragged, RandomTree
from torch import Tensor

from steeple.cache.paged import PagedCache
from steeple.config import ModelConfig
from steeple.draft.base import DecidesLengths, Drafter, Surroundings
from steeple.draft.carry import Carry
from steeple.draft.minions import Minions, MinionsConfig
from steeple.draft.ngram import NGramConfig
from steeple.draft.parts import Parts
from steeple.draft.small_lm import SmallLM, SmallLMConfig
from steeple.draft.sparse_self import SparseSelfConfig
from steeple.draft.spin_round import Choices, Spin, spin_drafter
from steeple.draft.spire import SpireDraftConfig, SpireParts, spire_drafter
from steeple.draft.spire_model import FeedbackMemory, SpireShape, prune
from steeple.engine.engine import Engine, EngineParts
from steeple.model.decoder import Decoder
from steeple.ops.attention import PagedAttention
from steeple.ops.native_attention import attention_backend
from steeple.request import Request
from steeple.select.goodput import Plan, Standing
from steeple.select.options import Options
from steeple.select.selector import Outcome
from steeple.types import SamplingParams

CPU = torch.device("cpu")
MANY_STEPS = 10_000


def tiny_decoder(
    seed: int, *, vocab: int = 11, layers: int = 2, hidden: int = 16, context: int = 128, sharpness: float = 3.0
) -> Decoder:
    """A random decoder whose laws are neither flat nor one-hot; ``sharpness`` is the spread of its logits."""
    heads, head_dim = 2, 8
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=1,
        head_dim=head_dim,
        intermediate_size=2 * hidden,
        max_context=context,
        rope_inv_freq=tuple(100.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)),
    )
    decoder = Decoder(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in decoder.named_parameters():
        if "norm" not in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 / weight.shape[-1] ** 0.5)
    decoder.head.weight.mul_(sharpness / 1.5)
    return decoder


TARGET = tiny_decoder(4)
BAD = tiny_decoder(1, layers=1, hidden=8)


@dataclass(frozen=True, kw_only=True)
class CacheKind:
    """One column of the matrix."""

    block_size: int = 16
    blocks: int = 64
    share: bool = True


CACHES = {
    "paged": CacheKind(),
    "private": CacheKind(share=False),
    "tiny_blocks": CacheKind(block_size=1, blocks=900),
    "odd_blocks_tight": CacheKind(block_size=3, blocks=22),
}

Build = Callable[[Surroundings], Drafter | None]


def _small(decoder: Decoder, k: int) -> Build:
    return lambda around: SmallLM(SmallLMConfig(k=k), decoder, around)


def _spire(
    target: Decoder,
    k: int,
    *,
    feedback: bool = False,
    choose: str = "window",
    own_keys: bool = False,
    carry: bool = False,
) -> Build:
    """The target's last layer, not trained, with a head of its own so that its laws differ from the target's."""
    draft = prune(target, 1)
    generator = torch.Generator().manual_seed(3)
    draft.head.weight.add_(torch.randn(draft.head.weight.shape, generator=generator) * 0.3)
    last = target.config.num_layers - 1
    shape = SpireShape(target_layers=(last,), sink=1, window=3, feedback=feedback, own_keys=own_keys, carry=carry)
    carried = Carry(target.config.hidden_size).requires_grad_(False) if carry else None
    if carried is not None:
        carried.projection.weight.normal_(std=0.2, generator=generator)
    memory = FeedbackMemory(1).requires_grad_(False) if feedback else None
    return lambda around: spire_drafter(
        SpireDraftConfig(k=k, choose=choose), shape, SpireParts(draft, memory, carried), around
    )


def _minions(bad: Decoder, k: int, *, shared: bool = False) -> Build:
    """A vote of three that differ."""

    def build(around: Surroundings) -> Drafter:
        choosing = replace(around, chooses=True)
        voters = [
            NGramConfig(k=k, min_match=1, max_match=3).build(choosing),
            SmallLM(SmallLMConfig(k=k), bad, choosing),
            SparseSelfConfig(sink=1, window=2, k=k).build(choosing),
        ]
        return Minions(MinionsConfig(k=k, shared=shared), Parts("minions", voters), around)

    return build


class DiceSelector:
    """Choices that come from a die: a function of each request's name and length, whatever a clock would say."""

    remembered = frozenset[str]()

    def __init__(self, drafters: int, most: int) -> None:
        self._drafters, self._most = drafters, most
        self.seen: set[tuple[int, int]] = set()

    def choose(self, ids: Sequence[str], standing: Callable[[], Standing]) -> Plan:
        lengths = standing().lengths.astype(int).tolist()
        dice = [np.random.default_rng((zlib.crc32(id.encode()), n)) for id, n in zip(ids, lengths, strict=True)]
        drafter = np.array([int(die.integers(-1, self._drafters)) for die in dice])
        depth = np.where(drafter >= 0, [int(die.integers(1, self._most + 1)) for die in dice], 0)
        return Plan(drafter, depth, 0.0, 1.0)

    def learn(self, outcome: Outcome) -> None:
        assert (outcome.accepted <= outcome.proposed).all()
        assert (outcome.proposed <= outcome.asked).all()
        assert (outcome.drafter[outcome.asked > 0] >= 0).all()
        self.seen.update(zip(outcome.drafter.tolist(), outcome.proposed.tolist(), strict=True))

    def forget(self, id: str) -> None: ...


def _spin(target: Decoder, bad: Decoder, k: int, *, rolled: bool = False) -> Build:
    """One of four for each request, chosen by the clock or by a die."""

    def build(around: Surroundings) -> Drafter:
        spire = _spire(target, k, own_keys=True, carry=True)(around)
        assert spire is not None
        parts = Parts(
            "spin",
            [
                NGramConfig(k=k, min_match=1, max_match=3).build(around),
                SmallLM(SmallLMConfig(k=k), bad, around),
                spire,
                SparseSelfConfig(sink=1, window=2, k=k, choose="window" if rolled else "pillar").build(around),
            ],
        )
        if rolled:
            return Spin(parts, Choices(DiceSelector(len(parts), k), parts.parts), CPU)
        return spin_drafter(parts, (0.0, 0.3, 0.5, 1.0), Options(most=k, explore=0.3), around)

    return build


def drafters(target: Decoder = TARGET, bad: Decoder = BAD, k: int = 4) -> dict[str, Build]:
    """The rows of the matrix, for one target."""
    vocab = target.config.vocab_size
    return {
        "none": lambda around: None,
        "ngram": lambda around: NGramConfig(k=k, min_match=1, max_match=3).build(around),
        "small_lm": _small(bad, k),
        "small_lm_self": _small(target, k),
        "sparse_self": SparseSelfConfig(sink=1, window=3, k=k).build,
        "sparse_self_wide": SparseSelfConfig(sink=0, window=2, k=k, width=3).build,
        "sparse_self_compact": SparseSelfConfig(sink=1, window=3, k=k, compact=True).build,
        "sparse_self_snapkv": SparseSelfConfig(sink=1, window=2, k=k, choose="snapkv", budget=0.3).build,
        "sparse_self_pillar": SparseSelfConfig(sink=1, window=2, k=k, choose="pillar", budget=6.0).build,
        "spire": _spire(target, k),
        "spire_pillar": _spire(target, k, choose="pillar"),
        "spire_own_keys": _spire(target, k, own_keys=True),
        "spire_memory": _spire(target, k, feedback=True),
        "spire_carry": _spire(target, k, carry=True),
        "spire_carry_all": _spire(target, k, carry=True, feedback=True, own_keys=True),
        "minions": _minions(bad, k),
        "minions_shared": _minions(bad, k, shared=True),
        "spin": _spin(target, bad, k),
        "spin_rolled": _spin(target, bad, k, rolled=True),
        "chosen_tree": lambda around: RandomTree(vocab, 2 * k),
        "drawn_tree": lambda around: DrawnTree(vocab, 2 * k),
        "motley_tree": lambda around: Motley(vocab, 2 * k),
        "ragged": lambda around: Ragged(vocab, k),
        "two_drafters": lambda around: Mixed(
            SmallLM(SmallLMConfig(k=k), bad, around), DrawnTree(vocab, k), RandomTree(vocab, k)
        ),
    }


ROWS = tuple(drafters())
# What these draft depends on which rows the target's last steps had, on how much of the cache was free, on neighbours.
DEPEND_ON_HISTORY = (
    "sparse_self_compact",
    "sparse_self_snapkv",
    "sparse_self_pillar",
    "spire_pillar",
    "minions_shared",
    "spin",
)


def make_engine(
    row: str | Build = "none",
    cache: CacheKind = CACHES["paged"],
    *,
    target: Decoder = TARGET,
    bad: Decoder = BAD,
    k: int = 4,
    batch_size: int = 256,
    step_tokens: int = 512,
    attention: PagedAttention | None = None,
    tokenizer: object = None,
    engine: Callable[[EngineParts], Engine] = Engine,
) -> Engine:
    """An engine of one cell of the matrix, of the given kind. Every proposal of its drafter is checked."""
    attention = attention or attention_backend(CPU)
    around = Surroundings(
        decoder=target,
        tokenizer=tokenizer,
        attention=attention,
        device=CPU,
        dtype=torch.float32,
        block_size=cache.block_size,
        step_tokens=step_tokens,
        share_prefixes=cache.share,
    )
    build = drafters(target, bad, k)[row] if isinstance(row, str) else row
    drafter = build(around)
    if drafter is not None:
        checked = Checked(drafter, target.config.vocab_size)
        if isinstance(drafter, DecidesLengths):
            checked.lengths = drafter.lengths
        drafter = checked
    paged = PagedCache(
        target.config,
        blocks=cache.blocks,
        block_size=cache.block_size,
        dtype=torch.float32,
        share_prefixes=cache.share and not (drafter is not None and drafter.needs.every_row),
        attention=attention,
    )
    if drafter is not None:
        drafter.prepare(paged)
    return engine(
        EngineParts(
            decoder=target,
            cache=paged,
            attention=attention,
            drafter=drafter,
            tokenizer=tokenizer,
            batch_size=batch_size,
            step_tokens=step_tokens,
            max_context=target.config.max_context,
        )
    )


def make_requests(
    prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], *, seeds: bool = False
) -> list[Request]:
    """Requests r0, r1, ...; ``seeds``: each gets its number as seed."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    return [
        Request(f"r{i}", list(prompt), replace(own, seed=i) if seeds else own)
        for i, (prompt, own) in enumerate(zip(prompts, each, strict=True))
    ]


def run(engine: Engine, requests: Sequence[Request], *, join_every: int = 0) -> list[list[int]]:
    """Run to the end and return the outputs; checks that tokens counted, reported and written are the same (L6).

    ``join_every``: a request joins every so many steps, instead of all at the start.
    """
    waiting = list(requests)
    reported: dict[str, list[int]] = {r.id: [] for r in requests}
    before = engine.stats.committed
    for step in range(MANY_STEPS):
        while waiting and (not join_every or step >= join_every * (len(requests) - len(waiting))):
            engine.add(waiting.pop(0))
        for committed in engine.step():
            assert committed.tokens, "a commit without tokens"
            assert committed.request.finished or committed.request.ready, "cached is not len - 1 between steps"
            reported[committed.request.id].extend(committed.tokens)
        if engine.idle and not waiting:
            break
    assert engine.idle, "the engine never ends"
    engine.check_integrity()
    outputs = [r.output.tolist() for r in requests]
    assert list(reported.values()) == outputs, "reported tokens are not those of the text"
    assert engine.stats.committed - before == sum(map(len, outputs)), "tokens counted are not tokens written"
    for request in requests:
        stats = request.stats
        assert stats.committed == request.written - 1, "rounds commit every token but the first"
        assert sum(stats.accepted_at) == stats.accepted <= stats.drafted
        assert stats.accepted <= stats.committed <= stats.accepted + stats.rounds
    return outputs


def dense(decoder: Decoder, text: Sequence[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The slow truth for one text: logits ``[T, V]``, and for each layer keys and values ``[T, K, H]``, no cache."""
    all_keys, all_values = [], []
    config = decoder.config

    def attend(layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        all_keys.append(k_TKH.clone())
        all_values.append(v_TKH.clone())
        k, v = (x.repeat_interleave(config.num_heads // config.num_kv_heads, dim=1) for x in (k_TKH, v_TKH))
        scores = torch.einsum("tnh,snh->nts", q_TNH, k) * config.scale
        later = torch.ones(len(text), len(text), dtype=torch.bool).triu(1)
        return torch.einsum("nts,snh->tnh", scores.masked_fill(later, -torch.inf).softmax(-1), v)

    with torch.no_grad():
        hidden = decoder(torch.tensor(text), torch.arange(len(text)), attend)
        return decoder.logits(hidden.final_TD), all_keys, all_values


def gathered(engine: Engine, request: Request) -> tuple[Tensor, Tensor]:
    """What the cache holds of a request, read by its block table: keys and values ``[L, cached, K, H]``."""
    cache, read = engine.cache, engine.parts.attention.read_kv
    S, at = cache.block_size, torch.arange(request.cached)
    slots = torch.tensor(list(cache.table(request.id)), dtype=torch.int64)[at // S] * S + at % S
    layers = [read(k, v, slots) for k, v in zip(cache.keys, cache.values, strict=True)]
    return torch.stack([k for k, _ in layers]), torch.stack([v for _, v in layers])


def check_cache(engine: Engine, requests: Sequence[Request]) -> int:
    """Law: what the cache holds of running requests equals a fresh forward over their text. Returns positions seen."""
    seen = 0
    for request in requests:
        if not engine.cache.has(request.id) or not request.cached:
            continue
        text = request.tokens[: request.cached].tolist()
        _, keys, values = dense(engine.parts.decoder, text)
        for found, expected in zip(gathered(engine, request), (keys, values), strict=True):
            difference = (found - torch.stack(expected)).abs().amax(dim=(0, 2, 3))
            wrong = np.flatnonzero(difference.numpy() > 1e-4)
            assert not wrong.size, f"{request.id}: the cache differs from recomputation at positions {wrong.tolist()}"
        seen += len(text)
    return seen
