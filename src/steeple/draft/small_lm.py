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
from numpy.typing import NDArray
from torch import Tensor

from steeple import hf
from steeple.cache.batch import Span, make_batch
from steeple.cache.paged import PagedCache
from steeple.config import check_range
from steeple.draft.base import Drafter, Needs, Surroundings, chain_parents
from steeple.errors import ConfigError
from steeple.model.decoder import Decoder, Hidden
from steeple.model.load import load_decoder
from steeple.model.run import Runner
from steeple.ops.law import Counts, Laws, count_text, draw, penalise, probabilities
from steeple.ops.rng import Stream, uniform
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
    """What the small model's cache holds of a request: ``cached`` positions of text, then the last draft's nodes."""

    cached: int
    nodes: NDArray[np.int64]

    def settle(self, text: NDArray[np.int64]) -> None:
        """Count those nodes that became text; whatever happened in between, the text decides."""
        after = text[self.cached : self.cached + len(self.nodes)]
        same = self.nodes[: len(after)] == after
        self.cached += len(same) if same.all() else int(same.argmin())
        # The root is fed again if its round came to nothing (the target's forward failed).
        self.cached = min(self.cached, len(text) - 1)
        self.nodes = self.nodes[:0]


class SmallLM:
    """The drafter. Drawn tokens carry the law they were drawn from; greedy requests get chosen tokens."""

    def __init__(self, config: SmallLMConfig, decoder: Decoder, around: Surroundings) -> None:
        self.config, self._around, self._decoder = config, around, decoder
        self._vocab = around.decoder.config.vocab_size
        # Of two models with one tokenizer the target's vocabulary may be padded further: what is beyond reads as this.
        self._last_token = decoder.config.vocab_size - 1
        self._states: dict[str, _State] = {}

    @property
    def needs(self) -> Needs:
        own = self._decoder.config.kv_elements_per_token * self._around.dtype.itemsize
        return Needs(nodes=self.config.k, own_cache_bytes_per_token=own)

    def prepare(self, blocks: int) -> None:
        """A paged cache of its own, as long as the target's."""
        around = self._around
        self.cache = PagedCache(
            self._decoder.config,
            blocks=blocks,
            block_size=around.block_size,
            dtype=around.dtype,
            device=around.device,
            share_prefixes=around.share_prefixes,
            write=around.attention.write_kv,
        )
        self._runner = Runner(self._decoder, self.cache, around.attention)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        """A chain of up to ``budget[b]`` nodes each; requests for which its cache has no room get none."""
        nodes = [n if n and self._admit(r, n) else 0 for r, n in zip(requests, budget, strict=True)]
        places = [b for b, n in enumerate(nodes) if n]
        if not places:
            return Draft.empty(len(requests), self._around.device)
        chain = _Chain([requests[b] for b in places], [nodes[b] for b in places], self._vocab, self._around.device)
        chain.extend(self._catch_up(chain.requests))
        for depth in range(1, max(nodes)):
            chain.extend(self._advance(chain, depth))
        for request, drawn in zip(chain.requests, chain.nodes(), strict=True):
            self._states[request.id].nodes = drawn[:-1]  # the last node was never an input
        return chain.draft(nodes)

    def _admit(self, request: Request, nodes: int) -> bool:
        state = self._states.get(request.id)
        if state is None:
            found = self.cache.attach(request.id, request.tokens)
            state = self._states[request.id] = _State(found, np.zeros(0, dtype=np.int64))
        state.settle(request.tokens)
        return self.cache.reserve(request.id, len(request) + nodes - 1)

    def _catch_up(self, requests: Sequence[Request]) -> Tensor:
        """Feed the text that the small model has not seen, in steps of bounded size; hidden of each newest token."""
        last: dict[int, Tensor] = {}
        while len(last) < len(requests):
            room = self._around.step_tokens
            spans, who, done = [], [], []
            for place, request in enumerate(requests):
                if place in last or room == 0:
                    continue
                state = self._states[request.id]
                text = np.minimum(request.tokens[state.cached : state.cached + room], self._last_token)
                room -= len(text)
                spans.append(Span(request.id, state.cached, text, self.cache.table(request.id)))
                who.append(place)
                done.append(state.cached + len(text) == len(request))
            hidden = self._forward(spans, [requests[place] for place in who])
            end = np.cumsum([len(s.tokens) for s in spans]) - 1
            for span, place, row, complete in zip(spans, who, end.tolist(), done, strict=True):
                self._states[requests[place].id].cached = span.start + len(span.tokens)
                if complete:
                    last[place] = hidden[row]
        return self._runner.logits(torch.stack([last[place] for place in range(len(requests))]))

    def _advance(self, chain: _Chain, depth: int) -> Tensor:
        """One more token of every chain that wants it."""
        active = chain.active(depth)
        requests = [chain.requests[place] for place in active]
        spans = []
        for place, request in zip(active, requests, strict=True):
            token = chain.tokens[depth - 1][place : place + 1]
            spans.append(Span(request.id, len(request) + depth - 1, token, self.cache.table(request.id)))
        return self._runner.logits(self._forward(spans, requests))

    def _forward(self, spans: Sequence[Span], requests: Sequence[Request]) -> Tensor:
        draft = Draft.empty(len(spans), self._around.device)
        batch = make_batch(spans, draft, self.cache.block_size, self._around.device)
        hidden = self._runner.forward(batch).final_TD
        # Only verified text is ever named and shared; the nodes behind it stay this request's own.
        self.cache.commit(batch, [()] * len(spans), [r.tokens for r in requests])
        return hidden

    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        """Nothing: the next proposal settles its cache by comparing its nodes with the text."""

    def forget(self, request: Request) -> None:
        self.cache.free(request.id)
        self._states.pop(request.id, None)

    def check_integrity(self) -> None:
        """No block of the own cache may be held."""
        self.cache.check_integrity(idle=True)


