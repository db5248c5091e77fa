"""The native twin of the paged attention: ``attention.cpp`` through plain C, and the choice between the two.

Its cache lies as the kernel reads it (``attention_call.h``): keys ``[L, P, K, H/2, S, 2]`` and values
``[L, P, K, S/2, H, 2]`` in bfloat16, keys ``[L, P, K, H, S, 1]`` and values ``[L, P, K, S, H, 1]`` in float32. So
nothing is shuffled when keys are read, which is a thousand times as often as they are written.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from steeple.ops.attention import (
    PagedAttention,
    ReferenceAttention,
    check_attention,
    check_layout,
    check_page_scores,
    check_slots,
    check_write,
    paged_attention,
    require,
)
from steeple.ops.memory import zeros
from steeple.ops.native import library_path, team_size, torch_team
from steeple.types import KVLayout

OUTCOMES = {
    1: "a slot or a block of the layout lies outside the cache",
    2: "there is no memory for the sums",
    3: "cu_rows, cu_blocks or a stride of the block tables is wrong",
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
        self._attend.argtypes = (
            [pointer] * 12 + [size] * 11 + [real] * 2 + [ctypes.c_int] * 2 + [size, pointer, pointer]
        )
        self._write = library.steeple_write
        self._write.argtypes = [pointer] * 5 + [size] * 7 + [ctypes.c_int]
        self._move = library.steeple_move
        self._move.argtypes = [pointer] * 4 + [size] * 5 + [ctypes.c_int]
        self._team = (torch_team(), team_size())
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
        page_scores: Tensor | None = None,
    ) -> Tensor:
        """See ``PagedAttention``. An odd head dim, which the kernel does not have, goes to the reference."""
        P, K, S, H = _check_cache(keys, values)
        check_attention(q_TNH, keys.dtype, (K, S, H), layout)
        T, N, _ = q_TNH.shape
        if H % 2:
            plain = (_plain_keys(keys), _plain_values(values))
            return paged_attention(
                q_TNH, *plain, layout, scale=scale, window=window, softcap=softcap, page_scores=page_scores
            )
        known, pointers = self._last
        if known is not layout:
            pointers = _pointers(layout)
            self._last = (layout, pointers)
        if page_scores is not None:
            check_page_scores(page_scores, K, int(layout.cu_blocks[-1]))
            page_scores.fill_(float("-inf"))
        out_TNH = q_TNH.new_empty((T, N, H))
        outcome = self._attend(
            q_TNH.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out_TNH.data_ptr(),
            None if page_scores is None else page_scores.data_ptr(),
            *pointers,
            T,
            q_TNH.stride(0),
            P,
            S,
            N,
            K,
            H,
            window,
            scale,
            softcap,
            q_TNH.dtype == torch.bfloat16,
            keys.dtype == torch.bfloat16,
            torch.get_num_threads(),
            *self._team,
        )
        require(outcome == 0, OUTCOMES.get(outcome, ""))
        return out_TNH

    def allocate(
        self,
        layers: int,
        blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> tuple[Tensor, Tensor]:
        """See ``PagedAttention``."""
        dims, pair = ((2 - n % 2) if dtype == torch.bfloat16 else 1 for n in (head_dim, block_size))
        keys = (layers, blocks, kv_heads, head_dim // dims, block_size, dims)
        values = (layers, blocks, kv_heads, block_size // pair, head_dim, pair)
        return zeros(keys, dtype, device), zeros(values, dtype, device)

    def write_kv(self, keys: Tensor, values: Tensor, slots: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """See ``PagedAttention.write_kv``."""
        P, K, S, H = _check_cache(keys, values)
        check_write(K, H, slots, k_TKH, v_TKH)
        k_TKH, v_TKH = k_TKH.to(keys.dtype), v_TKH.to(keys.dtype)
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
            H,
            size == 2,
        )
        require(outcome == 0, OUTCOMES.get(outcome, ""))

    def move_kv(self, keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
        """See ``PagedAttention.move_kv``."""
        P, K, S, H = _check_cache(keys, values)
        check_slots(source)
        check_slots(target)
        require(source.shape == target.shape, f"{source.shape[0]} slots do not fit in {target.shape[0]}")
        places = (keys.data_ptr(), values.data_ptr(), source.data_ptr(), target.data_ptr())
        outcome = self._move(*places, source.shape[0], P, K, S, H, keys.element_size() == 2)
        require(outcome == 0, OUTCOMES.get(outcome, ""))

    def read_kv(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See ``PagedAttention.read_kv``."""
        _, K, S, H = _check_cache(keys, values)
        check_slots(slots)
        pair, block, offset = values.shape[4], slots // S, slots % S
        k_nKH = keys[block, :, :, offset].reshape(-1, K, H)
        return k_nKH, values[block, :, offset // pair, :, offset % pair]


def _check_cache(keys: Tensor, values: Tensor) -> tuple[int, int, int, int]:
    """P, K, S and H of one layer; ``InternalError`` unless both are contiguous and of this file's layout."""
    require(keys.dim() == 5 and values.dim() == 5 and keys.dtype == values.dtype, "keys and values are no such cache")
    P, K, words, S, dims = keys.shape
    H, bfloat16 = words * dims, keys.dtype == torch.bfloat16
    pair = 2 - S % 2 if bfloat16 else 1
    if dims != (2 - H % 2 if bfloat16 else 1) or values.shape != (P, K, S // pair, H, pair):
        require(False, f"keys {tuple(keys.shape)} and values {tuple(values.shape)} are no such cache")
    require(keys.is_contiguous() and values.is_contiguous(), "keys or values are not contiguous")
    return P, K, S, H


def _plain_keys(keys: Tensor) -> Tensor:
    """``[P, K, S, H]``, as the reference has them."""
    return keys.transpose(2, 3).flatten(3).contiguous()


def _plain_values(values: Tensor) -> Tensor:
    return values.transpose(3, 4).flatten(2, 3).contiguous()


def _pointers(layout: KVLayout) -> tuple[int, ...]:
    check_layout(layout)
    fields = (layout.cu_rows, layout.blocks, layout.cu_blocks, layout.prefix, layout.ancestors, layout.text_len)
    addresses = (x.data_ptr() for x in (*fields, layout.positions))
    return (*addresses, layout.text_len.shape[0], layout.blocks.shape[0], layout.head_stride)


@functools.cache
def _native(path: Path) -> NativeAttention:
    return NativeAttention(path)


@functools.cache
def _triton(device: torch.device) -> PagedAttention:
    from steeple.ops.triton_attention import TritonAttention

    return TritonAttention(device)


def attention_backend(device: torch.device | str, native: bool | None = None) -> PagedAttention:
    """The attention for ``device``: native on the CPU, Triton on a GPU, where they can be had; else the reference.

    See ``library_path`` for ``native``; False means the reference anywhere.
    """
    device = torch.device(device)
    if device.type == "cuda" and native is not False and importlib.util.find_spec("triton") is not None:
        return _triton(device)
    path = library_path(device.type, native)
    return ReferenceAttention() if path is None else _native(path)
