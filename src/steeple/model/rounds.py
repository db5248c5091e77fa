"""A round of drafting chains in one native call: k forwards of one row per request, with head and draw between them.

The fast twin of a forward, ``Runner.logits`` and a draw for every depth: the same native operations, so the same
numbers to the last bit. What is saved is the Python between them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.cache.window import RoundRows
from steeple.model.layers import Linear
from steeple.model.run import Runner
from steeple.model.whole import NativeForward
from steeple.ops.linear import Matrix

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True, slots=True)
class Draws:
    """What nodes are drawn by: temperatures float32 ``[B]``, uniform numbers float64 ``[k, B]``; the laws that they
    were drawn from go to ``laws``, float32 ``[k * B, V]``.
    """

    temperature: Tensor
    uniform: NDArray[np.float64]
    laws: Tensor


class _Round(ctypes.Structure):
    """``forward::Round`` of the native library."""

    _fields_ = [
        ("depth", _SIZE),
        *((name, _POINTER) for name in ("positions", "slots", "seen", "row_positions", "tokens")),
        *((name, _POINTER) for name in ("temperature", "uniform", "laws", "logits")),
        ("carry", Matrix),
        *((name, _POINTER) for name in ("state", "added", "hidden")),
    ]


class NativeRound:
    """Args: the draft's forward; carry: the projection of carried states, packed, if it has one."""

    def __init__(self, whole: NativeForward, carry: Linear | None) -> None:
        self._whole, self._decoder = whole, whole.decoder
        self._carry = Matrix() if carry is None or carry.packed is None else carry.packed.matrix(None)
        self._held = carry  # the matrix points into its memory
        library = ctypes.CDLL(str(self._decoder.kernels.library))
        self._call = library.steeple_round
        self._call.argtypes = [_POINTER] * 3
        self._room = torch.empty(0)
        self._logits = torch.empty(0)

    def __call__(
        self, rows: RoundRows, draws: Draws | None, state_BD: Tensor | None
    ) -> tuple[NDArray[np.int64], Tensor]:
        """The nodes of all chains, ``[k, B]``, and the hidden states ``[B, D]`` of the last pass, valid until the next
        call.

        Args:
            rows: of the passes, with the tokens that the first of them reads.
            draws: None takes the likeliest tokens.
            state_BD: before those tokens, where states are carried; may be what the last call returned.
        """
        k, B = rows.positions.shape
        tokens = np.empty((k + 1, B), dtype=np.int64)
        tokens[0] = rows.first.tokens.numpy()
        model, step = self._whole.at(rows.first)
        positions_32 = rows.positions.astype(np.int32)
        added, hidden = self._rooms(B)
        state = None if state_BD is None else state_BD.to(self._decoder.dtype).contiguous()
        drawn: tuple[int | None, ...] = (None, None, None, None)
        if draws is not None:
            drawn = (
                draws.temperature.data_ptr(),
                draws.uniform.ctypes.data,
                draws.laws.data_ptr(),
                self._logits_for(B),
            )
        round = _Round(
            k,
            rows.positions.ctypes.data,
            rows.slots.ctypes.data,
            rows.seen.ctypes.data,
            positions_32.ctypes.data,
            tokens.ctypes.data,
            *drawn,
            self._carry,
            None if state is None else state.data_ptr(),
            added,
            hidden,
        )
        self._whole.require(self._call(model, step, ctypes.addressof(round)))
        width = self._decoder.config.hidden_size
        return tokens[1:], self._room[B * width : 2 * B * width].view(B, width)

    def _rooms(self, rows: int) -> tuple[int, int]:
        width = self._decoder.config.hidden_size
        if self._room.numel() < 2 * rows * width:
            self._room = torch.zeros(2 * rows * width, dtype=self._decoder.dtype)
        at: int = self._room.data_ptr()
        return at, at + rows * width * self._room.element_size()

    def _logits_for(self, rows: int) -> int:
        vocab = self._decoder.config.vocab_size
        if self._logits.numel() < rows * vocab:
            self._logits = torch.zeros(rows * vocab)
        return self._logits.data_ptr()


def native_round(runner: Runner, carry: Linear | None) -> NativeRound | None:
    """The rounds of a draft whose forwards are native; None where they are not, or its projection is not packed."""
    if not isinstance(runner.whole, NativeForward) or (carry is not None and carry.packed is None):
        return None
    return NativeRound(runner.whole, carry)
