"""SPIRe's loss, its gradient in closed form, and the mean tokens per round that a draft would reach.

The loss of a position is ``(1 - w) * CE(p, q) - w * sum_v min(p_v, q_v)``: distillation, and the chance that a token
drawn from the draft's law q is accepted under the target's law p (Leviathan et al. 2023). Laws are made a stretch of
rows at a time, since logits of whole windows would be the largest tensors of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steeple.model.decoder import Decoder
from steeple.train.spire_forward import Seen, Student

CHUNK = 1024  # rows whose laws are in memory at once
CONTEXTS = (0, 512, 1024)
"""Where the buckets of context begin, in positions."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Per row, float32 ``[R]``: loss, chance of acceptance at temperature 1, and whether both choose one token."""

    loss: Tensor
    alpha: Tensor
    match: Tensor


def scores_and_gradient(
    target_RV: Tensor, draft_RV: Tensor, next_R: Tensor, alpha_weight: float, hard: bool
) -> tuple[Scores, Tensor]:
    """Scores of every row, and the gradient of the rows' losses with respect to ``draft_RV``.

    Args:
        target_RV, draft_RV: logits. next_R: tokens of the text.
        alpha_weight: w of the loss. hard: cross-entropy on the text's token instead of the mixed loss.
    """
    z = draft_RV.detach().to(torch.promote_types(draft_RV.dtype, torch.float32))
    p = target_RV.to(z.dtype).softmax(dim=-1)
    q = z.softmax(dim=-1)
    below = q < p
    alpha = torch.where(below, q, p).sum(dim=-1)
    match = (target_RV.argmax(dim=-1) == draft_RV.argmax(dim=-1)).to(z.dtype)
    norm = z.logsumexp(dim=-1)
    if hard:
        loss = norm - z.gather(1, next_R.unsqueeze(1)).squeeze(1)
        gradient = q.scatter_add(1, next_R.unsqueeze(1), q.new_full((len(q), 1), -1.0))
        return Scores(loss, alpha, match), gradient
    inside = torch.where(below, q, 0.0)
    share = inside.sum(dim=-1, keepdim=True)
    loss = (1 - alpha_weight) * (norm - (p * z).sum(dim=-1)) - alpha_weight * alpha
    gradient = (1 - alpha_weight) * (q - p) - alpha_weight * (inside - share * q)
    return Scores(loss, alpha, match), gradient


class Laws:
    """Scores of the draft's hidden states against the target's.

    Args: chunk: rows at a time. compiled: fuse the work on the laws with ``torch.compile``.
    """

    def __init__(
        self,
        target: Decoder,
        draft: Decoder,
        *,
        alpha_weight: float,
        hard: bool,
        compiled: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        self.target, self.draft, self.chunk = target, draft, chunk
        self.alpha_weight, self.hard = alpha_weight, hard
        self._score = torch.compile(scores_and_gradient, dynamic=False) if compiled else scores_and_gradient

    def score(self, seen: Seen, hidden_TD: Tensor, next_T: Tensor) -> Scores:
        """The scores alone."""
        parts = []
        with torch.no_grad():
            for rows in self._rows(hidden_TD):
                logits = self.target.logits(seen.final_TD[rows]), self.draft.logits(hidden_TD[rows])
                parts.append(self._score(*logits, next_T[rows], self.alpha_weight, self.hard)[0])
        return _joined(parts)

    def backward(self, seen: Seen, hidden_TD: Tensor, next_T: Tensor, weight: float) -> Scores:
        """The scores; and add the gradient of ``weight`` times the mean loss to the draft's parameters."""
        parts, gradients = [], []
        scale = weight / hidden_TD.shape[0]
        for rows in self._rows(hidden_TD):
            h_RD = hidden_TD[rows].detach().requires_grad_()
            draft_RV = self.draft.logits(h_RD)
            with torch.no_grad():
                target_RV = self.target.logits(seen.final_TD[rows])
                scores, gradient = self._score(target_RV, draft_RV.detach(), next_T[rows], self.alpha_weight, self.hard)
                gradient = (gradient * scale).to(draft_RV.dtype)
            draft_RV.backward(gradient)
            parts.append(scores)
            gradients.append(h_RD.grad)
        hidden_TD.backward(torch.cat([g for g in gradients if g is not None]))
        return _joined(parts)

    def _rows(self, hidden_TD: Tensor) -> list[slice]:
        return [slice(i, i + self.chunk) for i in range(0, hidden_TD.shape[0], self.chunk)]


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in ("loss", "alpha", "match")))


@dataclass(frozen=True, slots=True)
class Rounds:
    """Scores of whole blocks, ``[n, k]``, and the position that each block begins at, ``[n]``."""

    alpha: Tensor
    match: Tensor
    begins: Tensor

    def tau(self, k: int, *, greedy: bool = False, first: int = 0, last: int = 2**62) -> float:
        """Mean tokens of a round of ``k`` drafted ones in blocks that begin at ``first`` .. ``last - 1``; NaN if none.

        ``1 + sum_j mean(a_0 * .. * a_j)`` over the text as it stands (teacher-forced), a_j the chance that the token
        after offset j is accepted.
        """
        chosen = (self.begins >= first) & (self.begins < last)
        accepted = (self.match if greedy else self.alpha)[chosen, :k]
        return float("nan") if not len(accepted) else 1.0 + accepted.cumprod(dim=1).mean(dim=0).sum().item()

    def report(self, ks: Sequence[int]) -> dict[str, Any]:
        """``tau_k`` and ``greedy_k`` for each k, and for the largest by context."""
        found: dict[str, Any] = {}
        for k in ks:
            found[f"tau_{k}"], found[f"greedy_{k}"] = self.tau(k), self.tau(k, greedy=True)
        ends = (*CONTEXTS[1:], 2**62)
        by_context = {str(a): self.tau(ks[0], first=a, last=b) for a, b in zip(CONTEXTS, ends, strict=True)}
        found[f"tau_{ks[0]}_from"] = {name: value for name, value in by_context.items() if value == value}
        return found


@torch.no_grad()
def rounds_of(student: Student, laws: Laws, windows_BS1: Tensor, target: Seen, offset: int) -> tuple[Rounds, float]:
    """The whole blocks of some windows ``[B, S + 1]``, and their mean loss."""
    k, inputs = student.shape.k, windows_BS1[:, :-1]
    B, S = inputs.shape
    scores = laws.score(target, student.forward(inputs, target, offset), windows_BS1[:, 1:].reshape(-1))
    first = (k - offset) if offset else 0
    whole = (S - first) // k

    def cut(x: Tensor) -> Tensor:
        return x.view(B, S)[:, first : first + whole * k].reshape(B * whole, k)

    begins = (first + k * torch.arange(whole, device=inputs.device)).repeat(B)
    return Rounds(cut(scores.alpha), cut(scores.match), begins), scores.loss.mean().item()


def joined_rounds(parts: Sequence[Rounds]) -> Rounds:
    """All of them."""
    return Rounds(*(torch.cat([getattr(part, name) for part in parts]) for name in ("alpha", "match", "begins")))
