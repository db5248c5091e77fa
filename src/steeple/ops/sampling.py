"""Sampling in one native call: draws from rows of logits, and speculative sampling of chains.

The fast twins of ``law.draw`` and ``verify.chains.reject_chains``, for laws that are the softmax of logits over
temperature with nothing cut off. Between the small calls of the slow ones lies more time than in them.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.ops.law import Laws
from steeple.ops.native import team_size, torch_team
from steeple.types import Draft

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class NativeSampler:
    """Args: path of the compiled library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._draw, self._judge = library.steeple_draw, library.steeple_judge
        self._draw.argtypes = [
            _POINTER,
            _SIZE,
            _SIZE,
            _POINTER,
            _POINTER,
            _POINTER,
            _POINTER,
            _SIZE,
            _POINTER,
            _POINTER,
        ]
        self._judge.argtypes = [_POINTER] * 8 + [_SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER]
        self._draw.restype = self._judge.restype = None
        self._team = (torch_team(), team_size())

    @staticmethod
    def serves(laws: Laws, logits_RV: Tensor) -> bool:
        """Whether these laws are ones that the native calls know, and these logits where they can read them."""
        known = not (laws.any_greedy or laws.truncated)
        return known and logits_RV.device.type == "cpu" and logits_RV.is_contiguous()

    def draw(self, logits_RV: Tensor, temperature_R: Tensor, uniform_R: NDArray[np.float64], out: Tensor) -> Tensor:
        """One token per row, int64 ``[R]``; the laws go to ``out [R, V]``."""
        R, V = logits_RV.shape
        tokens = torch.empty(R, dtype=torch.int64)
        self._draw(
            logits_RV.data_ptr(),
            R,
            V,
            temperature_R.data_ptr(),
            uniform_R.ctypes.data,
            out.data_ptr(),
            tokens.data_ptr(),
            torch.get_num_threads(),
            *self._team,
        )
        return tokens

    def judge(
        self,
        logits_RV: Tensor,
        draft: Draft,
        temperature_B: Tensor,
        accept_N: NDArray[np.float64],
        last_B: NDArray[np.float64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many nodes of each chain are kept, and the token after them, ``[B]`` each."""
        B, V = last_B.shape[0], logits_RV.shape[1]
        kept, final = np.empty(B, dtype=np.int64), np.empty(B, dtype=np.int64)
        laws = draft.probs
        self._judge(
            logits_RV.data_ptr(),
            draft.cu.data_ptr(),
            draft.tokens.data_ptr(),
            draft.row.data_ptr(),
            None if laws is None else laws.data_ptr(),
            temperature_B.data_ptr(),
            accept_N.ctypes.data,
            last_B.ctypes.data,
            B,
            V,
            kept.ctypes.data,
            final.ctypes.data,
            torch.get_num_threads(),
            *self._team,
        )
        return kept, final


@functools.cache
def sampler(path: Path | None) -> NativeSampler | None:
    """The sampler of a compiled library; None without one."""
    return None if path is None else NativeSampler(path)
