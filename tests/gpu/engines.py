"""Engines of the laws' matrix on any device, in any dtype, with or without graphs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "laws"))

from checks import GREEDY, prompts
from forests import Checked
from lab import BAD, CACHES, TARGET, CacheKind, drafters, make_requests, run

from steeple.cache.blocks import BlockPool
from steeple.cache.paged import PagedCache
from steeple.draft.base import Drafter, Surroundings
from steeple.engine.engine import Engine, EngineParts
from steeple.model.decoder import Decoder
from steeple.model.graphs import step_graphs
from steeple.ops.attention import PagedAttention
from steeple.types import Draft

SMALL_BUCKETS = (1, 2, 4, 8)


class OnDevice:
    """A drafter whose forests are moved to the device of the target."""

    def __init__(self, drafter: Drafter, device: torch.device) -> None:
        self._drafter, self._device = drafter, device

    def __getattr__(self, name: str) -> object:
        return getattr(self._drafter, name)

    def propose(self, *args: object) -> Draft:
        draft = self._drafter.propose(*args)
        probs = None if draft.probs is None else draft.probs.to(self._device)
        return replace(draft, tokens=draft.tokens.to(self._device), row=draft.row.to(self._device), probs=probs)


def paged(target: Decoder, attention: PagedAttention, kind: CacheKind) -> tuple[PagedCache, int]:
    """A cache with one block more than requests may take, and a slot of that block."""
    cache = PagedCache(
        target.config,
        blocks=kind.blocks + 1,
        block_size=kind.block_size,
        dtype=target.dtype,
        device=target.device,
        share_prefixes=kind.share,
        attention=attention,
    )
    cache.pool = BlockPool(kind.blocks)
    return cache, kind.blocks * kind.block_size


def build(
    row: str,
    attention: PagedAttention,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kind: CacheKind = CACHES["paged"],
    graphs: Sequence[int] = (),
    batch_size: int = 5,
    step_tokens: int = 12,
) -> Engine:
    """``graphs``: the buckets; none = no graphs. Captured on a GPU, the same buffers without capture on a CPU."""
    device = torch.device(device)
    target, bad = (copy.deepcopy(decoder).to(device, dtype) for decoder in (TARGET, BAD))
    for decoder in (target, bad):
        decoder.reset_rope()  # its tables stay float32
    around = Surroundings(
        decoder=target,
        tokenizer=None,
        attention=attention,
        device=device,
        dtype=dtype,
        block_size=kind.block_size,
        step_tokens=step_tokens,
        share_prefixes=kind.share,
    )
    drafter = drafters(target, bad)[row](around)
    if drafter is not None:
        drafter = OnDevice(Checked(drafter, target.config.vocab_size), device)
    cache, scratch = paged(target, attention, kind)
    if drafter is not None:
        drafter.prepare(cache)
    parts = EngineParts(
        decoder=target,
        cache=cache,
        attention=attention,
        drafter=drafter,
        tokenizer=None,
        batch_size=batch_size,
        step_tokens=step_tokens,
        max_context=target.config.max_context,
    )
    engine = Engine(parts)
    engine._runner.whole = None
    if graphs:
        engine._runner.whole = step_graphs(target, cache, attention, scratch=scratch, buckets=graphs)
    return engine


def greedy(engine: Engine, count: int = len(GREEDY)) -> list[list[int]]:
    """Outputs of the first of the laws' greedy requests: ragged, chunked, joining; the last ones with penalties."""
    return run(engine, make_requests(prompts(), GREEDY)[:count], join_every=1)
