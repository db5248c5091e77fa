"""Linear layers over few rows: the native kernel reads every weight once for all rows, and rounds each row alike.

``torch.nn.functional.linear`` is the slow twin. Matrix libraries are made for many rows; for 2 to 16 float32 rows they
read the weights two to four times slower (bench/results/linear.json), just where a verification has its rows. And they
choose another order of summation for every number of rows; the kernel never does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from steeple.ops.native import torch_team

# Rows above which the matrix library is faster; measured by bench/linear.py.
MOST_ROWS = {torch.float32: 256, torch.bfloat16: 10}


# x [..., I], weight [O, I], bias [O] or None -> [..., O]
LinearOperation = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class NativeLinear:
    """The native ``LinearOperation`` for up to ``most_rows`` rows by dtype; more go to torch.

    Args: path: a library from ``steeple.ops.native``.
    """

    def __init__(self, path: Path, most_rows: dict[torch.dtype, int] | None = None) -> None:
        library = ctypes.CDLL(str(path))
        self._call = library.steeple_linear
        self._call.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 4 + [ctypes.c_int, ctypes.c_int64]
        self._call.argtypes += [ctypes.c_void_p]
        self._call.restype = None
        self._team = torch_team()
        self._most_rows = MOST_ROWS if most_rows is None else most_rows

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See ``LinearOperation``; what the kernel does not have (gradients, other dtypes or layouts) goes to torch."""
        dtype = weight.dtype
        if (
            x.dim() != 2
            or x.shape[0] > self._most_rows.get(dtype, 0)
            or x.dtype != dtype
            or x.stride(1) != 1
            or not weight.is_contiguous()
            or (dtype == torch.bfloat16 and x.shape[1] % 2)
            or torch.is_grad_enabled()
        ):
            return F.linear(x, weight, bias)
        rows, inputs = x.shape
        out = x.new_empty((rows, weight.shape[0]))
        self._call(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows,
            inputs,
            weight.shape[0],
            x.stride(0) * dtype.itemsize,
            dtype == torch.bfloat16,
            torch.get_num_threads(),
            self._team,
        )
        return out
