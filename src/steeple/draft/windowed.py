"""Drafting through windows on the target's own cache: what ``sparse_self`` and ``spire`` have in common.

A round is k forwards of one row per request over a few pages of the target's keys. They write the keys of the positions
in flight behind the text, into the slots that verification writes over; so there is no second cache, no prompt to read,
nothing to roll back, and a round may be left out at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from steeple.cache.batch import Ints, Span, make_batch
from steeple.cache.paged import PagedCache
from steeple.cache.pages import ChoiceRule, PageChoice
from steeple.cache.sinks import SinkCopies, Turn
from steeple.cache.slice import LayerCache
from steeple.cache.window import Window, WindowBatches
from steeple.draft.base import Needs, Surroundings
from steeple.draft.carry import CarriedStates, Carry
from steeple.draft.chain import Chain, sampling_of
from steeple.draft.spire_model import FeedbackMemory, embedding, keys_values
from steeple.errors import InternalError
from steeple.model.accelerate import accelerate
from steeple.model.decoder import Decoder, Hidden
from steeple.model.rounds import NativeRound, native_round
from steeple.model.run import Runner
from steeple.ops.attention import PagedAttention
from steeple.ops.law import SamplingBatch
from steeple.request import Request
from steeple.types import Batch, Draft, SamplingParams


class Memory(Protocol):
    """What a draft remembers of a position in flight, if that is not what its forward wrote."""

    @property
    def keep(self) -> Sequence[int]:
        """Layers whose outputs ``write`` wants."""
        ...

    def write(self, batch: Batch, hidden: Hidden) -> None:
        """Replace the keys and values at the batch's slots."""
        ...


class SpireMemory:
    """Feedback memory (Fan et al. 2020, arXiv 2002.09402): the keys of a position in flight come from a mix of all of
    its states, once they are known."""

    def __init__(self, decoder: Decoder, memory: FeedbackMemory, layers: LayerCache) -> None:
        self._decoder, self._memory, self._layers = decoder, memory, layers
        self.keep: Sequence[int] = range(decoder.config.num_layers)

    def write(self, batch: Batch, hidden: Hidden) -> None:
        """Stage the memory's keys and values at the batch's slots."""
        states = [embedding(self._decoder, batch.tokens), *(hidden.kept[layer] for layer in self.keep)]
        for layer, m_BD in enumerate(self._memory(states)):
            k_BKH, v_BKH = keys_values(self._decoder, layer, m_BD, batch.positions)
            self._layers.stage(layer, batch, k_BKH, v_BKH)


@dataclass(frozen=True, slots=True)
class Passes:
    """The forwards of a draft over a cache. ``memory``: rows then see only what lies before them. ``carry``: the states
    that the rows' tokens were predicted from enter them."""

    runner: Runner
    memory: Memory | None = None
    carry: Carry | None = None

    def forward(self, batch: Batch, state_BD: Tensor | None) -> Tensor:
        """Hidden states after the last norm, ``[B, D]``. ``state_BD``: where there is a ``carry``."""
        added = None if self.carry is None or state_BD is None else self.carry(state_BD)
        if self.memory is None:
            return self.runner.forward(batch, added=added).final_TD
        hidden = self.runner.forward(batch, keep=self.memory.keep, added=added)
        self.memory.write(batch, hidden)
        return hidden.final_TD


@dataclass(frozen=True, slots=True)
class SpireParts:
    """A SPIRe draft in memory: its layers, and its feedback memory and projection of states where it has them."""

    decoder: Decoder
    memory: FeedbackMemory | None = None
    carry: Carry | None = None

    def passes(self, cache: LayerCache, attention: PagedAttention) -> Passes:
        """Its forwards over ``cache``."""
        memory = None if self.memory is None else SpireMemory(self.decoder, self.memory, cache)
        return Passes(Runner(self.decoder, cache, attention), memory, self.carry)


@dataclass(frozen=True, slots=True)
class DraftShape:
    """``k`` deep; for greedy requests ``width`` tokens per depth, of which the likeliest goes on."""

    k: int
    width: int


@dataclass(frozen=True, slots=True)
class View:
    """What of the target's cache a draft reads: a window; by ``rule``, if there is one, more pages beside it; and from
    which of the target's layers on. ``compact``: positions are those within the view, as StreamingLLM has them, instead
    of those in the text."""

    window: Window
    rule: ChoiceRule | None = None
    first_layer: int = 0
    compact: bool = False


