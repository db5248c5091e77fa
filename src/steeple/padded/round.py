"""One round of a batch of rows: draft, verify, write; and the prefill that makes rows out of prompts.

What a request draws depends on its seed, its length and ``k`` alone: its draft is shortened by its own room only, never
by its neighbours'. Rows with a shorter draft are fed tokens that nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steeple.ops.law import SamplingBatch
from steeple.padded.draft import BEHIND, propose
from steeple.padded.judge import verdicts, write
from steeple.padded.net import Net
from steeple.padded.rows import Ints, LeftPadded, Rows
from steeple.padded.stats import PaddedStats
from steeple.request import Request


@dataclass(frozen=True, slots=True)
class Group:
    """The requests of a round and their rows of the target's cache and of the assistant's, in the same order."""

    requests: list[Request]
    target: Rows
    draft: Rows | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round did: slots of each row that count, in the target's cache and in the assistant's (none if it was not
    asked), and the rows whose requests go on [indices]."""

    kept_B: Ints
    drafted_B: Ints
    staying: Ints


def play(group: Group, k: int, stats: PaddedStats) -> Outcome:
    """Run one round; appends to the requests, and leaves the caches for the schedule to settle."""
    requests, target, draft = group.requests, group.target, group.draft
    device = target.net.device
    length_B = np.fromiter(map(len, requests), np.int64, len(requests))
    budget_B = budgets(group, length_B, k)
    sampling = SamplingBatch.of(requests, device)
    proposal, feed = None, torch.from_numpy(np.stack([r.tokens[-BEHIND:] for r in requests])).to(device)
    if draft is not None and (depth := int(budget_B.max())):
        with stats.timed("draft", device):
            proposal = propose(draft, feed, depth, sampling, length_B, target.net.vocab)
    feed = feed[:, -1:] if proposal is None else torch.cat((feed[:, -1:], proposal.tokens_Bk), dim=1)
    with stats.timed("verify", device):
        # A drafted token may be a padded entry of the vocabulary; it is never accepted.
        logits_BnV = target.feed(torch.where(feed < target.net.known, feed, 0))
    with stats.timed("judge", device):
        written = verdicts(logits_BnV, proposal, budget_B, sampling, length_B)
        _commit(requests, written, budget_B, stats)
    stats.rounds += 1
    stats.rows += len(requests)
    stats.slots += target.width * len(requests)
    stats.held += int((target.lengths + 1 + budget_B).sum())
    going = [place for place, request in enumerate(requests) if not request.finished]
    kept_B = np.fromiter(map(len, written), np.int64, len(written))
    # A row that may not draft will never again: its budget shrinks as it grows. So nobody misses what it is not fed.
    drafted_B = kept_B if proposal is not None else np.zeros_like(kept_B)
    return Outcome(kept_B, drafted_B, np.array(going, dtype=np.int64))


def budgets(group: Group, length_B: Ints, k: int) -> Ints:
    """Nodes that each request may draft: at most ``k``, its room without the token that follows, and what the
    assistant has positions for."""
    if group.draft is None:
        return np.zeros_like(length_B)
    room = np.fromiter((r.limit for r in group.requests), np.int64, length_B.shape[0]) - length_B - 1
    budget = np.minimum(room, k)
    if group.draft.net.context:
        budget = np.minimum(budget, group.draft.net.context - length_B + 1)
    return budget.clip(min=0)


def _commit(requests: Sequence[Request], written: list[list[int]], budget_B: Ints, stats: PaddedStats) -> None:
    for request, tokens, budget in zip(requests, written, budget_B.tolist(), strict=True):
        count = write(request, tokens)
        request.cached = len(request) - 1
        request.stats.record(budget, budget, min(len(tokens) - 1, count))
        request.stats.committed += count
        stats.committed += count


def prefill(
    requests: list[Request], nets: tuple[Net, Net | None], stats: PaddedStats
) -> tuple[list[Request], LeftPadded, LeftPadded | None]:
    """Read the prompts and write the first token of each; returns the requests that go on, and their rows."""
    target, draft = nets
    length_B = np.fromiter(map(len, requests), np.int64, len(requests))
    width = int(length_B.max())
    pad_B = width - length_B
    table = np.zeros((len(requests), width), dtype=np.int64)
    for row, request in zip(table, requests, strict=True):
        row[width - len(request) :] = request.tokens
    tokens = torch.from_numpy(table).to(target.device)
    rows = LeftPadded(target, pad_B)
    with stats.timed("prefill", target.device):
        logits_B1V = rows.feed(tokens, last=1)
        sampling = SamplingBatch.of(requests, target.device)
        first = verdicts(logits_B1V, None, np.zeros_like(length_B), sampling, length_B)
        for request, own in zip(requests, first, strict=True):
            stats.committed += write(request, own)
            request.cached = len(request) - 1
        staying = np.array([i for i, r in enumerate(requests) if not r.finished], dtype=np.int64)
        drafting = None
        if draft is not None and staying.shape[0]:
            drafting = LeftPadded(draft, pad_B)
            drafting.feed(torch.where(tokens < draft.known, tokens, 0), last=1)
            drafting.keep(np.full_like(length_B, width - 1), staying)
        rows.keep(np.full_like(length_B, width), staying)
    stats.prefills += 1
    stats.prompt_tokens += int(length_B.sum())
    return [requests[i] for i in staying.tolist()], rows, drafting
