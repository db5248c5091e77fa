"""A drafter whose depth the engine chooses round by round, down to none: never slower than plain decoding by much.

Which drafter: the one named (``auto-k:spire``), else the best one trained for the target, else the target itself.
How the depth is chosen: ``steeple.engine.length``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from steeple.cache.paged import PagedCache
from steeple.config import check_range
from steeple.draft.base import Drafter, DrafterConfig, Needs, Surroundings
from steeple.draft.declared import DeclaresMemory
from steeple.errors import ConfigError
from steeple.model.decoder import Hidden
from steeple.plan.memory_parts import DraftMemory, Lay
from steeple.request import Request
from steeple.types import MAX_NODES, Batch, Draft

log = logging.getLogger(__name__)

T = TypeVar("T")

PREFERRED = ("spire", "small_lm", "sparse_self")


@dataclass(frozen=True, kw_only=True)
class AutoKConfig:
    """Settings: the drafter ``model`` (as in ``--drafter``), and ``k``, its greatest depth."""

    model: str = field(default="", metadata={"help": "the drafter; empty: the best one there is for the target"})
    k: int = field(default=8, metadata={"help": "greatest depth of a draft"})

    adaptive = True

    def __post_init__(self) -> None:
        check_range("auto-k", "k", self.k, 1, MAX_NODES)

    def build(self, around: Surroundings) -> Drafter:
        """The drafter, with the request that the engine choose its depth."""
        return AutoK(self._first(lambda config: config.build(around)))

    def memory(self, around: Surroundings, lay: Lay) -> DraftMemory:
        """That of the drafter that it would build."""

        def declared(config: DrafterConfig) -> DraftMemory:
            return config.memory(around, lay) if isinstance(config, DeclaresMemory) else DraftMemory(draws=True)

        return self._first(declared)

    def _first(self, use: Callable[[DrafterConfig], T]) -> T:
        """What ``use`` gives for the first drafter that can be used."""
        from steeple.draft import drafter_config  # the register knows this class, so it cannot be known before

        for name in (self.model,) if self.model else PREFERRED:
            config = drafter_config(name, k=self.k)
            if config is None:
                raise ConfigError("auto-k: model = 'none' leaves nothing to choose; name a drafter.")
            try:
                return use(config)
            except ConfigError as error:
                if self.model or name == PREFERRED[-1]:
                    raise
                log.info("auto-k goes on without %s: %s", name, error)
        raise ConfigError("auto-k: there is no drafter to choose from")


class AutoK:
    """A drafter as it is, declared adaptive."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    @property
    def needs(self) -> Needs:
        return replace(self._drafter.needs, adaptive=True)

    def prepare(self, cache: PagedCache) -> None:
        """See ``Drafter``."""
        self._drafter.prepare(cache)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        """See ``Drafter``."""
        return self._drafter.propose(requests, budget)

    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        """See ``Drafter``."""
        self._drafter.observe(requests, batch, kept, hidden)

    def forget(self, request: Request) -> None:
        """See ``Drafter``."""
        self._drafter.forget(request)

    def check_integrity(self) -> None:
        """See ``Drafter``."""
        self._drafter.check_integrity()
