"""A smaller model with the same tokenizer drafts a chain, token by token, out of a cache of its own.

Source: speculative decoding (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).
Cost: k + 1 passes of the small model a round, and its own keys and values. Loses at large batch and long context, where
the small model's own cache and launches come near the target's time, and wherever its law is far from the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steeple import hf
from steeple.cache.batch import BatchMaker, Ints
from steeple.cache.paged import PagedCache
from steeple.cache.window import EVERYTHING, Window, WindowBatches
from steeple.config import check_range
from steeple.draft.base import Drafter, Needs, Surroundings
from steeple.draft.chain import Chain, sampling_of
from steeple.draft.declared import key_bytes_per_token, stored_config
from steeple.errors import ConfigError
from steeple.model.accelerate import accelerate
from steeple.model.decoder import Decoder, Hidden
from steeple.model.load import load_decoder
from steeple.model.rounds import native_round
from steeple.model.run import Runner
from steeple.ops.law import SamplingBatch
from steeple.plan.memory_parts import DraftMemory, Lay, weight_bytes
from steeple.request import Request
from steeple.types import MAX_NODES, Batch, Draft


@dataclass(frozen=True, kw_only=True)
class SmallLMConfig:
    """Settings of the small-model drafter: ``model`` is a folder or hub name, ``k`` the nodes per round."""

    model: str = field(default="", metadata={"help": "folder or name of the small model; empty: the target's sibling"})
    k: int = field(default=4, metadata={"help": "nodes per round"})

    def __post_init__(self) -> None:
        check_range("small_lm", "k", self.k, 1, MAX_NODES)

    def build(self, around: Surroundings) -> Drafter:
        """Load the small model; its tokenizer must be the target's."""
        folder = hf.resolve(self.model) if self.model else _sibling(around)
        hf.check_same_tokenizer(around.tokenizer, hf.load_tokenizer(folder))
        limit = around.decoder.config.max_context
        try:
            decoder = load_decoder(folder, dtype=around.dtype, device=around.device, max_context=limit)
        except ConfigError as error:
            raise ConfigError(f"drafter small_lm, model {folder}: {error} Lower EngineConfig.max_context.") from error
        decoder.use(around.kernels)
        return SmallLM(self, decoder, around)

    def memory(self, around: Surroundings, lay: Lay) -> DraftMemory:
        """The small model, and keys of its own as many as the target's."""
        config = stored_config(hf.resolve(self.model) if self.model else _sibling(around), around)
        own = key_bytes_per_token(config, lay)
        return DraftMemory(held=weight_bytes(config, lay), keys=own, runs=config, reads_text=True, draws=True)


def _sibling(around: Surroundings) -> Path:
    folder = around.model_folder.parent / "small" if around.model_folder is not None else None
    if folder is None or not (folder / "config.json").exists():
        raise ConfigError(
            f"drafter small_lm: the model {around.model_folder} has no small sibling; "
            "name a smaller model with the same tokenizer: small_lm:DIR."
        )
    return folder


@dataclass(slots=True)
class _State:
    """What the small model's cache holds of a request: ``cached`` positions of text, then the last draft's nodes.

    ``named`` of its blocks are known to be full of text; it has ``room`` for so many positions.
    """

    cached: int
    named: int
    room: int = 0
    nodes: list[int] = field(default_factory=list)

    def settle(self, request: Request) -> None:
        """Count those nodes that became text; whatever happened in between, the text decides."""
        if self.nodes:
            after = request.tokens[self.cached : self.cached + len(self.nodes)].tolist()
            for node, token in zip(self.nodes, after, strict=False):
                if node != token:
                    break
                self.cached += 1
            self.nodes = []
        # The root is fed again if its round came to nothing (the target's forward failed).
        self.cached = min(self.cached, len(request) - 1)


