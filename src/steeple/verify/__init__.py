"""Verification: pure functions of laws and a draft. No model is ever seen here."""

from __future__ import annotations

from torch import Tensor

from steeple.ops.law import Laws, probabilities
from steeple.types import Draft, Verdict
from steeple.verify.greedy import Greedy
from steeple.verify.rejection import Rejection
from steeple.verify.walk import Rule, walk


def verify(
    logits_RV: Tensor,
    draft: Draft,
    laws: Laws,
    *,
    owner_R: Tensor,
    root_law: Tensor,
    node_law: Tensor,
    seed: Tensor,
    counter: Tensor,
) -> Verdict:
    """Judge a draft by the target's (penalised) logits: one walk, by choice where all is greedy, else by rejection.

    Args:
        logits_RV: float32 rows: the root of each request and its nodes.
        owner_R: request of each row. root_law ``[B]``, node_law ``[N]``: rows after the roots and the nodes.
        seed, counter: ``[B]`` the requests' generators.
    """
    rule: Rule
    if laws.all_greedy:
        rule = Greedy(draft, logits_RV.argmax(dim=-1))
    else:
        rule = Rejection(draft, probabilities(logits_RV, laws, owner_R), seed, counter)
    return walk(draft, rule, root_law, node_law)
