"""The target's own logits of whole texts: one forward, no engine, no cache to carry over, no draft."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steeple.cache.batch import Span, make_batch
from steeple.cache.paged import PagedCache
from steeple.engine import LoadedModel
from steeple.model.run import Runner
from steeple.types import Draft

BLOCK = 16


def last_logits(target: LoadedModel, texts: Sequence[Sequence[int]], last: int = 1) -> Tensor:
    """Float32 logits after each of the ``last`` newest tokens of every text, ``[B, last, V]``.

    Args:
        texts: B texts of at least ``last`` tokens each.
    """
    decoder = target.decoder
    blocks = [-(-len(text) // BLOCK) for text in texts]
    cache = PagedCache(
        decoder.config,
        blocks=sum(blocks),
        block_size=BLOCK,
        dtype=decoder.dtype,
        device=target.device,
        share_prefixes=False,
        attention=target.attention,
    )
    spans = []
    for index, text in enumerate(texts):
        tokens = np.asarray(text, dtype=np.int64)
        cache.attach(str(index), tokens)
        cache.reserve(str(index), len(text))
        spans.append(Span(str(index), 0, tokens, cache.table(str(index))))
    batch = make_batch(spans, Draft.empty(len(spans), target.device), BLOCK, target.device)
    runner = Runner(decoder, cache, target.attention)
    hidden = runner.forward(batch).final_TD
    ends = np.cumsum([len(text) for text in texts])
    rows = (ends[:, None] - np.arange(last, 0, -1)).reshape(-1)
    logits = runner.logits(hidden[torch.from_numpy(rows).to(target.device)])
    return logits.reshape(len(texts), last, -1)


def top_gap(target: LoadedModel, text: Sequence[int]) -> float:
    """How far apart the target's two best logits after ``text`` are."""
    best = last_logits(target, [text])[0, 0].topk(2).values
    return float(best[0] - best[1])


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first place where two token lists differ (one may end early); None if they are equal."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))
