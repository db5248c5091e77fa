"""Verification of chains without the walk: all nodes are tested at once, and the first refusal ends each chain.

The fast twins of ``walk`` with ``Greedy`` and with ``Rejection``, for forests in which every tree is a chain. Whatever
is tested behind the first refusal influences nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.ops.law import draw
from steeple.ops.rng import Generators, Stream
from steeple.ops.sampling import NativeSampler
from steeple.types import Draft, Verdict
from steeple.verify.rejection import residual

Ints = NDArray[np.int64]


def leading(kept_N: NDArray[np.bool_], cu: Ints) -> Ints:
    """How many nodes of each chain are kept before the first that is not, ``[B]``."""
    refused = np.append(np.flatnonzero(~kept_N), kept_N.shape[0])
    return np.minimum(refused[np.searchsorted(refused, cu[:-1])], cu[1:]) - cu[:-1]


def chosen_nodes(draft: Draft, choice_R: Ints) -> Ints:
    """How many nodes of each chain are the target's own choice, up to the first that is not, ``[B]``."""
    cu, nodes = draft.cu.numpy(), draft.tokens.cpu().numpy()
    B = cu.shape[0] - 1
    k = int(cu[1])
    if k * B != nodes.shape[0] or (cu[1:] - cu[:-1] != k).any():
        return leading(nodes == choice_R[_judging_rows(cu)], cu)
    # All chains are as long: a column that is never right ends each.
    right = np.zeros((B, k + 1), dtype=bool)
    np.equal(nodes.reshape(B, k), choice_R.reshape(B, k + 1)[:, :k], out=right[:, :k])
    return right.argmin(axis=1)


def greedy_chains(draft: Draft, choice_R: Ints) -> Verdict:
    """Keep what the target chooses itself. Rows of laws: each request's root, then its nodes.

    Args:
        choice_R: the target's best token of each row, on the host.
    """
    cu = draft.cu.numpy()
    first = cu[:-1] + np.arange(cu.shape[0] - 1)
    kept = chosen_nodes(draft, choice_R)
    rows, offsets = _runs(first, kept + 1)
    nodes, _ = _runs(cu[:-1], kept)
    return Verdict(choice_R[rows], offsets, nodes, rows)


def reject_chains(draft: Draft, probs_RV: Tensor, generators: Generators, counter: Ints) -> Verdict:
    """Speculative sampling of chains; rows of laws as in ``greedy_chains``. See ``rejection`` for the rule.

    Args:
        probs_RV: processed laws of the target.
        counter: ``[B]`` lengths of the texts.
    """
    cu = draft.cu.numpy()
    B, N = cu.shape[0] - 1, int(cu[-1])
    device = probs_RV.device
    u_final = torch.from_numpy(generators.uniform(counter, Stream.FINAL)).to(device)
    first = cu[:-1] + np.arange(B)
    if N == 0:
        return Verdict(draw(probs_RV, u_final).cpu().numpy(), np.arange(B + 1), cu[:0], first)
    counts = cu[1:] - cu[:-1]
    owner = np.repeat(np.arange(B), counts)
    u = generators.uniform(counter[owner], Stream.ACCEPT, np.arange(N) - cu[owner], owner)
    p_token = _entries(probs_RV, torch.from_numpy(_judging_rows(cu)).to(device), draft.tokens)
    kept = leading(u * _drawn_with(draft) < p_token, cu)
    last = first + kept
    law_BV = probs_RV[torch.from_numpy(last).to(device)]
    refusing = np.flatnonzero(kept < counts)
    if refusing.size:
        refused = torch.from_numpy((cu[:-1] + kept)[refusing]).to(device)
        at = torch.from_numpy(refusing).to(device)
        law_BV[at] = residual(law_BV[at], draft, refused)
    rows, offsets = _runs(first, kept + 1)
    nodes, _ = _runs(cu[:-1], kept)
    tokens = np.empty(rows.shape[0], dtype=np.int64)
    tokens[offsets[1:] - 1] = draw(law_BV, u_final).cpu().numpy()
    inner = np.ones(rows.shape[0], dtype=bool)
    inner[offsets[1:] - 1] = False
    tokens[inner] = draft.tokens.cpu().numpy()[nodes]
    return Verdict(tokens, offsets, nodes, rows)


def reject_chains_natively(
    draft: Draft,
    logits_RV: Tensor,
    temperature_B: Tensor,
    native: NativeSampler,
    generators: Generators,
    counter: Ints,
) -> Verdict:
    """``reject_chains`` in one call, from logits. ``temperature_B``: of each request, none of them 0."""
    cu = draft.cu.numpy()
    B, N = cu.shape[0] - 1, int(cu[-1])
    u_final = generators.uniform(counter, Stream.FINAL)
    u = u_final
    if N:
        owner = np.repeat(np.arange(B), cu[1:] - cu[:-1])
        u = generators.uniform(counter[owner], Stream.ACCEPT, np.arange(N) - cu[owner], owner)
    kept, final = native.judge(logits_RV, draft, temperature_B, u, u_final)
    rows, offsets = _runs(cu[:-1] + np.arange(B), kept + 1)
    nodes, _ = _runs(cu[:-1], kept)
    tokens = np.empty(rows.shape[0], dtype=np.int64)
    inner = np.ones(rows.shape[0], dtype=bool)
    inner[offsets[1:] - 1] = False
    tokens[offsets[1:] - 1] = final
    tokens[inner] = draft.tokens.numpy()[nodes]
    return Verdict(tokens, offsets, nodes, rows)


def _drawn_with(draft: Draft) -> NDArray[np.float32]:
    """Probability that each node was drawn with, ``[N]``; 1 for a chosen one."""
    if draft.probs is None:
        return np.ones(draft.tokens.shape[0], dtype=np.float32)
    drawn = _entries(draft.probs, draft.row.clamp(min=0), draft.tokens)
    return np.where(draft.row.cpu().numpy() >= 0, drawn, np.float32(1.0))


def _entries(values_RV: Tensor, row_N: Tensor, column_N: Tensor) -> NDArray[np.float32]:
    """Single entries of a table, to the host."""
    if values_RV.device.type == "cpu":
        return values_RV.numpy()[row_N.numpy(), column_N.numpy()]
    return values_RV[row_N, column_N].cpu().numpy()


def _judging_rows(cu: Ints) -> Ints:
    """Row of the law that judges each node: that of the node before it, or of the root."""
    return np.arange(int(cu[-1])) + np.repeat(np.arange(cu.shape[0] - 1), cu[1:] - cu[:-1])


def _runs(start: Ints, length: Ints) -> tuple[Ints, Ints]:
    """``start[b], start[b] + 1, ...`` one run of ``length[b]`` after the other, and the offsets of the runs."""
    offsets = np.zeros(length.shape[0] + 1, dtype=np.int64)
    length.cumsum(out=offsets[1:])
    return np.arange(int(offsets[-1])) + np.repeat(start - offsets[:-1], length), offsets
