"""Tensors on huge pages are zeroed tensors, and only whole huge pages inside them are advised."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from steeple.ops import memory
from steeple.ops.memory import HUGE_PAGE, zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (3, 1 << 20)])
def test_zeros_are_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.full(shape, 7.0, dtype=dtype)  # memory that the allocator may hand out again
    out = zeros(shape, dtype)
    assert torch.equal(out, torch.zeros(shape, dtype=dtype))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no transparent huge pages on this system")
@pytest.mark.parametrize(("address", "size", "want"), [(5, 3 * HUGE_PAGE, (1, 2)), (HUGE_PAGE, 2 * HUGE_PAGE, (1, 2))])
def test_whole_pages_inside_are_advised(
    monkeypatch: pytest.MonkeyPatch, address: int, size: int, want: tuple[int, int]
) -> None:
    calls: list[tuple[int, int, int]] = []

    class Library:
        def madvise(self, start: int, length: int, advice: int) -> None:
            raise NotImplementedError

    library = Library()
    library.madvise = type("Function", (), {"__call__": lambda self, *args: calls.append(args)})()  # type: ignore[method-assign]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    memory._advise_huge(address, size)
    memory._advise_huge(address, HUGE_PAGE - 1)
    assert calls == [(want[0] * HUGE_PAGE, want[1] * HUGE_PAGE, mmap.MADV_HUGEPAGE)]
