"""Where the tests of the GPU path run: on a CUDA device where there is one, else through Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its kernels are not tested"
)


def interpret() -> None:
    """Without a GPU: from now on Triton interprets in this process.

    Triton decides this for its own library (``tl.max``, ``tl.sum``) when it is first imported, and transformers has
    done that long ago; so the library is exchanged too. And its interpreter is taught what compiled kernels do: to
    multiply bfloat16 matrices (it multiplies their bits: triton issue 11584, closed as not supported), each row of
    them the same way wherever it stands (numpy's BLAS does not), and to round to the nearest bfloat16 (it cuts off).
    """
    if CUDA or needs_triton.args[0] or os.environ.get("TRITON_INTERPRET") == "1":
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
    from triton.runtime.jit import JITFunction

    for name, function in list(vars(tl.standard).items()):
        if isinstance(function, JITFunction):
            interpreted = InterpretedFunction(function.fn)
            setattr(tl.standard, name, interpreted)
            if getattr(tl, name, None) is function:
                setattr(tl, name, interpreted)

    def cast(self: InterpreterBuilder, x: TensorHandle, to: tl.dtype) -> TensorHandle:
        if x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cut_off(self, x, to)

    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: object) -> TensorHandle:
        wide = [self.cast_impl(x, tl.float32).data for x in (a, b)]
        return TensorHandle(np.einsum("mk,kn->mn", *wide) + d.data, d.dtype.scalar)

    cut_off = InterpreterBuilder.cast_impl
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
