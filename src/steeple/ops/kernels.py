"""The operations a decoder is computed with: torch's own, or the native ones where they can be built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steeple.ops.linear import LinearLibrary, PackedWeight
from steeple.ops.native import library_path
from steeple.ops.norm import NativeNorm, NormOperation, torch_norm

# weight [outputs, inputs], sections of the outputs -> packed, or None to leave it as it is
Pack = Callable[[Tensor, int], PackedWeight | None]


def leave(_weight: Tensor, _sections: int) -> None:
    """Packs nothing: torch multiplies."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The defaults are the slow twins. ``library``: whole forwards in one call, where there is a native library.

    panel: outputs of a panel of packed weights; 0 = nothing is packed.
    """

    pack: Pack = leave
    norm: NormOperation = torch_norm
    library: Path | None = None
    panel: int = 0


@functools.cache
def _native(path: Path) -> Kernels:
    linear = LinearLibrary(path)
    return Kernels(linear.pack, NativeNorm(path), path, linear.panel)


def kernels(device: torch.device | str, native: bool | None = None) -> Kernels:
    """The operations for ``device``; native exists for the CPU. Args: native: False never takes it."""
    path = library_path(torch.device(device).type, native)
    return Kernels() if path is None else _native(path)