class _Chain:
    """Chains under construction, one per request, drawn from the processed law of the small model's logits."""

    def __init__(
        self, requests: Sequence[Request], budget: Sequence[int], vocab: int, device: torch.device | str
    ) -> None:
        self.requests, self._budget, self._vocab = requests, np.asarray(budget), vocab
        self.tokens: list[NDArray[np.int64]] = []  # per depth [B]
        self._laws = Laws.of([r.params for r in requests], device)
        self._probs: list[tuple[list[int], Tensor]] = []  # per depth: places whose token was drawn, their laws
        self._seed = torch.tensor([r.seed for r in requests], dtype=torch.int64, device=device)
        self._counter = torch.tensor([len(r) for r in requests], dtype=torch.int64, device=device)
        self._counts: Counts | None = None
        if self._laws.penalised:
            texts = [(r.tokens[: r.prompt_len], r.output) for r in requests]
            self._counts = count_text([t[0] for t in texts], [t[1] for t in texts], vocab, device)

    def active(self, depth: int) -> list[int]:
        """Places whose budget asks for a node at ``depth``."""
        return np.flatnonzero(self._budget > depth).tolist()

    def extend(self, logits_RV: Tensor) -> None:
        """Draw (or choose) the next node of every active chain from its logits."""
        depth = len(self.tokens)
        places = self.active(depth)
        owner = torch.tensor(places, dtype=torch.int64, device=logits_RV.device)
        logits = _fit(logits_RV, self._vocab)
        if self._counts is not None:
            counts = Counts(self._counts.prompt[owner], self._counts.output[owner])
            logits = penalise(logits, self._laws, owner, counts)
        if self._laws.all_greedy:
            drawn = logits.argmax(dim=-1)
        else:
            probs = probabilities(logits, self._laws, owner)
            drawn = draw(probs, uniform(self._seed[owner], self._counter[owner], Stream.DRAFT, depth))
            sampled = [i for i, place in enumerate(places) if not self.requests[place].params.greedy]
            self._probs.append(([places[i] for i in sampled], probs[sampled]))
        if self._counts is not None:
            self._counts.add(owner, drawn)
        column = np.zeros(len(self.requests), dtype=np.int64)
        column[places] = drawn.cpu().numpy()
        self.tokens.append(column)

    def nodes(self) -> list[NDArray[np.int64]]:
        """The chain of each request."""
        table = np.stack(self.tokens, axis=1)
        return [table[place, :budget] for place, budget in enumerate(self._budget.tolist())]

    def draft(self, counts: Sequence[int]) -> Draft:
        """The forest over all requests of the step: ``counts[b]`` nodes, 0 for those without a chain."""
        device = self._laws.temperature.device
        cu = torch.from_numpy(np.concatenate(([0], np.cumsum(np.asarray(counts, dtype=np.int64)))))
        tokens = torch.from_numpy(np.concatenate(self.nodes())).to(device)
        first = np.concatenate(([0], np.cumsum(self._budget)))
        row = np.full(tokens.shape[0], -1, dtype=np.int64)
        base = 0
        for depth, (places, _) in enumerate(self._probs):
            row[first[places] + depth] = base + np.arange(len(places))
            base += len(places)
        laws = torch.cat([p for _, p in self._probs]) if base else None
        return Draft(tokens, chain_parents(cu), cu, torch.from_numpy(row).to(device), laws)


def _fit(logits_RV: Tensor, vocab: int) -> Tensor:
    """Models pad their vocabulary differently: cut, or fill with impossible tokens."""
    missing = vocab - logits_RV.shape[-1]
    if missing <= 0:
        return logits_RV[:, :vocab]
    return torch.nn.functional.pad(logits_RV, (0, missing), value=-torch.inf)