class WindowDrafter:
    """The drafter. Drawn tokens carry the law they were drawn from; greedy requests get chosen tokens.

    Args: depth: how far and how wide a draft reaches; view: which keys it reads; passes: makes the forwards over the
        target's cache; carries: whether they carry states.
    """

    def __init__(
        self,
        depth: DraftShape,
        view: View,
        around: Surroundings,
        passes: Callable[[PagedCache], Passes],
        *,
        carries: bool = False,
    ) -> None:
        self._k, self._width, self._view, self.around, self._make = depth.k, depth.width, view, around, passes
        self._choice: PageChoice | None = None
        self._sinks: SinkCopies | None = None
        self._round: NativeRound | None = None
        self._states = CarriedStates() if carries else None
        self._vocab = around.decoder.config.vocab_size
        self._sampling = SamplingBatch.of(())

    @property
    def needs(self) -> Needs:
        scores, last_row = self._view.rule is not None, self._states is not None
        return Needs(nodes=self._k * self._width, shares_cache=True, scores=scores, last_row=last_row)

    def prepare(self, cache: PagedCache) -> None:
        """Nothing to allocate but the batches' own memory."""
        self._cache, self._passes = cache, self._make(cache)
        accelerate(self._passes.runner, graphs=self.around.graphs)
        strict = self._passes.memory is not None
        size, view = cache.block_size, self._view
        self._windows = WindowBatches(size, self.around.device, view.window, strict=strict)
        shape = self._passes.runner.decoder.config
        self._heads = (shape.num_layers, shape.num_kv_heads)
        if view.rule is not None:
            layers = slice(view.first_layer, view.first_layer + shape.num_layers)
            self._choice = PageChoice(view.rule, view.window, size, layers)
        self._sinks = self._sink_copies(cache) if view.compact else None
        carry = None if self._passes.carry is None else self._passes.carry.projection
        self._round = None if strict else native_round(self._passes.runner, carry)

    def _sink_copies(self, cache: PagedCache) -> SinkCopies:
        decoder, runner = self._passes.runner.decoder, self._passes.runner
        turn = Turn(decoder.cos / decoder.config.rope_scale, decoder.sin / decoder.config.rope_scale)
        pages = -(-self._view.window.sink // cache.block_size)
        return SinkCopies(cache, runner.cache, decoder.config.num_layers, pages, turn)

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        """A chain for each request, up to ``k`` deep; what is left of the budget goes to its siblings."""
        places = [b for b, nodes in enumerate(budget) if nodes]
        if not places:
            return Draft.empty(len(requests), self.around.device)
        drafted = list(requests) if len(places) == len(requests) else [requests[b] for b in places]
        if self._sampling.requests != drafted:
            self._sampling = sampling_of(drafted, self.around)
        counts = [min(nodes, self._k) for nodes in budget]
        width = self._width if self._sampling.laws.all_greedy and not self._sampling.laws.penalised else 1
        chain = Chain(self._sampling, [counts[b] for b in places], self._passes.runner, self._vocab, width)
        self._grow(chain, drafted)
        return chain.tree(counts, budget) if width > 1 else chain.draft(chain.table(), counts)

    def _grow(self, chain: Chain, requests: Sequence[Request]) -> None:
        everyone = [r.id for r in requests]
        base = np.fromiter(map(len, requests), np.int64, len(requests)) - 1
        tokens: Ints = np.fromiter([r.newest for r in requests], np.int64, len(requests))
        deepest, depth = int(chain.budget.max()), 0
        state = None if self._states is None else self._states.of(everyone)
        before: Ints = np.zeros(0, dtype=np.int64)
        while depth < deepest:
            active = chain.active(depth)
            if active.shape[0] != before.shape[0]:
                if state is not None and active.shape[0] < state.shape[0]:
                    state = state[torch.from_numpy(np.searchsorted(before, active)).to(state.device)]
                before = active
                ids = everyone if active.shape[0] == len(everyone) else [everyone[b] for b in active.tolist()]
                self._open(ids, base[active], deepest)
            own = tokens if active.shape[0] == len(everyone) else tokens[active]
            if self._round is not None and chain.plain:
                passes = chain.passes(depth)
                rows = self._windows.run(depth, passes, own)
                drawn, hidden = self._round(rows, chain.draws(active, passes), state)
                chain.fill(drawn, active)
                depth += passes
            else:
                hidden = self._passes.forward(self._windows.at(depth, own), state)
                chain.extend(hidden)
                depth += 1
            tokens = chain.tokens[-1]
            state = None if state is None else hidden

    def _open(self, ids: list[str], base: Ints, nodes: int) -> None:
        tables = [self._table(id, int(at) + nodes) for id, at in zip(ids, base, strict=True)]
        chosen = None if self._choice is None else self._choice.of(ids, self._heads)
        self._windows.open(ids, tables, base, nodes, chosen)
        if self._sinks is not None:
            self._windows.put_sinks(self._sinks.of(ids, tables, self._windows.skipped))

    def _table(self, id: str, length: int) -> Sequence[int]:
        """Blocks of the request, of ``length`` positions at least where it may write so far."""
        del length
        return self._cache.table(id)

    @torch.inference_mode()
    def forced_laws(self, request: Request, forced: Ints) -> Tensor:
        """The laws (temperature 1) along a path that is given instead of drawn, float32 ``[k, V]``.

        ``forced[j]`` is the node after law j; the last one is not needed. The request stands in the target's cache.
        """
        base, steps = np.array([len(request) - 1]), forced.shape[0]
        self._open([request.id], base, steps)
        tokens = np.concatenate(([request.newest], forced[:-1]))
        state = None if self._states is None else self._states.of([request.id])
        hidden: list[Tensor] = []
        for j in range(steps):
            hidden.append(self._passes.forward(self._windows.at(j, tokens[j : j + 1]), state).clone())
            state = None if state is None else hidden[-1]
        return self._passes.runner.logits(torch.cat(hidden)).softmax(dim=-1)

    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        """Choose pages for the next round by what the target's rows attended to, and keep the states that the newest
        tokens were predicted from. Keys need no care: verification has written those that the next round reads."""
        if self._states is not None:
            rows = last_rows(requests, batch, kept)
            self._states.note([requests[b].id for b in rows], list(rows.values()), hidden.final_TD)
        choice = self._choice
        if choice is None or hidden.scores is None:
            return
        places = [b for b, r in enumerate(requests) if r.ready and not r.finished and choice.wants(r.id)]
        if not places:
            return
        scores = hidden.scores.unflatten(-1, (len(requests), -1))  # block tables of a batch have one width
        if len(places) < len(requests):
            scores = scores[:, :, torch.tensor(places, device=scores.device)]
        chosen_for = [requests[b] for b in places]
        choice.note([r.id for r in chosen_for], [len(r) for r in chosen_for], scores)

    def forget(self, request: Request) -> None:
        """Nothing is kept of a request but pages chosen for it, copies of its sink and the state to carry."""
        if self._states is not None:
            self._states.forget(request.id)
        if self._choice is not None:
            self._choice.forget(request.id)
        if self._sinks is not None:
            self._sinks.forget(request.id)

    def check_integrity(self) -> None:
        """Chosen pages and carried states must have gone with their requests."""
        for kept in (self._choice, self._sinks, self._states):
            if kept is not None and kept.remembered:
                raise InternalError(f"{type(kept).__name__}: {sorted(kept.remembered)[:4]} are left over")


def last_rows(requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]]) -> dict[int, int]:
    """Place in the batch -> the flat row that the newest token was predicted from; of requests that await a round."""
    first = batch.layout.node_row.tolist()
    return {
        b: first[b] + nodes[-1] if nodes else first[b] - 1
        for b, (request, nodes) in enumerate(zip(requests, kept, strict=True))
        if request.cached == len(request) - 1 and not request.finished
    }


