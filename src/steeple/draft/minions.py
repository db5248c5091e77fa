"""Several drafters vote: the path that the heaviest of them agree on is the draft.

Source: Minions (Wang et al. 2024, arXiv 2402.15678), weighted majority vote (after Littlestone and Warmuth). Every
drafter proposes a greedy chain; the chains form a trie; the walk from the root takes the heaviest child; the path that
it ends with was proposed by some drafter as it stands.
Cost: all drafters' passes one after the other, one chain for the target to verify. Loses where the drafters agree, and
where one of them is always the best: then the others are paid for nothing, until they are paused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from steeple.cache.paged import PagedCache
from steeple.config import check_range
from steeple.draft.base import Drafter, Needs, Surroundings, chains
from steeple.draft.parts import Parts, build_parts, part_configs, parts_memory
from steeple.draft.votes import Votes, heaviest_paths
from steeple.errors import ConfigError, InternalError
from steeple.model.decoder import Hidden
from steeple.plan.memory_parts import DraftMemory, Lay
from steeple.request import Request
from steeple.types import MAX_NODES, Batch, Draft

OWNER = "minions"

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MinionsConfig:
    """Settings of the vote.

    Fields: models: the drafters, as ``--drafter`` takes them; the first one wins ties. After a round the weight of a
    drafter is multiplied by ``1 + reward`` if the target agreed with more than ``threshold`` of its tokens that were
    tried, else by ``1 - penalty``. ``shared``: one weight per drafter instead of one per drafter and request; then a
    request's draft, and what comes of its seed, depends on its neighbours.
    """

    models: str | tuple[str, ...] = field(
        default="ngram,sparse_self", metadata={"help": "the drafters that vote, with commas between"}
    )
    k: int = field(default=4, metadata={"help": "depth of every drafter's chain"})
    reward: float = field(default=0.2, metadata={"help": "how much heavier a good round makes a drafter"})
    penalty: float = field(default=0.2, metadata={"help": "how much lighter a bad round makes a drafter"})
    threshold: float = field(default=0.5, metadata={"help": "share of its tokens that makes a round a good one"})
    shared: bool = field(default=False, metadata={"help": "one set of weights for all requests"})

    def __post_init__(self) -> None:
        check_range(OWNER, "k", self.k, 1, MAX_NODES)
        check_range(OWNER, "reward", self.reward, 0.0, 10.0)
        check_range(OWNER, "penalty", self.penalty, 0.0, 0.99)
        check_range(OWNER, "threshold", self.threshold, 0.0, 1.0)
        part_configs(OWNER, self.models, self.k)

    def build(self, around: Surroundings) -> Drafter:
        """The drafters, told to choose; ``ConfigError`` for one that proposes more than a chain."""
        parts = build_parts(OWNER, part_configs(OWNER, self.models, self.k), replace(around, chooses=True))
        return Minions(self, parts, around)

    def memory(self, around: Surroundings, lay: Lay) -> DraftMemory:
        """That of all the drafters."""
        found = parts_memory(part_configs(OWNER, self.models, self.k), around, lay)
        return replace(found, draws=False)


class Minions:
    """The drafter: asks every part that is not paused, and proposes the heaviest path. All its tokens are chosen.

    Weights are those of past rounds. They outlive a preemption, so drafts do not depend on who was preempted.
    """

    def __init__(self, config: MinionsConfig, parts: Parts, around: Surroundings) -> None:
        if parts.needs.nodes > config.k:
            raise ConfigError(
                f"minions: one of {config.models!r} proposes {parts.needs.nodes} nodes where k = {config.k}; only "
                "chains can vote. Leave out its width."
            )
        self._parts, self._k, self._device = parts, config.k, around.device
        self.votes = Votes(len(parts), config.k, config.reward, config.penalty, config.threshold, shared=config.shared)

    @property
    def needs(self) -> Needs:
        return self._parts.needs

    def prepare(self, cache: PagedCache) -> None:
        """See ``Drafter``."""
        self._parts.prepare(cache)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        """The heaviest path for each request. A paused drafter is not asked."""
        rows = self.votes.rows([r.id for r in requests])
        asked_nB = self.votes.asked(rows)
        wanted: Ints = np.fromiter(budget, np.int64, len(requests))
        table_nBk = np.full((len(self._parts), len(requests), self._k), -1, dtype=np.int64)
        for part, own_Bk, asked_B in zip(self._parts.parts, table_nBk, asked_nB, strict=True):
            nodes = np.where(asked_B, wanted, 0)
            if nodes.any():
                self._fill(own_Bk, part.propose(requests, nodes.tolist()))
        lengths = np.fromiter(map(len, requests), np.int64, len(requests))
        self.votes.note(rows, table_nBk, lengths)
        path_Bk = heaviest_paths(table_nBk, self.votes.weights(rows))
        real_Bk = path_Bk >= 0
        counts = real_Bk.sum(axis=1)
        return chains(np.split(path_Bk[real_Bk], np.cumsum(counts)[:-1]), self._device)

    def _fill(self, own_Bk: Ints, draft: Draft) -> None:
        """Write a part's chains into its table."""
        if not draft.chain:
            raise InternalError("a drafter that votes proposed something else than chains")
        counts = draft.counts.numpy()
        own_Bk[np.arange(self._k) < counts[:, None]] = draft.tokens.cpu().numpy()

    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        """Compare every drafter's chain of the round with the text that came out, the winner's and the losers'."""
        self._parts.observe(requests, batch, kept, hidden)
        judged = [r for r in requests if self.votes.knows(r.id)]
        if judged:
            self._judge(judged)

    def _judge(self, requests: Sequence[Request]) -> None:
        rows = self.votes.rows([r.id for r in requests])
        text_Bk = np.full((len(requests), self._k), -1, dtype=np.int64)
        for own_k, request, before in zip(text_Bk, requests, self.votes.lengths(rows).tolist(), strict=True):
            written = request.tokens[before : before + self._k] if before >= 0 else request.tokens[:0]
            own_k[: written.shape[0]] = written
        self.votes.learn(rows, text_Bk)

    def forget(self, request: Request) -> None:
        """The parts forget a request in any case, the vote one that has ended."""
        self._parts.forget(request)
        if request.finished:
            self.votes.forget(request.id)

    def check_integrity(self) -> None:
        """No request may have weights left."""
        self._parts.check_integrity()
        if self.votes.remembered:
            raise InternalError(f"votes on {sorted(self.votes.remembered)[:4]} are left over")
