"""The operations a decoder is computed with: torch's own, or the native ones where they can be built."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from steeple.ops.linear import LinearOperation, NativeLinear
from steeple.ops.native import library_path
from steeple.ops.norm import NativeNorm, NormOperation, torch_norm


@dataclass(frozen=True, slots=True)
class Kernels:
    """One operation of each kind; the defaults are the slow twins."""

    linear: LinearOperation = F.linear
    norm: NormOperation = torch_norm


@functools.cache
def _native(path: Path) -> Kernels:
    return Kernels(NativeLinear(path), NativeNorm(path))


def kernels(device: torch.device | str, native: bool | None = None) -> Kernels:
    """The operations for ``device``; native exists for the CPU. Args: native: False never takes it."""
    path = library_path(torch.device(device).type, native)
    return Kernels() if path is None else _native(path)