@torch.inference_mode()
def draft_laws(drafter: WindowDrafter, text: Sequence[int], forced: Sequence[int]) -> Tensor:
    """The laws of a draft as the engine computes them, out of a target's cache made for the purpose.

    Args:
        text: the last token is the root of the draft, the rest is in the cache.
        forced: the nodes after laws 0, 1, ...; as many laws are made.

    Returns:
        float32 ``[len(forced), V]``, temperature 1. For comparing training with inference.
    """
    around, request = drafter.around, Request("parity", list(text), SamplingParams())
    length = len(text) + len(forced)
    view = drafter._view.window
    seen = min(view.sink, length) + min(view.window, around.decoder.config.max_context) + len(forced)
    cache = PagedCache(
        around.decoder.config,
        # A draft with a cache of its own gets as many blocks, and needs them for all that it sees.
        blocks=-(-length // around.block_size) + seen // around.block_size + 4,
        block_size=around.block_size,
        dtype=around.dtype,
        device=around.device,
        attention=around.attention,
    )
    cache.attach(request.id, request.tokens)
    cache.reserve(request.id, length)
    span = Span(request.id, 0, request.tokens[:-1], cache.table(request.id))
    batch = make_batch([span], Draft.empty(1), around.block_size, around.device)
    drafter.prepare(cache)
    hidden = Runner(around.decoder, cache, around.attention).forward(batch, keep=drafter.needs.hidden)
    request.cached = len(text) - 1
    drafter.observe([request], batch, [()], hidden)
    return drafter.forced_laws(request, np.array(forced, dtype=np.int64))
