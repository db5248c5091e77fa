"""The one walk over a forest. It knows neither models nor how a token is judged: a ``Rule`` does that.

Parents come before children and siblings stand in order, so one pass over the nodes of a request in their order meets
exactly the candidates that matter: a node is asked if its parent is where the walk stands. All requests walk at once.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from steeple.types import Draft, Verdict


class Rule(Protocol):
    """How nodes are judged. The arguments of ``accept`` are tensors over the same set of requests.

    ``accept(law, node, request)`` -> bool: is the token of ``node`` kept, given that the walk of ``request`` stands
    before row ``law`` of the target's laws? A refusal is remembered: it changes what the request's next sibling, or
    its final token, is judged by. ``final(law)`` -> one token for every request, B in all.
    """

    def accept(self, law: Tensor, node: Tensor, request: Tensor, /) -> Tensor: ...

    def final(self, law: Tensor) -> Tensor: ...


def walk(draft: Draft, rule: Rule, root_law: Tensor, node_law: Tensor) -> Verdict:
    """Walk the forest of B requests.

    Args:
        root_law: ``[B]`` row of the target's laws after each request's newest token.
        node_law: ``[N]`` row of the target's laws after each node.
    """
    device = draft.tokens.device
    B = draft.cu.shape[0] - 1
    cu, counts, parent = draft.cu.to(device), draft.counts.to(device), draft.parent.to(device)
    everyone = torch.arange(B, device=device)
    at = torch.full((B,), -1, dtype=torch.int64, device=device)
    law = root_law.clone()
    deepest = int(draft.counts.max()) if B else 0
    steps: list[Tensor] = []  # [B] node kept in this step or -1
    rows: list[Tensor] = []  # [B] law row it was judged by
    for j in range(deepest):
        node = cu[:-1] + j
        asked = j < counts
        asked = asked & (parent[torch.where(asked, node, 0)] == at)
        who = everyone[asked]
        kept = torch.zeros(B, dtype=torch.bool, device=device)
        kept[who] = rule.accept(law[who], node[who], who)
        steps.append(torch.where(kept, node, -1))
        rows.append(law)
        at = torch.where(kept, node, at)
        law = torch.where(kept, node_law[torch.where(kept, node, 0)], law) if node_law.numel() else law
    last = rule.final(law)
    nodes = torch.stack([*steps, torch.full_like(at, -1)], dim=1)  # [B, deepest + 1]
    judged = torch.stack([*rows, law], dim=1)
    chosen = nodes >= 0
    tokens = torch.where(chosen, draft.tokens[nodes.clamp(min=0)] if draft.tokens.numel() else 0, 0)
    tokens[:, -1] = last
    emitted = chosen.clone()
    emitted[:, -1] = True
    offsets = torch.zeros(B + 1, dtype=torch.int64, device=device)
    offsets[1:] = emitted.sum(dim=1).cumsum(0)
    host = (x.cpu().numpy() for x in (tokens[emitted], offsets, nodes[chosen], judged[emitted]))
    return Verdict(*host)
