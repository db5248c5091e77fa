"""The native twin of the paged attention: ``attention.cpp`` through plain C, and the choice between the two."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from steeple.ops.attention import (
    PagedAttention,
    ReferenceAttention,
    check_attention,
    check_layout,
    check_write,
    paged_attention,
    require,
    write_kv,
)
from steeple.ops.native import library_path, torch_team
from steeple.types import KVLayout

OUTCOMES = {
    1: "a slot or a block of the layout lies outside the cache",
    2: "there is no memory for the sums",
    3: "cu_rows or cu_blocks is wrong",
}


class NativeAttention:
    """The native ``PagedAttention``. Holds the loaded library.

    Args:
        path: a library from ``build``.

    Raises ``OSError`` if it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._attend = library.steeple_attention
        self._attend.argtypes = [pointer] * 11 + [size] * 10 + [real] * 2 + [ctypes.c_int] * 2 + [size, pointer]
        self._write = library.steeple_write
        self._write.argtypes = [pointer] * 5 + [size] * 7
        self._team = torch_team()
        self._last: tuple[KVLayout | None, tuple[int, ...]] = (None, ())  # all layers of a step share a layout

    def __call__(
        self,
        q_TNH: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: KVLayout,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """See ``PagedAttention``. An odd head dim, which the kernel does not have, goes to the reference."""
        check_attention(q_TNH, keys, values, layout)
        T, N, H = q_TNH.shape
        if H % 2:
            return paged_attention(q_TNH, keys, values, layout, scale=scale, window=window, softcap=softcap)
        known, pointers = self._last
        if known is not layout:
            pointers = _pointers(layout)
            self._last = (layout, pointers)
        out_TNH = q_TNH.new_empty((T, N, H))
        outcome = self._attend(
            q_TNH.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out_TNH.data_ptr(),
            *pointers,
            T,
            q_TNH.stride(0),
            keys.shape[0],
            layout.block_size,
            N,
            keys.shape[1],
            H,
            window,
            scale,
            softcap,
            q_TNH.dtype == torch.bfloat16,
            keys.dtype == torch.bfloat16,
            torch.get_num_threads(),
            self._team,
        )
        require(outcome == 0, OUTCOMES.get(outcome, ""))
        return out_TNH

    def write_kv(self, keys: Tensor, values: Tensor, slots: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """See ``PagedAttention.write_kv``."""
        check_write(keys, values, slots, k_TKH, v_TKH)
        if k_TKH.dtype != keys.dtype or v_TKH.dtype != keys.dtype:
            write_kv(keys, values, slots, k_TKH, v_TKH)
            return
        P, K, S, H = keys.shape
        size = keys.element_size()
        outcome = self._write(
            keys.data_ptr(),
            values.data_ptr(),
            slots.data_ptr(),
            k_TKH.data_ptr(),
            v_TKH.data_ptr(),
            k_TKH.stride(0) * size,
            v_TKH.stride(0) * size,
            slots.shape[0],
            P,
            K,
            S,
            H * size,
        )
        require(outcome == 0, OUTCOMES.get(outcome, ""))


def _pointers(layout: KVLayout) -> tuple[int, ...]:
    check_layout(layout)
    fields = (layout.cu_rows, layout.blocks, layout.cu_blocks, layout.prefix, layout.ancestors, layout.text_len)
    addresses = (x.data_ptr() for x in (*fields, layout.positions))
    return (*addresses, layout.text_len.shape[0], layout.blocks.shape[0])


@functools.cache
def _native(path: Path) -> NativeAttention:
    return NativeAttention(path)


def attention_backend(device: torch.device | str, native: bool | None = None) -> PagedAttention:
    """The attention for ``device``: native where there is a library, else the reference. See ``library_path``."""
    path = library_path(torch.device(device).type, native)
    return ReferenceAttention() if path is None else _native(path)
