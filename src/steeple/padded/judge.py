"""From the logits of a round to what each request writes: Steeple's own verification, then the end of the text."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from steeple.ops.law import SamplingBatch, argmax
from steeple.padded.draft import Proposal
from steeple.padded.rows import Ints
from steeple.request import FinishReason, Request
from steeple.types import Draft
from steeple.verify import verify, verify_choice


def verdicts(
    logits_BnV: Tensor, proposal: Proposal | None, budget_B: Ints, sampling: SamplingBatch, counter_B: Ints
) -> list[list[int]]:
    """The tokens that each row's walk ends with: the accepted ones and one more.

    Args:
        logits_BnV: after the newest token of each row and after each drafted one; more than ``budget_B`` are not read.
        counter_B: lengths of the texts.
    """
    B, n, V = logits_BnV.shape
    draft = Draft.empty(B, logits_BnV.device) if proposal is None else proposal.draft(budget_B)
    read_R = torch.from_numpy(np.flatnonzero(np.arange(n) <= budget_B[:, None])).to(logits_BnV.device)
    logits_RV = logits_BnV.reshape(B * n, V)
    if sampling.laws.all_greedy:
        verdict = verify_choice(argmax(logits_RV)[read_R], draft)
    else:
        verdict = verify(logits_RV[read_R], draft, sampling.laws, sampling.generators, counter_B)
    flat = verdict.tokens.tolist()
    return [flat[first:end] for first, end in pairwise(verdict.cu.tolist())]


def write(request: Request, tokens: list[int]) -> int:
    """Append tokens up to the first that ends the text; returns how many were written."""
    room = request.limit - len(request)
    for count, token in enumerate(tokens[:room], 1):
        if token in request.stops:
            request.append(tokens[:count])
            request.finish(FinishReason.STOP)
            return count
    request.append(tokens[:room])
    if len(request) >= request.limit:
        request.finish(FinishReason.LENGTH)
    return min(len(tokens), room)
