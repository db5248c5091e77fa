"""Root-mean-square norm over few rows: torch makes it of eight operations, the native kernel of one.

``torch_norm`` is the slow twin.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

# x [..., D], weight [D], eps -> [..., D]
NormOperation = Callable[[Tensor, Tensor, float], Tensor]

MOST_ROWS = 64  # beyond, torch's threads win over one call
DTYPES = (torch.float32, torch.bfloat16)


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


class NativeNorm:
    """The native ``NormOperation``; what it does not have goes to torch. Args: path: the compiled library."""

    def __init__(self, path: Path) -> None:
        self._call = ctypes.CDLL(str(path)).steeple_rms_norm
        self._call.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_float, ctypes.c_int]
        self._call.restype = None

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``torch_norm``."""
        rows, dtype = x.shape[0], x.dtype
        if (
            x.dim() != 2
            or rows > MOST_ROWS
            or dtype not in DTYPES
            or weight.dtype != dtype
            or not x.is_contiguous()
            or torch.is_grad_enabled()
        ):
            return torch_norm(x, weight, eps)
        out = torch.empty_like(x)
        self._call(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, x.shape[1], eps, dtype == torch.bfloat16)
        return out
