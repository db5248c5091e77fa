"""Zeroed tensors on huge pages, and what was freed given back to the system.

A cache read in blocks of a few KiB spends half its time in page walks without huge pages.
"""

from __future__ import annotations

import ctypes
import math
import mmap

import numpy as np
import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86-64 and most of arm64
ALIGNMENT = 4096  # a vector load across two cache lines costs two


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """``torch.zeros``; on a CPU the memory is taken page by page as it is written, on huge pages if there are any.

    The zeros matter: attention may multiply what a masked position never wrote by zero, and NaN would survive that.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks calloc, which leaves zeroing to the operating system; torch.zeros would write every page at once.
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    raw = raw[-raw.ctypes.data % ALIGNMENT :][:size]
    _advise_huge(raw.ctypes.data, size)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _advise_huge(address: int, size: int) -> None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only
    start = -(-address // HUGE_PAGE) * HUGE_PAGE
    length = (address + size) // HUGE_PAGE * HUGE_PAGE - start
    if advice is None or length <= 0:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise(start, length, advice)  # advice: a refusal (no huge pages in this kernel) changes nothing


def give_back() -> None:
    """Let the system have what was freed: the C library keeps it otherwise, and a process is as large as its past."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
