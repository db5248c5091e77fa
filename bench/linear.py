"""Packed linear layers against torch's, by rows: microseconds, GB/s of weights, GFLOP/s. Prints a table and JSON.

    python bench/linear.py --json bench/results/linear.json

The weights are those of the embedded target's layers, more than the caches hold, so that every pass reads memory. The
operations take turns; medians are over the turns. ``int8`` reads half of the bytes; its GB/s are of those.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steeple.ops.linear import LinearLibrary
from steeple.ops.native import library_path

SHAPES = ((3072, 512), (512, 1024), (2816, 512), (512, 1408))
LAYERS = 8

Operation = Callable[[Tensor], Tensor]


def operations(library: LinearLibrary, dtype: torch.dtype) -> dict[str, list[tuple[int, Operation]]]:
    """For each kind the layers' operations, with the width of their input."""
    weights = [torch.randn(shape).to(dtype) for _ in range(LAYERS) for shape in SHAPES]
    kinds = {
        "torch": [(w.shape[1], lambda x, w=w: F.linear(x, w)) for w in weights],
        "native": [(w.shape[1], library.pack(w, 1)) for w in weights],
    }
    if dtype == torch.bfloat16:
        kinds["int8"] = [(w.shape[1], library.pack(_quantised(w), 1)) for w in weights]
    return kinds


def _quantised(weight: Tensor) -> Tensor:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype).requires_grad_(False)
    layer.weight.copy_(weight)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer.weight


def seconds(layers: list[tuple[int, Operation]], inputs: dict[int, Tensor]) -> float:
    """One pass over all weights."""
    start = time.perf_counter()
    for width, operation in layers:
        operation(inputs[width])
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 5, 8, 10, 16, 32, 64, 160, 512])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    path = library_path(native=True)
    if path is None:
        sys.exit("the native library could not be built")
    results: list[dict[str, Any]] = []
    for name in given.dtype:
        dtype = getattr(torch, name)
        kinds = operations(LinearLibrary(path), dtype)
        elements = LAYERS * sum(outputs * inputs for outputs, inputs in SHAPES)
        for rows in given.rows:
            inputs = {width: torch.randn(rows, width).to(dtype) for _, width in SHAPES}
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(given.repeat):
                for kind, layers in kinds.items():
                    times[kind].append(seconds(layers, inputs))
            for kind, found in times.items():
                median = statistics.median(found[1:])
                size = elements * (1 if kind == "int8" else dtype.itemsize)
                row = {"dtype": name, "rows": rows, "operation": kind, "microseconds": round(median * 1e6, 1)}
                row |= {"gbs": round(size / median / 1e9, 2), "gflops": round(2 * rows * elements / median / 1e9, 1)}
                results.append(row)
                sys.stderr.write(f"{row}\n")
    if given.json:
        command = shlex.join(["python", "bench/linear.py", *sys.argv[1:]])
        head = {"command": command, "threads": torch.get_num_threads(), "torch": torch.__version__}
        given.json.write_text(json.dumps({**head, "rows": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
