"""The device: its memory, and what it can read and compute. Detected or measured, never assumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from steeple.errors import ConfigError

Work = tuple[float, Callable[[], object]]  # bytes or operations, and what moves or does them
TRIES = 5
READ_BYTES = 256 << 20  # far more than the caches hold
READ_ROW = 4096
CPU_SIZES = (512, 1024, 1536, 2048, 3072)
GPU_SIZES = (4096, 8192)


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


def measure(device: torch.device, *dtypes: torch.dtype) -> Hardware:
    """Read bandwidth, and the matrix peak in each of ``dtypes``, in a second or two; the best of several tries counts.

    A bound must not be beaten by luck, so several readers and several sizes compete, by turns.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    peaks = {str(dtype).removeprefix("torch."): _best(_multipliers(device, dtype), TRIES) for dtype in dtypes}
    return Hardware(name, torch.get_num_threads(), ReadProbe(device).best(TRIES), peaks)


class ReadProbe:
    """Measures the read bandwidth of ``device``, again and again: on a shared machine it changes from second to second.

    Three readers compete: one stream per thread, two streams per thread, a stream of long rows. Matrix-vector products
    and copies are slower on every CPU tried.
    """

    def __init__(self, device: torch.device) -> None:
        data = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)
        half = data.shape[0] // 2
        rows = data.view(-1, READ_ROW)
        self._readers: list[Work] = [
            (READ_BYTES, lambda: data.sum()),
            (READ_BYTES, lambda: torch.dot(data[:half], data[half:])),
            (READ_BYTES, lambda: rows.sum(1)),
        ]

    def best(self, tries: int) -> float:
        """Bytes per second of the fastest of ``tries`` readings by each reader."""
        return _best(self._readers, tries)

    def now(self) -> float:
        """Bytes per second of two readings one after the other: what a step has at this moment."""
        size, work = self._readers[0]
        start = time.perf_counter()
        work()
        work()
        _wait()
        return 2 * size / (time.perf_counter() - start)


def _multipliers(device: torch.device, dtype: torch.dtype) -> list[Work]:
    """Square products: which size is fastest depends on the caches."""
    return [_multiplier(n, device, dtype) for n in (CPU_SIZES if device.type == "cpu" else GPU_SIZES)]


def _multiplier(n: int, device: torch.device, dtype: torch.dtype) -> Work:
    a = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * n**3, lambda: torch.mm(a, a, out=out)


def _best(works: Sequence[Work], tries: int) -> float:
    """The highest amount per second that any of ``works`` reached; the first try of each only warms up."""
    best = 0.0
    for number in range(tries + 1):
        for amount, work in works:
            _wait()
            start = time.perf_counter()
            work()
            _wait()
            rate = amount / (time.perf_counter() - start)
            best = max(best, rate) if number else best
    return best


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
