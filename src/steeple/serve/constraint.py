"""What shapes a request's law beside its sampling parameters: biases, a least length, a JSON grammar, or several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steeple.request import Constraint, Request


class LogitBias:
    """Adds to the logits of some tokens. Args: biases: token id -> what is added, finite."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._tokens = torch.tensor(list(biases), dtype=torch.int64)
        self._biases = torch.tensor(list(biases.values()), dtype=torch.float32)

    def shape(self, request: Request, logits_RV: Tensor, paths: Sequence[Sequence[int]]) -> None:
        """See ``steeple.request.Constraint``."""
        del request, paths  # it is the same everywhere
        device = logits_RV.device
        logits_RV[:, self._tokens.to(device)] += self._biases.to(device)


class LeastLength:
    """Forbids the tokens that end a text until so many are written. Args: least: tokens of the output."""

    def __init__(self, least: int) -> None:
        self._least = least

    def shape(self, request: Request, logits_RV: Tensor, paths: Sequence[Sequence[int]]) -> None:
        """See ``steeple.request.Constraint``."""
        stops = sorted(request.stops)
        early = [i for i, path in enumerate(paths) if request.written + len(path) < self._least]
        if stops and early:
            rows = torch.tensor(early, device=logits_RV.device).unsqueeze(1)
            logits_RV[rows, torch.tensor(stops, device=logits_RV.device)] = -torch.inf


class JsonGrammar:
    """Forbids whatever would leave a grammar; once the text is complete only the tokens that end it are left.

    The matcher follows the request's output and is never taken back behind it, so a preemption costs nothing.

    Args:
        matcher: an ``xgrammar.GrammarMatcher`` at the beginning of its grammar.
        vocab: size of the model's vocabulary.
    """

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab
        self._read = 0  # tokens of the output that the matcher has accepted
        self._path: list[int] = []  # drafted tokens behind them that it has accepted for now

    def shape(self, request: Request, logits_RV: Tensor, paths: Sequence[Sequence[int]]) -> None:
        """See ``steeple.request.Constraint``."""
        self._catch_up(request)
        import xgrammar  # takes a second, and most servers never need it

        words = -(-self._vocab // 32)
        mask_RW = torch.full((len(paths), words), -1, dtype=torch.int32)
        filled = False
        for row, path in enumerate(paths):
            # A row behind a token that cannot be is never drawn from, so it stays as it is.
            if self._go(path) and not self._matcher.is_terminated():
                filled |= self._matcher.fill_next_token_bitmask(mask_RW, row)
        self._go(())
        if filled:
            for row in (mask_RW == 0).all(dim=1).nonzero().flatten().tolist():
                # The vocabulary cannot spell what the grammar asks for next: the text ends here.
                _allow(mask_RW[row], request.stops)
            xgrammar.apply_token_bitmask_inplace(logits_RV, mask_RW.to(logits_RV.device), vocab_size=self._vocab)

    def _catch_up(self, request: Request) -> None:
        for token in request.output[self._read :].tolist():
            # A user's own stop token may be none of the grammar's; then the text has ended and nobody asks again.
            self._matcher.accept_token(token)
            self._read += 1

    def _go(self, path: Sequence[int]) -> bool:
        """Move from the last path to this one; False if the grammar refuses one of its tokens."""
        common = 0
        for ours, theirs in zip(self._path, path, strict=False):
            if ours != theirs:
                break
            common += 1
        if common < len(self._path):
            self._matcher.rollback(len(self._path) - common)
            del self._path[common:]
        for token in path[common:]:
            if self._matcher.is_terminated() or not self._matcher.accept_token(token):
                return False
            self._path.append(token)
        return True


def _allow(mask_W: Tensor, tokens: Iterable[int]) -> None:
    """Set the bits of some tokens."""
    for token in tokens:
        bit = token % 32
        mask_W[token // 32] |= (1 << bit) - (1 << 32 if bit == 31 else 0)  # the last bit is the sign


class All:
    """Several constraints, one after the other."""

    def __init__(self, parts: Sequence[Constraint]) -> None:
        self._parts = tuple(parts)

    def shape(self, request: Request, logits_RV: Tensor, paths: Sequence[Sequence[int]]) -> None:
        """See ``steeple.request.Constraint``."""
        for part in self._parts:
            part.shape(request, logits_RV, paths)


def combined(parts: Sequence[Constraint]) -> Constraint | None:
    """One constraint out of any number of them."""
    return None if not parts else parts[0] if len(parts) == 1 else All(parts)
