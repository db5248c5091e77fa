"""Paged attention on a GPU: the Triton twin of the reference, and places where captured graphs find their layout.

Needs the package ``triton`` and a CUDA device; with ``TRITON_INTERPRET=1`` in the environment before triton is first
imported the same kernels run on a CPU, slowly, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.ops.attention import check_cache, check_slots, check_write, require
from steeple.ops.memory import zeros
from steeple.ops.triton_plan import HEADER, ITEM, Plan, Tiling, make_plan
from steeple.types import KVLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE_BYTES = 16 << 10  # of queries and of keys: with two stages of keys and values all fits the smallest GPU's 99 KiB
MOST_TILE = 64  # rows x heads, and keys
LEAST_TILE = 16  # what a matrix instruction takes
SPLIT = 512  # keys summed by themselves; their partial sums are 1 to 2 % of the bytes read for a decode row
PARTIAL_BYTES = 64 << 20  # for partial sums, shared by all layers
PROGRAMS_PER_PROCESSOR = 4  # of a captured graph, whose grid is fixed: 2 or 3 of them run at once
STAGES = 2
CONTENTS = ("cu_rows", "blocks", "cu_blocks", "prefix", "ancestors", "text_len", "positions")  # what a plan is made of
FOUR_WARPS = 64 * 64  # sums of a tile that the registers of four warps hold


def triton_is_installed() -> bool:
    """Whether ``TritonAttention`` can be made."""
    return find_spec("triton") is not None


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What the cut of the work depends on: query heads, key heads, head dim, dtype of queries and of the cache."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedLayout(KVLayout):
    """A layout whose plan lies on the device already, at an address that stays."""

    plan: Tensor


class LayoutPlace:
    """Where a captured graph finds the layout of the step: the address of its plan never changes.

    Args: attention that reads it, for heads of ``shape``; a cache of ``blocks``; size of the plan, int32.
    """

    def __init__(self, attention: TritonAttention, shape: HeadShape, blocks: int, size: int) -> None:
        self._attention, self._shape, self._blocks = attention, shape, blocks
        self._plan = torch.zeros(size, dtype=torch.int32, device=attention.device)

    def load(self, layout: KVLayout) -> KVLayout:
        """Bring in the layout of a step with one copy, waiting for nothing; gives what to hand to the attention.

        Raises ``InternalError`` for a plan that outgrows the place.
        """
        plan = self._attention.plan(layout, self._shape, self._blocks)
        size = plan.array.shape[0]
        require(size <= self._plan.shape[0], f"a plan of {size} numbers outgrows its place of {self._plan.shape[0]}")
        self._plan[:size].copy_(_staged(plan, self._plan.device), non_blocking=True)
        return PlacedLayout(**{f.name: getattr(layout, f.name) for f in fields(KVLayout)}, plan=self._plan)


def _staged(plan: Plan, device: torch.device) -> Tensor:
    """The plan in memory that the device can copy from by itself. torch keeps it until the copy is done."""
    array = torch.from_numpy(plan.array)
    return array.pin_memory() if device.type == "cuda" else array


@dataclass(frozen=True, slots=True)
class _Known:
    """The plan of the newest step, on the host and on the device, and what it was made of."""

    shape: HeadShape
    contents: list[NDArray[np.generic]]
    plan: Plan
    array: Tensor


class TritonAttention:
    """A ``PagedAttention`` for ``device``; see there. Caches lie as ``[P, K, S, H]`` for each layer.

    Args:
        tile: most rows x heads, and most keys, of a tile; power of two.
        split: keys that are summed by themselves; a power of two, at least ``tile``.
        programs: that keep the device busy; default: by its processors.

    A row's rounding depends on its own queries and keys, ``tile`` and ``split`` alone.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        tile: int = MOST_TILE,
        split: int = SPLIT,
        programs: int | None = None,
    ) -> None:
        # Where triton is absent the rest of the package still imports.
        from steeple.ops import triton_kernels

        self.device = torch.device(device)
        self._kernels: Any = triton_kernels
        self._tile, self._split = tile, split
        self._programs = programs or 2
        if programs is None and self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
            self._programs = PROGRAMS_PER_PROCESSOR * processors
        self._partial: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._tilings: dict[HeadShape, Tiling] = {}
        self._last: _Known | None = None

    def tiling(self, shape: HeadShape) -> Tiling:
        """How work is cut for these heads."""
        if shape not in self._tilings:
            group = shape.heads // shape.kv_heads
            fits = max(LEAST_TILE, TILE_BYTES // (_power_of_two(shape.head_dim) * self._compute(shape).itemsize))
            side = min(self._tile, fits)
            rows = max(side, _power_of_two(group)) // group
            slots = self._partials(shape.heads, shape.head_dim)[0].shape[0]
            self._tilings[shape] = Tiling(rows, side, self._split, self._programs, slots)
        return self._tilings[shape]

    def _compute(self, shape: HeadShape) -> torch.dtype:
        return shape.dtype if shape.dtype == shape.kv_dtype else torch.float32

    def plan(self, layout: KVLayout, shape: HeadShape, blocks: int) -> Plan:
        """The work of a step on the host."""
        return make_plan(layout, self.tiling(shape), shape.kv_heads, blocks)

    def place(self, shape: HeadShape, blocks: int, *, rows: int, table: int) -> LayoutPlace:
        """A place for steps of at most ``rows`` rows, whose block tables have at most ``table`` entries together."""
        items = self.tiling(shape).slots + rows  # an item has a partial sum or a row of its own
        return LayoutPlace(self, shape, blocks, HEADER + ITEM * items + 6 * rows + table)

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
        """See ``PagedAttention``. There are no page scores yet: asking for them raises ``InternalError``."""
        require(page_scores is None, "a GPU gives no page scores; run on the CPU, or draft without them")
        check_cache(keys, values)
        _check(q_TNH, keys, layout)
        (T, N, H), (P, K, S, _) = q_TNH.shape, keys.shape
        shape = HeadShape(N, K, H, q_TNH.dtype, keys.dtype)
        out_TNH = q_TNH.new_empty((T, N, H))
        if not T:
            return out_TNH
        if isinstance(layout, PlacedLayout):
            plan, programs, combines = layout.plan, self._programs, True
        else:
            known, plan = self._planned(layout, shape, P)
            programs, combines = known.items * K, known.combines
        tiling, BLOCK_H = self.tiling(shape), max(LEAST_TILE, _power_of_two(H))
        BLOCK_M = max(LEAST_TILE, _power_of_two(tiling.rows * (N // K)))
        part_acc, part_ml = self._partials(N, H)
        self._kernels.attend[(programs,)](
            q_TNH, q_TNH.stride(0), keys, values, plan, out_TNH, part_acc, part_ml, scale,
            N=N, K=K, S=S, H=H, BLOCK_H=BLOCK_H, BLOCK_M=BLOCK_M, BLOCK_N=tiling.keys, SPLIT=tiling.split,
            WINDOW=window, SOFTCAP=softcap, EXACT=self._compute(shape) != q_TNH.dtype,
            num_warps=4 if BLOCK_M * BLOCK_H <= FOUR_WARPS else 8, num_stages=STAGES,
        )  # fmt: skip
        if combines:
            BLOCK_G = _power_of_two(N // K)
            self._kernels.combine[(T, K)](
                plan, out_TNH, part_acc, part_ml, N=N, K=K, H=H, BLOCK_H=BLOCK_H, BLOCK_G=BLOCK_G
            )
        return out_TNH

    def _planned(self, layout: KVLayout, shape: HeadShape, blocks: int) -> tuple[Plan, Tensor]:
        """The plan and its copy on the device. All layers of a step share them.

        A layout is known by its contents: the next step may write over the same tensors.
        """
        contents = [np.asarray(layout.head_stride), *(getattr(layout, name).numpy() for name in CONTENTS)]
        last = self._last
        if last is None or last.shape != shape or not all(map(np.array_equal, last.contents, contents)):
            plan = self.plan(layout, shape, blocks)
            array = _staged(plan, self.device).to(self.device, non_blocking=True)
            last = self._last = _Known(shape, [x.copy() for x in contents], plan, array)
        return last.plan, last.array

    def _partials(self, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Room for partial sums: made once, because captured graphs know where it is."""
        if (heads, head_dim) not in self._partial:
            slots = PARTIAL_BYTES // (4 * heads * (head_dim + 2))
            self._partial[heads, head_dim] = (
                torch.empty((slots, heads, head_dim), device=self.device),
                torch.empty((slots, heads, 2), device=self.device),
            )
        return self._partial[heads, head_dim]

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
        """See ``PagedAttention.allocate``. A program reads one head, so the keys of a head lie together in a block."""
        shape = (layers, blocks, kv_heads, block_size, head_dim)
        return zeros(shape, dtype, device), zeros(shape, dtype, device)

    def write_kv(self, keys: Tensor, values: Tensor, slots: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """See ``PagedAttention.write_kv``. The device does not check that a slot lies in the cache."""
        check_cache(keys, values)
        _, K, S, H = keys.shape
        check_write(K, H, slots, k_TKH, v_TKH)
        if slots.shape[0]:
            self._kernels.write[(slots.shape[0],)](
                k_TKH, k_TKH.stride(0), v_TKH, v_TKH.stride(0), keys, values, slots,
                K=K, S=S, H=H, BLOCK=_power_of_two(K * H),
            )  # fmt: skip

    def move_kv(self, keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
        """See ``PagedAttention.move_kv``."""
        check_cache(keys, values)
        _, K, S, H = keys.shape
        check_slots(source)
        check_slots(target)
        require(source.shape == target.shape, f"{source.shape[0]} slots to move to {target.shape[0]}")
        if source.shape[0]:
            held = keys.new_empty((source.shape[0], 2, K, H))
            for slots, back in ((source, False), (target, True)):
                self._kernels.move[(source.shape[0],)](
                    keys, values, slots, held, K=K, S=S, H=H, BLOCK=_power_of_two(K * H), BACK=back
                )

    def read_kv(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See ``PagedAttention.read_kv``."""
        check_cache(keys, values)
        check_slots(slots)
        slots = slots.to(keys.device)
        block, offset = slots // keys.shape[2], slots % keys.shape[2]
        return keys[block, :, offset], values[block, :, offset]


def _power_of_two(n: int) -> int:
    """The least that is not smaller than ``n``."""
    return 1 << (n - 1).bit_length()


def _check(q_TNH: Tensor, keys: Tensor, layout: KVLayout) -> None:
    """Raise ``InternalError`` for queries that do not fit the cache; float16, which a CPU lacks, is welcome here."""
    (T, N, H), (_, K, S, kv_H) = q_TNH.shape, keys.shape
    require(keys.dtype in DTYPES and q_TNH.dtype in DTYPES, f"q is {q_TNH.dtype}, keys are {keys.dtype}")
    fits = kv_H == H and N % K == 0 and layout.block_size == S and layout.prefix.shape[0] == T
    require(fits, f"q {tuple(q_TNH.shape)} does not fit a cache with (K, S, H) = {(K, S, H)} or the layout")
    require(q_TNH.stride()[1:] == (H, 1), f"q has strides {q_TNH.stride()}; only rows may be strided")
