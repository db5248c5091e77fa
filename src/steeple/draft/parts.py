"""Several drafters as the parts of one: their needs combined, and each shown only what it asked for.

Who drafts what is the business of the method that holds the parts; this file knows no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from steeple.cache.paged import PagedCache
from steeple.config import ModelConfig
from steeple.draft.base import DecidesLengths, Drafter, DrafterConfig, Needs, Surroundings
from steeple.draft.declared import DeclaresMemory
from steeple.errors import ConfigError
from steeple.model.decoder import Hidden
from steeple.plan.memory_parts import DraftMemory, Lay
from steeple.request import Request
from steeple.types import Batch


class Parts:
    """The parts, ``parts[i]``. Every part sees every request's steps; a part that never drafted for a request keeps
    nothing of it.

    Parts draft one after the other, each from the text alone, so parts that write positions in flight into the target's
    cache may share the slots behind the text: each reads there only what it has just written.

    Raises ``ConfigError`` for a part that decides lengths by itself: there is one length per request and round.
    """

    def __init__(self, owner: str, parts: Sequence[Drafter]) -> None:
        for part in parts:
            if isinstance(part, DecidesLengths):
                raise ConfigError(
                    f"{owner}: {type(part).__name__} decides lengths by itself and cannot be one of several drafters; "
                    "leave it out."
                )
        self.parts = tuple(parts)
        self._needs = [part.needs for part in self.parts]  # once: a part may compute its own anew each time

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def needs(self) -> Needs:
        """What all of them need together. ``nodes``: the most that any of them wants; they share one budget."""
        each = self._needs
        return Needs(
            hidden=tuple(sorted(set(chain.from_iterable(n.hidden for n in each)))),
            nodes=max((n.nodes for n in each), default=0),
            shares_cache=any(n.shares_cache for n in each),
            own_cache_bytes_per_token=sum(n.own_cache_bytes_per_token for n in each),
            adaptive=any(n.adaptive for n in each),
            scores=any(n.scores for n in each),
            every_row=any(n.every_row for n in each),
            last_row=any(n.last_row for n in each),
        )

    def prepare(self, cache: PagedCache) -> None:
        """See ``Drafter``; the parts in order."""
        for part in self.parts:
            part.prepare(cache)

    def observe(self, requests: Sequence[Request], batch: Batch, kept: Sequence[Sequence[int]], hidden: Hidden) -> None:
        """See ``Drafter``; each part gets the layers that it asked for, and the scores if it did."""
        for part, needs in zip(self.parts, self._needs, strict=True):
            part.observe(requests, batch, kept, slice_of(hidden, needs))

    def forget(self, request: Request) -> None:
        """See ``Drafter``."""
        for part in self.parts:
            part.forget(request)

    def check_integrity(self) -> None:
        """See ``Drafter``."""
        for part in self.parts:
            part.check_integrity()


def slice_of(hidden: Hidden, needs: Needs) -> Hidden:
    """``hidden`` as an engine would have made it for ``needs`` alone."""
    kept = {layer: hidden.kept[layer] for layer in needs.hidden}
    return replace(hidden, kept=kept, scores=hidden.scores if needs.scores else None)


def part_configs(owner: str, models: str | Sequence[str], k: int) -> list[DrafterConfig]:
    """The settings of the drafters that ``models`` names, each ``k`` deep.

    Args:
        owner: the method whose setting ``models`` is, for messages.
        models: specs as ``--drafter`` takes them, in a sequence or in one text with commas between.

    Raises ``ConfigError`` for an unknown one, for "none" and where there is none at all.
    """
    from steeple.draft import drafter_config  # the register knows the callers, so it cannot be known before

    specs = [spec.strip() for spec in (models.split(",") if isinstance(models, str) else models)]
    found = []
    for spec in filter(None, specs):
        config = drafter_config(spec, k=k)
        if config is None:
            raise ConfigError(f"{owner}.models = {models!r}: {spec!r} drafts nothing; leave it out.")
        found.append(config)
    if not found:
        raise ConfigError(f"{owner}.models = {models!r} names no drafter; name some, like 'ngram,sparse_self'.")
    return found


def build_parts(owner: str, configs: Sequence[DrafterConfig], around: Surroundings) -> Parts:
    """The drafters of ``configs``, each with weights and caches of its own."""
    return Parts(owner, [config.build(around) for config in configs])


def parts_memory(configs: Sequence[DrafterConfig], around: Surroundings, lay: Lay) -> DraftMemory:
    """What they take together. They run one after the other, so one forward counts: that of the largest model. A part
    that declares nothing is counted as one that draws."""
    each = [c.memory(around, lay) if isinstance(c, DeclaresMemory) else DraftMemory(draws=True) for c in configs]
    runs = max((m.runs for m in each if m.runs is not None), key=ModelConfig.body_parameters, default=None)
    return DraftMemory(
        held=sum(m.held for m in each),
        keys=sum(m.keys for m in each),
        runs=runs,
        reads_text=any(m.reads_text for m in each),
        draws=any(m.draws for m in each),
        position_state=sum(m.position_state for m in each),
        layers=sum(m.layers for m in each),
        scores=any(m.scores for m in each),
    )
