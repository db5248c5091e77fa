"""Verification: pure functions of laws and a draft. No model is ever seen here.

Laws come in rows, request after request: the law after its newest token (the root), then those after its nodes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.ops.law import Laws, argmax, probabilities
from steeple.ops.rng import Generators
from steeple.ops.sampling import NativeSampler
from steeple.types import Draft, Verdict
from steeple.verify.chains import greedy_chains, reject_chains, reject_chains_natively
from steeple.verify.greedy import Greedy
from steeple.verify.rejection import Rejection
from steeple.verify.walk import Rule, walk


def verify(
    logits_RV: Tensor,
    draft: Draft,
    laws: Laws,
    generators: Generators,
    counter: NDArray[np.int64],
    native: NativeSampler | None = None,
) -> Verdict:
    """Judge a draft by the target's (penalised) logits, by choice where all is greedy, else by rejection.

    Args:
        logits_RV: float32 rows: the root of each request and its nodes.
        generators, counter: the requests' random numbers and the lengths of their texts, ``[B]``.
        native: judges chains in one call, where it can.
    """
    if laws.all_greedy:
        return verify_choice(argmax(logits_RV), draft)
    if native is not None and draft.chain and native.serves(laws, logits_RV):
        return reject_chains_natively(draft, logits_RV, laws.temperature, native, generators, counter)
    owner = np.arange(counter.shape[0])
    if draft.tokens.shape[0]:
        owner = np.repeat(owner, draft.counts.numpy() + 1)
    probs_RV = probabilities(logits_RV, laws, torch.from_numpy(owner).to(logits_RV.device))
    if draft.chain:
        return reject_chains(draft, probs_RV, generators, counter)
    device = probs_RV.device
    seed = torch.from_numpy(generators.seeds).to(device)
    return _walk(draft, Rejection(draft, probs_RV, seed, torch.from_numpy(counter).to(device)))


def verify_choice(choice_R: Tensor, draft: Draft) -> Verdict:
    """Judge a draft by the target's best token of each row, int64 ``[R]``."""
    if draft.chain:
        return greedy_chains(draft, choice_R.cpu().numpy())
    return _walk(draft, Greedy(draft, choice_R))


def _walk(draft: Draft, rule: Rule) -> Verdict:
    cu = draft.cu.numpy()
    B = cu.shape[0] - 1
    owner = np.repeat(np.arange(B), np.diff(cu))
    root, node = cu[:-1] + np.arange(B), np.arange(int(cu[-1])) + owner + 1
    device = draft.tokens.device
    return walk(draft, rule, torch.from_numpy(root).to(device), torch.from_numpy(node).to(device))
