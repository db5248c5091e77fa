"""The device: its memory, and what it can read and compute. Detected or measured, never assumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from steeple.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Hardware:
    """Measured figures of one device: bytes per second read, floating-point operations per second by dtype."""

    name: str
    threads: int
    read_bytes_per_second: float
    flops_per_second: dict[str, float]


def pick_device(name: str) -> torch.device:
    """``auto``: a GPU if there is one. ``ConfigError`` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"EngineConfig.device = {name!r}, but torch sees no CUDA device; give cpu or auto.")
    return device


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2


def cpu_name() -> str:
    """The processor's own name, or the architecture where it tells none."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return os.uname().machine


def measure(device: torch.device, dtype: torch.dtype) -> Hardware:
    """Read bandwidth and matrix peak of the device, in about a second. The best of several runs counts."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    reads = _best(_reader(device), 6)
    products = _best(_multiplier(device, dtype), 6)
    return Hardware(name, torch.get_num_threads(), reads, {str(dtype).removeprefix("torch."): products})


def _reader(device: torch.device) -> Callable[[], int]:
    size = 256 * 2**20
    data = torch.ones(size // 4, dtype=torch.float32, device=device)

    def read() -> int:
        data.sum()
        return size

    return read


def _multiplier(device: torch.device, dtype: torch.dtype) -> Callable[[], int]:
    n = 1536 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)

    def multiply() -> int:
        torch.mm(a, a, out=out)
        return 2 * n**3

    return multiply


def _best(work: Callable[[], int], repeats: int) -> float:
    best = 0.0
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        amount = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = max(best, amount / (time.perf_counter() - start))
    return best
