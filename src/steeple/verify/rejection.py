"""Speculative sampling: the output has exactly the target's law, whatever the drafter's.

Chen et al. 2023 (arXiv 2302.01318), Leviathan et al. 2023 (arXiv 2211.17192). With p the target's law and q the law
that a token x was really drawn from: keep x with probability min(1, p(x) / q(x)); after a refusal go on with
p <- norm(max(p - q, 0)), for the next i.i.d. sibling or for the recovered token. A chosen token (an n-gram's, a greedy
drafter's) is a draw from a one-hot law: keep it with probability p(x), else p loses x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steeple.ops.law import draw
from steeple.ops.rng import Stream, uniform
from steeple.types import Draft


class Rejection:
    """Args: probs: ``[R, V]`` processed laws of the target; seed, counter: ``[B]`` int64, the requests' generators."""

    def __init__(self, draft: Draft, probs: Tensor, seed: Tensor, counter: Tensor) -> None:
        self._draft, self._probs, self._seed, self._counter = draft, probs, seed, counter
        self._first = draft.cu[:-1].to(probs.device)
        B = seed.shape[0]
        # Requests that refused a node at the place where their walk stands carry on with a residual law of their own.
        self._residual: Tensor | None = None
        self._refused = torch.zeros(B, dtype=torch.bool, device=probs.device)

    def _law(self, request: Tensor, law: Tensor) -> Tensor:
        p = self._probs[law]
        if self._residual is not None:
            p = torch.where(self._refused[request].unsqueeze(1), self._residual[request], p)
        return p

    def accept(self, law: Tensor, node: Tensor, request: Tensor) -> Tensor:
        """Test the nodes; requests that refuse get their residual law."""
        token, row = self._draft.tokens[node], self._draft.row[node]
        p_token = self._probs[law, token]
        if self._residual is not None:
            p_token = torch.where(self._refused[request], self._residual[request, token], p_token)
        q_token = torch.ones_like(p_token)
        if self._draft.probs is not None:
            drawn_p = self._draft.probs[row.clamp(min=0), token]
            q_token = torch.where(row >= 0, drawn_p, q_token)
        u = uniform(self._seed[request], self._counter[request], Stream.ACCEPT, node - self._first[request])
        kept = u * q_token < p_token
        self._refuse(request[~kept], law[~kept], node[~kept])
        self._refused[request[kept]] = False
        return kept

    def _refuse(self, request: Tensor, law: Tensor, node: Tensor) -> None:
        if request.numel() == 0:
            return
        left = residual(self._law(request, law), self._draft, node)
        if self._residual is None:
            self._residual = torch.zeros(self._seed.shape[0], left.shape[1], dtype=left.dtype, device=left.device)
        self._residual[request] = left
        self._refused[request] = True

    def final(self, law: Tensor) -> Tensor:
        """Recovered token after a refusal, bonus token after none: drawn from the law the walk ended with."""
        everyone = torch.arange(law.shape[0], device=law.device)
        return draw(self._law(everyone, law), uniform(self._seed, self._counter, Stream.FINAL))


def residual(p_MV: Tensor, draft: Draft, refused_M: Tensor) -> Tensor:
    """What is left of the laws ``p_MV`` once the nodes ``refused_M`` were refused: norm(max(p - q, 0))."""
    token, row = draft.tokens[refused_M].unsqueeze(1), draft.row[refused_M]
    if draft.probs is None:
        left = p_MV.scatter(1, token, 0.0)
    else:
        left = (p_MV - draft.probs[row.clamp(min=0)]).clamp_(min=0.0)
        chosen = row < 0
        if bool(chosen.any()):
            left = torch.where(chosen.unsqueeze(1), p_MV.scatter(1, token, 0.0), left)
    mass = left.sum(dim=-1, keepdim=True)
    # Rounding alone can leave nothing (p equals q): then p itself is what remains.
    return torch.where(mass > 0, left / mass.clamp(min=torch.finfo(left.dtype).tiny), p_MV)
