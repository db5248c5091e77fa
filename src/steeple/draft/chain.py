"""Chains of nodes under construction: every pass of a drafter adds one node to each chain that wants it.

Greedy requests get chosen tokens; sampled ones are drawn from the processed law, which stays with the draft, so that
verification is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from steeple.cache.batch import Ints
from steeple.draft.base import Surroundings, chain_forest
from steeple.draft.tree import chain_with_leaves
from steeple.model.rounds import Draws
from steeple.model.run import Runner
from steeple.ops.law import Counts, Laws, SamplingBatch, argmax, count_text, draw, penalise, probabilities
from steeple.ops.rng import Generators, Stream
from steeple.ops.sampling import sampler
from steeple.request import Request
from steeple.types import Draft


def sampling_of(requests: Sequence[Request], around: Surroundings) -> SamplingBatch:
    """How drafts of ``requests`` are drawn: as they sample, or greedily where drafters ``choose``; penalties stay."""
    if not around.chooses:
        return SamplingBatch.of(requests, around.device)
    greedy = [replace(r.params, temperature=0.0) for r in requests]
    return SamplingBatch(list(requests), Laws.of(greedy, around.device), Generators([]), False)


class Chain:
    """Chains under construction, one per request, drawn from the processed law of the drafter's logits.

    Args: sampling of the requests; budget: nodes of each chain, at least one; runner: whose head makes the logits;
        vocab: the target's. width: tokens per depth where all are chosen; ``tree`` has them, ``draft`` the first.
    """

    def __init__(
        self, sampling: SamplingBatch, budget: Sequence[int], runner: Runner, vocab: int, width: int = 1
    ) -> None:
        self.budget: Ints = np.array(budget)
        self.tokens: list[Ints] = []  # per depth [B]
        self._everyone, self._shortest = np.arange(len(budget)), min(budget)
        self._sampling, self._runner, self._vocab = sampling, runner, vocab
        self._width = width
        self._leaves: list[Ints] = []  # per depth [B, width - 1]
        self._drawn: list[Ints] = []  # per depth: the chains that got a node
        requests, laws = sampling.requests, sampling.laws
        self._device = laws.temperature.device
        self._native = sampler(runner.decoder.kernels.library)
        self._counts: Counts | None = None
        if laws.penalised:
            texts = [(r.tokens[: r.prompt_len], r.output) for r in requests]
            self._counts = count_text([t[0] for t in texts], [t[1] for t in texts], vocab, self._device)
        self._probs: Tensor | None = None
        if not laws.all_greedy:
            counter = np.fromiter(map(len, requests), np.int64, len(requests))
            lanes = np.arange(int(self.budget.max()))[:, None]
            self._uniform = sampling.generators.uniform(counter, Stream.DRAFT, lanes)
            self._probs = torch.empty(int(self.budget.sum()), vocab, device=self._device)
            self._written = 0  # rows of the laws

    @property
    def plain(self) -> bool:
        """Whether every node is the likeliest or drawn from the softmax of its logits over temperature: what a native
        call can do for several passes."""
        laws = self._sampling.laws
        whole = self._runner.decoder.config.vocab_size == self._vocab and self._width == 1 and self._counts is None
        return whole and (self._probs is None or not (laws.any_greedy or laws.truncated))

    def passes(self, depth: int) -> int:
        """From ``depth`` on, how many passes the same chains want."""
        if depth < self._shortest:
            return self._shortest - depth
        return int(self.budget[self.budget > depth].min()) - depth

    def draws(self, places: Ints, passes: int) -> Draws | None:
        """What the next nodes of a ``plain`` chain are drawn by; None: they are the likeliest.

        Args: places: the active chains; passes: nodes of each.
        """
        if self._probs is None:
            return None
        depth, laws = len(self.tokens), self._sampling.laws
        uniform = self._uniform[depth : depth + passes]
        temperature = laws.temperature
        if places.shape[0] < self.budget.shape[0]:
            uniform, temperature = np.ascontiguousarray(uniform[:, places]), temperature[torch.from_numpy(places)]
        rows = passes * places.shape[0]
        self._written += rows
        return Draws(temperature, uniform, self._probs[self._written - rows : self._written])

    def fill(self, tokens_kR: Ints, places: Ints) -> None:
        """Nodes of the active chains, by depth, whose laws have been written already."""
        for drawn in tokens_kR:
            self.tokens.append(self._spread(drawn, places))
            self._drawn.append(places)

    def active(self, depth: int) -> Ints:
        """Places whose budget asks for a node at ``depth``."""
        return self._everyone if depth < self._shortest else np.flatnonzero(self.budget > depth)

    def extend(self, hidden_RD: Tensor) -> None:
        """Draw (or choose) the next node of every active chain."""
        places = self.active(len(self.tokens))
        # A model that knows more tokens than the target must be kept from choosing them.
        small = self._runner.decoder.config.vocab_size <= self._vocab
        if self._width > 1:
            drawn = self._widest(fit(self._runner.logits(hidden_RD), self._vocab), places)
        elif self._probs is None and self._counts is None and small:
            drawn = self._runner.best(hidden_RD)
        else:
            drawn = self._draw(fit(self._runner.logits(hidden_RD), self._vocab), places)
        self.tokens.append(self._spread(drawn.cpu().numpy(), places))
        self._drawn.append(places)

    def _spread(self, found: Ints, places: Ints) -> Ints:
        """Values of the active chains at the places of all."""
        if places.shape[0] == self.budget.shape[0]:
            return found
        column = np.zeros((self.budget.shape[0], *found.shape[1:]), dtype=np.int64)
        column[places] = found
        return column

    def _widest(self, logits_RV: Tensor, places: Ints) -> Tensor:
        """The likeliest tokens; those that do not go on are kept as leaves."""
        best_RW = logits_RV.topk(min(self._width, self._vocab), dim=-1).indices
        self._leaves.append(self._spread(best_RW[:, 1:].cpu().numpy(), places))
        return best_RW[:, 0]

    def _draw(self, logits_RV: Tensor, places: Ints) -> Tensor:
        """The next nodes from their logits; their laws go to the rows of the draft."""
        depth, laws = len(self.tokens), self._sampling.laws
        owner = torch.from_numpy(places).to(self._device)
        if self._counts is not None:
            counts = Counts(self._counts.prompt[owner], self._counts.output[owner])
            logits_RV = penalise(logits_RV, laws, owner, counts)
        if self._probs is None:
            drawn = argmax(logits_RV)
        else:
            own = self._probs[self._written : self._written + places.shape[0]]
            self._written += places.shape[0]
            u = self._uniform[depth] if places is self._everyone else self._uniform[depth][places]
            if self._native is not None and self._native.serves(laws, logits_RV):
                temperature = laws.temperature if places is self._everyone else laws.temperature[owner]
                drawn = self._native.draw(logits_RV, temperature, u, own)
            else:
                probabilities(logits_RV, laws, owner, out=own)
                drawn = draw(own, torch.from_numpy(u).to(self._device))
        if self._counts is not None:
            self._counts.add(owner, drawn)
        return drawn

    def table(self) -> Ints:
        """The chains, ``[B, deepest]``; each is as long as its budget."""
        return np.stack(self.tokens, axis=1)

    def draft(self, table: Ints, counts: Sequence[int]) -> Draft:
        """The forest over all requests of the step: ``counts[b]`` nodes, 0 for those without a chain."""
        cu, parent = chain_forest(np.array(counts))
        real = np.arange(table.shape[1]) < self.budget[:, None]
        rows = np.full(table.shape, -1, dtype=np.int64)
        if self._probs is not None:
            sampled = np.array([not r.params.greedy for r in self._sampling.requests])
            base = 0
            for depth, places in enumerate(self._drawn):
                rows[places, depth] = np.where(sampled[places], np.arange(base, base + places.shape[0]), -1)
                base += places.shape[0]
        flat, row = torch.from_numpy(table[real]), torch.from_numpy(rows[real])
        return Draft(flat.to(self._device), parent, cu, row.to(self._device), self._probs, chain=True)

    def tree(self, depth: Sequence[int], nodes: Sequence[int]) -> Draft:
        """The chains with their leaves, over all requests of the step; see ``chain_with_leaves``."""
        depths = np.array(depth)
        chain = np.zeros((depths.shape[0], len(self.tokens)), dtype=np.int64)
        leaves = np.zeros((*chain.shape, self._leaves[0].shape[1]), dtype=np.int64)
        drafted = depths > 0
        chain[drafted], leaves[drafted] = self.table(), np.stack(self._leaves, axis=1)
        return chain_with_leaves(chain, leaves, depths, np.array(nodes), self._device)


def fit(logits_RV: Tensor, vocab: int) -> Tensor:
    """Models pad their vocabulary differently: cut, or fill with impossible tokens."""
    missing = vocab - logits_RV.shape[-1]
    if missing <= 0:
        return logits_RV[:, :vocab]
    return torch.nn.functional.pad(logits_RV, (0, missing), value=-torch.inf)
