"""How fast paged attention reads the cache: native, reference and torch's dense attention, against a plain read.

    python bench/attention.py --contexts 1024 4096 --rows 1 5 9 > attention.json

Every case reads other layers in turn, more than the processor caches hold. Times are medians and minima over single
calls; ``gb_per_s`` is bytes of keys and values over the median. ``read`` is the sum of the same bytes as int64: what
the machine streams with the same threads.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steeple.ops.attention import PagedAttention, ReferenceAttention
from steeple.ops.memory import zeros
from steeple.ops.native_attention import attention_backend
from steeple.types import KVLayout

COLD_BYTES = 128 << 20  # of keys and values, so that no call finds its own in a processor cache
SHAPES = {"8x128": (8, 8, 128), "12/4x64": (12, 4, 64)}  # query heads, key heads, head dim


def make_layout(requests: int, context: int, rows: int, block_size: int) -> KVLayout:
    """The last ``rows`` positions of every request ask; blocks lie in random order."""
    blocks = requests * -(-context // block_size)
    ask = torch.arange(context - rows, context, dtype=torch.int32).repeat(requests)
    offsets = torch.arange(requests + 1, dtype=torch.int32)
    return KVLayout(
        cu_rows=offsets * rows,
        blocks=torch.randperm(blocks).int(),
        cu_blocks=offsets * (blocks // requests),
        block_size=block_size,
        prefix=ask + 1,
        ancestors=torch.zeros(requests * rows, dtype=torch.int64),
        text_len=torch.full((requests,), context, dtype=torch.int32),
        positions=ask,
        node_row=offsets[1:] * rows,
    )


def time_calls(call: Callable[[int], Any], layers: int, seconds: float) -> tuple[float, float]:
    """Median and least seconds of ``call(layer)``, over the layers in turn."""
    times: list[float] = []
    call(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 2 * layers:
        start = time.perf_counter()
        call(len(times) % layers)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2], min(times)


def measure(name: str, requests: int, context: int, rows: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    N, K, H = SHAPES[name]
    dtype = getattr(torch, args.dtype)
    layout = make_layout(requests, context, rows, args.block_size)
    blocks = layout.blocks.shape[0]
    size = 2 * blocks * args.block_size * K * H * dtype.itemsize
    layers = max(2, -(-COLD_BYTES // size))
    cache = zeros((layers, 2, blocks, K, args.block_size, H), dtype)
    cache.copy_(torch.randn(cache.shape[2:]).to(dtype))
    dense = cache.view(layers, 2, requests, K, -1, H)
    q_TNH = torch.randn(requests * rows, N, H).to(dtype)
    q_BNTH = q_TNH.view(requests, rows, N, H).transpose(1, 2)
    mask = torch.ones(rows, dense.shape[4], dtype=torch.bool).tril(dense.shape[4] - rows)

    def paged(attend: PagedAttention) -> Callable[[int], Tensor]:
        return lambda layer: attend(q_TNH, cache[layer, 0], cache[layer, 1], layout, scale=H**-0.5)

    calls: dict[str, Callable[[int], Any]] = {
        "read": lambda layer: cache[layer].view(torch.int64).sum(),
        "native": paged(attention_backend("cpu", native=True)),
        "reference": paged(ReferenceAttention()),
        "sdpa": lambda layer: F.scaled_dot_product_attention(
            q_BNTH, dense[layer, 0], dense[layer, 1], attn_mask=mask, enable_gqa=True
        ),
    }
    case = {"shape": name, "requests": requests, "context": context, "rows": rows}
    results = []
    for kind in args.kinds:
        median, least = time_calls(calls[kind], layers, args.seconds)
        rates = {"gb_per_s": round(size / median / 1e9, 2), "best_gb_per_s": round(size / least / 1e9, 2)}
        results.append(case | {"kind": kind, "us": round(median * 1e6, 1), "best_us": round(least * 1e6, 1)} | rates)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--contexts", nargs="+", type=int, default=[64, 1024, 4096])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 5, 9])
    parser.add_argument("--kinds", nargs="+", default=["read", "native", "reference", "sdpa"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = [
        result
        for name in args.shapes
        for requests in args.requests
        for context in args.contexts
        for rows in args.rows
        for result in measure(name, requests, context, rows, args)
    ]
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    settings = {"threads": args.threads, "dtype": args.dtype, "block_size": args.block_size}
    sys.stdout.write(json.dumps(machine | settings | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
