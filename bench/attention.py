"""How close paged attention comes to what the machine can do: native, reference, torch's dense and flex attention.

    python bench/attention.py --contexts 256 1024 4096 --rows 1 5 9 --json attention.json

The floor of a case is the larger of two times: bytes of keys and values over the read bandwidth, and multiply-adds
over the arithmetic peak. Both are probed (``probe.cpp``, as many threads) between the calls of the very case, because a
shared machine is not equally fast all the time: ``fraction_of_floor`` is the floor of the median probe over the median
call, ``best_fraction`` that of the best probe over the best call. Every call reads another layer, and the layers
together are more than the processor caches hold; kinds take turns. ``call_us`` is what a call costs with next to
nothing to do. ``read`` is torch's sum of the same bytes as int64; where it beats the probe, it is the bandwidth.

Blocks lie in random order unless ``--order ascending``; dense and flex attention have a request's keys in one piece.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from steeple.ops import native
from steeple.ops.attention import PagedAttention, ReferenceAttention
from steeple.ops.memory import zeros
from steeple.ops.native_attention import attention_backend
from steeple.types import KVLayout

COLD_BYTES = 128 << 20  # of keys and values, so that no call finds its own in a processor cache
SHAPES = {"8x128": (8, 8, 128), "12/4x64": (12, 4, 64)}  # query heads, key heads, head dim
PROBES = 5  # rounds of a case; a probe of bandwidth and arithmetic in each
FLOP_ROUNDS = 200_000


class Probe:
    """``probe.cpp``, compiled as the kernels are."""

    def __init__(self, folder: Path, threads: int, dtype: torch.dtype) -> None:
        source, library = Path(__file__).parent / "probe.cpp", folder / "probe.so"
        include = Path(native.__file__).parent
        flags = (*native.FLAGS, *native.LEVELS[native.level()].flags, f"-I{include}")
        subprocess.run((*native.compiler(), *flags, str(source), "-o", str(library)), check=True)
        loaded = ctypes.CDLL(str(library))
        self._read, self._flops = loaded.probe_read, loaded.probe_flops
        self._read.restype = self._flops.restype = ctypes.c_double
        team = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_int64, *team]
        self._flops.argtypes = [ctypes.c_int64, ctypes.c_int, *team]
        self._team = (threads, native.torch_team(), native.team_size())
        self._bf16 = dtype == torch.bfloat16

    def bandwidth(self, data: Tensor) -> float:
        """Bytes per second."""
        return float(self._read(data.data_ptr(), min(data.nbytes, COLD_BYTES), *self._team))

    def flops(self) -> float:
        """Floating-point operations per second."""
        return float(self._flops(FLOP_ROUNDS, self._bf16, *self._team))


@dataclass(frozen=True)
class Cell:
    """One case: ``rows`` queries of each of ``requests`` requests of ``context`` positions."""

    shape: str
    requests: int
    context: int
    rows: int

    @property
    def heads(self) -> tuple[int, int, int]:
        return SHAPES[self.shape]

    def flops(self) -> float:
        """Of scores and mixing, every row seeing the whole context."""
        N, _, H = self.heads
        return 4.0 * self.requests * self.rows * self.context * N * H


def make_layout(cell: Cell, block_size: int, order: str) -> KVLayout:
    """The last ``rows`` positions of every request ask."""
    requests, rows = cell.requests, cell.rows
    blocks = requests * -(-cell.context // block_size)
    ask = torch.arange(cell.context - rows, cell.context, dtype=torch.int32).repeat(requests)
    offsets = torch.arange(requests + 1, dtype=torch.int32)
    return KVLayout(
        cu_rows=offsets * rows,
        blocks=torch.randperm(blocks).int() if order == "random" else torch.arange(blocks, dtype=torch.int32),
        cu_blocks=offsets * (blocks // requests),
        block_size=block_size,
        prefix=ask + 1,
        ancestors=torch.zeros(requests * rows, dtype=torch.int64),
        text_len=torch.full((requests,), cell.context, dtype=torch.int32),
        positions=ask,
        node_row=offsets[1:] * rows,
    )


def filled(tensor: Tensor) -> Tensor:
    tile = torch.randn(1 << 20).to(tensor.dtype)
    for piece in tensor.view(-1).split(tile.numel()):
        piece.copy_(tile[: piece.numel()])
    return tensor


def paged(
    cell: Cell, q_TNH: Tensor, attend: PagedAttention, layers: int, args: argparse.Namespace
) -> Callable[[int], Any]:
    """Calls ``attend`` with a cache of its own."""
    _, K, H = cell.heads
    layout = make_layout(cell, args.block_size, args.order)
    cache = attend.allocate(layers, layout.blocks.shape[0], K, args.block_size, H, q_TNH.dtype, "cpu")
    keys, values = (filled(x).unbind(0) for x in cache)
    return lambda layer: attend(q_TNH, keys[layer], values[layer], layout, scale=H**-0.5)


def dense_calls(cell: Cell, q_TNH: Tensor, dense: Tensor) -> dict[str, Callable[[int], Any]]:
    """Attention over keys and values in one piece, ``dense [L, 2, B, K, S, H]``."""
    N, _, H = cell.heads
    q_BNTH = q_TNH.view(cell.requests, cell.rows, N, H).transpose(1, 2)
    rows, past = cell.rows, cell.context - cell.rows
    mask = torch.ones(rows, cell.context, dtype=torch.bool).tril(past)

    def sdpa(i: int) -> Tensor:
        return F.scaled_dot_product_attention(q_BNTH, dense[i, 0], dense[i, 1], attn_mask=mask, enable_gqa=True)

    return {"read": lambda i: dense[i].view(torch.int64).sum(), "sdpa": sdpa}


def flex_call(cell: Cell, q_TNH: Tensor, dense: Tensor) -> Callable[[int], Any]:
    """Compiled flex attention over the same; compiles for this case alone."""
    N, _, H = cell.heads
    q_BNTH = q_TNH.view(cell.requests, cell.rows, N, H).transpose(1, 2)
    past = cell.context - cell.rows

    def seen(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q + past >= k

    blocks = create_block_mask(seen, None, None, cell.rows, cell.context, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda i: compiled(q_BNTH, dense[i, 0], dense[i, 1], block_mask=blocks, enable_gqa=True)


def least_call(cell: Cell, args: argparse.Namespace, attend: PagedAttention) -> float:
    """Seconds of a call with one row that sees one position."""
    tiny = Cell(cell.shape, 1, 1, 1)
    N, _, H = cell.heads
    call = paged(tiny, torch.randn(1, N, H).to(getattr(torch, args.dtype)), attend, 1, args)
    return median(timed(call, 0) for _ in range(500))


def timed(call: Callable[[int], Any], layer: int) -> float:
    start = time.perf_counter()
    call(layer)
    return time.perf_counter() - start


def measure(cell: Cell, args: argparse.Namespace, probe: Probe) -> list[dict[str, Any]]:
    """A row of results per kind, with the floor of the case."""
    N, K, H = cell.heads
    dtype = getattr(torch, args.dtype)
    size = 2 * cell.requests * cell.context * K * H * dtype.itemsize
    layers = max(2, -(-COLD_BYTES // size))
    q_TNH = torch.randn(cell.requests * cell.rows, N, H).to(dtype)
    dense = filled(zeros((layers, 2, cell.requests, K, cell.context, H), dtype))
    backend = attention_backend("cpu", native=True)
    known = dense_calls(cell, q_TNH, dense)
    for kind, attend in (("native", backend), ("reference", ReferenceAttention())):
        if kind in args.kinds:
            known[kind] = paged(cell, q_TNH, attend, layers, args)
    if "flex" in args.kinds:
        known["flex"] = flex_call(cell, q_TNH, dense)
    times: dict[str, list[float]] = {kind: [] for kind in args.kinds}
    for kind in args.kinds:
        known[kind](0)  # compiles what must be compiled
    bandwidth, flops = [], []
    for _ in range(PROBES):
        bandwidth.append(probe.bandwidth(dense))
        flops.append(probe.flops())
        for kind, taken in times.items():
            end, first = time.perf_counter() + args.seconds / PROBES, len(taken)
            while time.perf_counter() < end or len(taken) < first + 2:
                taken.append(timed(known[kind], len(taken) % layers))
    reads = [size / t for t in times.get("read", ())] or [0.0]
    usual = Floor(size, cell.flops(), max(median(bandwidth), median(reads)), median(flops))
    best = Floor(size, cell.flops(), max(bandwidth), max(flops))
    case = {"shape": cell.shape, "requests": cell.requests, "context": cell.context, "rows": cell.rows}
    least = least_call(cell, args, backend)
    results = []
    for kind, taken in times.items():
        us = median(taken)
        speed = {"us": round(us * 1e6, 1), "gb_per_s": round(size / us / 1e9, 2)}
        speed |= {
            "fraction_of_floor": round(usual.seconds / us, 3),
            "best_fraction": round(best.seconds / min(taken), 3),
        }
        if kind == "native":
            speed |= {"call_us": round(least * 1e6, 1), "fraction_without_call": round(usual.seconds / (us - least), 3)}
        results.append(case | {"kind": kind} | speed | usual.as_dict())
    return results


@dataclass(frozen=True)
class Floor:
    """The least time for ``size`` bytes and ``work`` floating-point operations at such rates per second."""

    size: int
    work: float
    bandwidth: float
    flops: float

    @property
    def seconds(self) -> float:
        return max(self.size / self.bandwidth, self.work / self.flops)

    def as_dict(self) -> dict[str, Any]:
        bound = "memory" if self.size / self.bandwidth >= self.work / self.flops else "arithmetic"
        rates = {"read_gb_per_s": round(self.bandwidth / 1e9, 1), "peak_gflops": round(self.flops / 1e9)}
        return {"floor_us": round(self.seconds * 1e6, 1), "bound": bound} | rates


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 5, 9])
    kinds = ["read", "native", "reference", "sdpa", "flex"]
    parser.add_argument("--kinds", nargs="+", default=["read", "native", "sdpa"], choices=kinds)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--order", default="random", choices=["random", "ascending"], help="of a request's blocks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.2, help="per case and kind")
    parser.add_argument("--json", type=Path, help="file for the results; else they are printed")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    cells = [
        Cell(name, requests, context, rows)
        for name in args.shapes
        for requests in args.requests
        for context in args.contexts
        for rows in args.rows
    ]
    results = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        probe = Probe(Path(folder), args.threads, getattr(torch, args.dtype))
        for cell in cells:
            for row in measure(cell, args, probe):
                sys.stderr.write("  ".join(f"{key} {value}" for key, value in row.items()) + "\n")
                results.append(row)
    machine = {
        "machine": platform.processor() or platform.machine(),
        "level": native.level(),
        "torch": torch.__version__,
    }
    settings = {key: getattr(args, key) for key in ("threads", "dtype", "block_size", "order", "seconds")}
    command = shlex.join(("python", "bench/attention.py", *sys.argv[1:]))
    text = json.dumps({"command": command} | machine | settings | {"results": results}, indent=1) + "\n"
    if args.json:
        args.json.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
