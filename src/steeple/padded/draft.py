"""Chains drawn from an assistant, for all rows of a batch at once; its keys are kept from round to round.

Between rounds the assistant holds the keys of all but the last two tokens of each row. So every round begins by feeding
two tokens to every row, whether the last round was accepted to its end (then both are new) or not, and no row has a
shape of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steeple.draft.base import chain_forest
from steeple.draft.chain import fit
from steeple.ops.law import SamplingBatch, argmax, draw, probabilities
from steeple.ops.rng import Stream
from steeple.padded.rows import Ints, Rows
from steeple.types import Draft

BEHIND = 2  # newest tokens of a row whose keys the assistant does not hold


@dataclass(frozen=True, slots=True)
class Proposal:
    """``k`` tokens for each row, and the laws they were drawn from ``[B, k, V]``; None: they were chosen."""

    tokens_Bk: Tensor
    probs_BkV: Tensor | None

    def draft(self, budget_B: Ints) -> Draft:
        """The forest of the first ``budget_B`` nodes of every chain."""
        B, k = self.tokens_Bk.shape
        cu, parent = chain_forest(budget_B)
        places = np.flatnonzero(np.arange(k) < budget_B[:, None])
        flat = torch.from_numpy(places).to(self.tokens_Bk.device)
        tokens = self.tokens_Bk.reshape(-1)[flat]
        if self.probs_BkV is None:
            return Draft(tokens, parent, cu, torch.full_like(tokens, -1), chain=True)
        return Draft(tokens, parent, cu, flat, self.probs_BkV.reshape(B * k, -1), chain=True)


def propose(rows: Rows, newest_B2: Tensor, k: int, sampling: SamplingBatch, counter_B: Ints, vocab: int) -> Proposal:
    """Draw ``k`` tokens for every row from the assistant's processed law (the likeliest ones for greedy requests).

    Args:
        newest_B2: the last two tokens of each text. counter_B: its length. vocab: the target's.
    """
    device, laws = newest_B2.device, sampling.laws
    uniform = sampling.generators.uniform(counter_B, Stream.DRAFT, np.arange(k)[:, None])
    owner = torch.arange(newest_B2.shape[0], device=device)
    tokens: list[Tensor] = []
    probs: list[Tensor] = []
    feed = newest_B2
    for depth in range(k):
        # A token that the assistant has no embedding for can only make it guess worse.
        known = torch.where(feed < rows.net.known, feed, 0)
        logits_BV = fit(rows.feed(known, last=1)[:, 0], vocab).to(device)
        if laws.all_greedy:
            token = argmax(logits_BV)
        else:
            probs.append(probabilities(logits_BV, laws, owner))
            token = draw(probs[-1], torch.from_numpy(uniform[depth]).to(device))
        tokens.append(token)
        feed = token.unsqueeze(1)
    return Proposal(torch.stack(tokens, dim=1), torch.stack(probs, dim=1) if probs else None)