class SmallLM:
    """The drafter. Drawn tokens carry the law they were drawn from; greedy requests get chosen tokens."""

    def __init__(self, config: SmallLMConfig, decoder: Decoder, around: Surroundings) -> None:
        self.config, self._around, self._decoder = config, around, decoder
        self._vocab = around.decoder.config.vocab_size
        # Of two models with one tokenizer the target's vocabulary may be padded further: what is beyond reads as this.
        self._last_token = decoder.config.vocab_size - 1
        self._states: dict[str, _State] = {}
        self._sampling = SamplingBatch.of(())
        self._ones: Ints = np.ones(0, dtype=np.int64)

    @property
    def needs(self) -> Needs:
        own = self._decoder.config.kv_elements_per_token * self._around.dtype.itemsize
        return Needs(nodes=self.config.k, own_cache_bytes_per_token=own)

    def prepare(self, cache: PagedCache) -> None:
        """A paged cache of its own, as long as the target's."""
        around = self._around
        self.cache = PagedCache(
            self._decoder.config,
            blocks=cache.pool.count,
            block_size=around.block_size,
            dtype=around.dtype,
            device=around.device,
            share_prefixes=around.share_prefixes,
            attention=around.attention,
            scratch=around.device.type == "cuda",
        )
        self._runner = Runner(self._decoder, self.cache, around.attention)
        accelerate(self._runner, graphs=around.graphs)
        self._maker = BatchMaker(around.block_size, around.device)
        self._round = native_round(self._runner, None)
        self._texts = WindowBatches(around.block_size, around.device, Window(sink=0, window=EVERYTHING))

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        """A chain of up to ``budget[b]`` nodes each; requests for which its cache has no room get none."""
        nodes = [n if n and self._admit(r, n) else 0 for r, n in zip(requests, budget, strict=True)]
        places = [b for b, n in enumerate(nodes) if n]
        if not places:
            return Draft.empty(len(requests), self._around.device)
        drafted = [requests[b] for b in places]
        if self._sampling.requests != drafted:
            self._sampling = sampling_of(drafted, self._around)
            self._ones = np.ones(len(drafted), dtype=np.int64)
        chain = Chain(self._sampling, [nodes[b] for b in places], self._runner, self._vocab)
        rows = _Rows.of(drafted, self.cache)
        chain.extend(self._catch_up(rows))
        while len(chain.tokens) < max(nodes):
            self._advance(rows, chain, len(chain.tokens))
        table = chain.table()
        for name, count, drawn in zip(rows.ids, chain.budget.tolist(), table.tolist(), strict=True):
            self._states[name].nodes = drawn[: count - 1]  # the last node was never an input
        return chain.draft(table, nodes)

    def _admit(self, request: Request, nodes: int) -> bool:
        state = self._states.get(request.id)
        if state is None:
            found = self.cache.attach(request.id, request.tokens)
            state = self._states[request.id] = _State(found, found // self.cache.block_size)
        state.settle(request)
        length = len(request) + nodes - 1
        if length > state.room:
            if not self.cache.reserve(request.id, length):
                return False
            state.room = self.cache.blocks_for(length) * self.cache.block_size
        return True

    def _catch_up(self, rows: _Rows) -> Tensor:
        """Feed the text that the small model has not seen, in steps of bounded size; hidden of each newest token."""
        states = [self._states[id] for id in rows.ids]
        starts = np.fromiter((s.cached for s in states), np.int64, len(states))
        unread = rows.lengths - starts
        if unread.max() == 1:
            hidden_BD = self._forward(rows, starts, self._ones, np.array([r.newest for r in rows.requests]))
        elif unread.sum() <= self._around.step_tokens:
            text = np.concatenate([r.tokens[s.cached :] for r, s in zip(rows.requests, states, strict=True)])
            hidden_TD = self._forward(rows, starts, unread, text)
            hidden_BD = hidden_TD[torch.from_numpy(np.cumsum(unread) - 1).to(hidden_TD.device)]
        else:
            hidden_BD = self._catch_up_in_steps(rows, states)
        size = self.cache.block_size
        for request, state in zip(rows.requests, states, strict=True):
            state.cached = len(request)
            # Only verified text is ever named and shared; the nodes behind it stay this request's own.
            if state.cached // size > state.named:
                state.named = state.cached // size
                self.cache.name_full(request.id, request.tokens, state.cached)
        return hidden_BD

    def _catch_up_in_steps(self, rows: _Rows, states: Sequence[_State]) -> Tensor:
        last: dict[int, Tensor] = {}
        while len(last) < len(states):
            room, who, texts = self._around.step_tokens, [], []
            for place, (request, state) in enumerate(zip(rows.requests, states, strict=True)):
                if place not in last and room:
                    who.append(place)
                    texts.append(request.tokens[state.cached : state.cached + room])
                    room -= len(texts[-1])
            starts = np.array([states[place].cached for place in who])
            counts = np.array([len(text) for text in texts])
            hidden = self._forward(rows.at(who), starts, counts, np.concatenate(texts))
            for place, count, end in zip(who, counts.tolist(), np.cumsum(counts).tolist(), strict=True):
                states[place].cached += count
                if states[place].cached == len(rows.requests[place]):
                    last[place] = hidden[end - 1]
        return torch.stack([last[place] for place in range(len(states))])

    def _advance(self, rows: _Rows, chain: Chain, depth: int) -> None:
        """One more token of every chain that wants it; natively, as many as the same chains want."""
        active = chain.active(depth)
        everyone = active.shape[0] == len(rows.ids)
        own, tokens = (rows, chain.tokens[-1]) if everyone else (rows.at(active.tolist()), chain.tokens[-1][active])
        if self._round is None or not chain.plain:
            chain.extend(self._forward(own, own.lengths + (depth - 1), self._ones[: active.shape[0]], tokens))
            return
        passes = chain.passes(depth)
        if not everyone or depth == 1:
            self._texts.open(own.ids, own.tables, own.lengths - 1, depth + passes)
        drawn, _ = self._round(self._texts.run(depth, passes, tokens), chain.draws(active, passes), None)
        chain.fill(drawn, active)

    def _forward(self, rows: _Rows, starts: Ints, counts: Ints, tokens: Ints) -> Tensor:
        tokens = np.minimum(tokens, self._last_token)
        return self._runner.forward(self._maker.make(rows.ids, rows.tables, starts, counts, tokens, rows.none)).final_TD

    def behind(self, request: Request) -> int:
        """Rows of the text, without its newest token, that the request's next round reads first; what other requests'
        blocks hold of it is not counted."""
        state = self._states.get(request.id)
        if state is None:
            return len(request) - 1
        state.settle(request)
        return len(request) - 1 - state.cached

    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        """Nothing: the next proposal settles its cache by comparing its nodes with the text."""

    def forget(self, request: Request) -> None:
        self.cache.free(request.id)
        self._states.pop(request.id, None)

    def check_integrity(self) -> None:
        """No block of the own cache may be held."""
        self.cache.check_integrity(idle=True)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The requests of a round as the small model's batches want them; ``none``: a forest without nodes."""

    requests: list[Request]
    ids: list[str]
    tables: list[Sequence[int]]
    lengths: Ints
    none: Draft

    @staticmethod
    def of(requests: list[Request], cache: PagedCache) -> _Rows:
        ids = [r.id for r in requests]
        lengths = np.fromiter(map(len, requests), np.int64, len(requests))
        return _Rows(requests, ids, [cache.table(id) for id in ids], lengths, Draft.empty(len(ids)))

    def at(self, places: list[int]) -> _Rows:
        """Some of them."""
        return _Rows(
            [self.requests[b] for b in places],
            [self.ids[b] for b in places],
            [self.tables[b] for b in places],
            self.lengths[places],
            Draft.empty(len(places)),
        )
