"""Attention over pieces of a context, put together again: what was computed over parts equals what the whole gives.

Piece j of a request holds some of its keys. For a query with scores ``s_i`` against them it yields

    m_j = max_i s_i        l_j = sum_i exp(s_i - m_j)        o_j = sum_i exp(s_i - m_j) v_i

and with ``M = max_j m_j`` over the request's pieces attention over all keys is

    sum_j exp(m_j - M) o_j  /  sum_j exp(m_j - M) l_j

since ``exp(s_i - M) = exp(m_j - M) exp(s_i - m_j)``. No exponent is positive, so nothing overflows. A piece without a
seen key has m = -inf and l = 0, and adds nothing.

Sources: online softmax, Milakov and Gimelshein 2018 (arXiv 1805.02867); split keys, Dao et al. 2023 (Flash-Decoding);
pieces of a request told by an indicator matrix, SPIN (arXiv 2503.15921), here an index of owners.

Shape letters: P pieces, B requests, ``*`` any dims (heads, queries), S keys of a piece, H head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steeple.errors import InternalError


@dataclass(frozen=True, slots=True)
class Partial:
    """Sums of attention over pieces, float32: most ``[P, *]`` (largest score, -inf: none seen), mass ``[P, *]`` (sum of
    weights), mixed ``[P, *, H]`` (weighted values). Weights are relative to ``most``."""

    most: Tensor
    mass: Tensor
    mixed: Tensor

    @staticmethod
    def of_normalised(out: Tensor, lse: Tensor) -> Partial:
        """Of what other attentions give: outputs ``[P, *, H]`` that are divided by their weights, and the logarithm of
        those, ``lse = m + log l``, ``[P, *]``; -inf: nothing seen, whatever the output."""
        mass = (lse > -math.inf).to(torch.float32)
        return Partial(lse.float(), mass, out.float())


def partial_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, scale: float) -> Partial:
    """Attention over each piece by itself, in float32.

    Args:
        q: queries ``[P, *, T, H]``. k, v: ``[P, *, S, H]``; S may be 0. Values must be finite, the unseen ones too.
        seen: bool, broadcast to ``[P, *, T, S]``: the keys that a query sees.
        scale: what queries times keys are multiplied with.

    Returns sums ``[P, *, T]`` and ``[P, *, T, H]``.
    """
    if k.shape[-2] == 0:
        nothing = q.new_zeros(q.shape[:-1], dtype=torch.float32)
        return Partial(nothing - math.inf, nothing, q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=torch.float32))
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)).mul_(scale)
    scores = scores.masked_fill_(~seen, -math.inf)
    most = scores.amax(dim=-1)
    weights = scores.sub_(_finite(most).unsqueeze(-1)).exp_()
    return Partial(most, weights.sum(dim=-1), torch.matmul(weights, v.float()))


def merge(partial: Partial, owner: Tensor, requests: int) -> Tensor:
    """Attention of whole requests out of the sums over their pieces.

    Args:
        owner: int64 ``[P]``: the request of each piece, in any order; a request may have none.

    Returns float32 ``[requests, *, H]``; where nothing was seen, zeros.

    Raises ``InternalError`` if there are not as many owners as pieces.
    """
    most, pieces = partial.most, partial.most.shape[0]
    if owner.shape != (pieces,):
        raise InternalError(f"merge: {tuple(owner.shape)} owners for {pieces} pieces; give one each.")
    index = owner.view(-1, *(1,) * (most.ndim - 1)).expand_as(most)
    top = most.new_full((requests, *most.shape[1:]), -math.inf).scatter_reduce_(0, index, most, "amax")
    share = (most - _finite(top)[owner]).exp_()
    mass = share.new_zeros(top.shape).index_add_(0, owner, share * partial.mass)
    mixed = torch.where(share.unsqueeze(-1) > 0, share.unsqueeze(-1) * partial.mixed, 0.0)
    whole = share.new_zeros((*top.shape, partial.mixed.shape[-1])).index_add_(0, owner, mixed)
    return whole / torch.where(mass > 0, mass, 1.0).unsqueeze(-1)


def _finite(most: Tensor) -> Tensor:
    """Something that may be subtracted, where nothing was seen too."""
    return torch.where(most > -math.inf, most, 0.0)
