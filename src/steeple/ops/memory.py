"""Zeroed tensors on huge pages: a cache read in blocks of a few KiB spends half its time in page walks without them."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86-64 and most of arm64


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """``torch.zeros``, on transparent huge pages where the system has them."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.device.type == "cpu":
        _advise_huge(out.data_ptr(), out.numel() * out.element_size())
    return out.zero_()  # the first touch: only now the pages are chosen


def _advise_huge(address: int, size: int) -> None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only
    start = -(-address // HUGE_PAGE) * HUGE_PAGE
    length = (address + size) // HUGE_PAGE * HUGE_PAGE - start
    if advice is None or length <= 0:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise(start, length, advice)  # advice: a refusal (no huge pages in this kernel) changes nothing
