"""Greedy verification: a node is kept if it is the target's own choice. Rejection on a one-hot law, without the law."""

from __future__ import annotations

from torch import Tensor

from steeple.types import Draft


class Greedy:
    """Args: choice: ``[R]`` the target's best token of each law row."""

    def __init__(self, draft: Draft, choice: Tensor) -> None:
        self._tokens = draft.tokens
        self._choice = choice

    def accept(self, law: Tensor, node: Tensor, _request: Tensor) -> Tensor:
        """Kept iff the node's token is the choice of the row the walk stands before."""
        return self._tokens[node] == self._choice[law]

    def final(self, law: Tensor) -> Tensor:
        """The target's choice."""
        return self._choice[law]
