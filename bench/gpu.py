"""What the GPU path makes of a GPU's memory bandwidth: plain steps and verification, with and without graphs.

    python bench/gpu.py --json bench/results/gpu.json
    python bench/gpu.py --tiles 16 32 64 128 --batch 1 32 --json tiles.json     which tile is best, attention alone
    python bench/gpu.py --device cpu --tiny                                     a smoke test through the interpreter

A random Llama in bfloat16; time does not depend on its weights. ``step_ms`` is a forward of all layers and the logits
of all rows, batch assembly on the host included; ``attention_ms`` the attention of all layers alone. Bytes are those of
the weights and of the keys and values that are read; ``fraction`` is bytes over time over the bandwidth that a copy of
1 GiB reaches in the same run. Medians of ``--repeats`` after two warm-ups, each synchronised. Cases whose keys do not
fit beside the weights are listed as skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "--device=cpu" in sys.argv or "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported, which transformers does

import numpy as np
import torch

from steeple.cache.batch import Span, make_batch
from steeple.cache.blocks import BlockPool
from steeple.cache.paged import PagedCache
from steeple.config import ModelConfig
from steeple.hardware import available_memory
from steeple.model.decoder import Decoder
from steeple.model.graphs import step_graphs
from steeple.model.run import Runner
from steeple.ops.triton_attention import TritonAttention, triton_is_installed
from steeple.types import Batch, Draft

BLOCK = 16


def shape(layers: int, hidden: int, heads: int, kv_heads: int, middle: int, vocab: int, context: int) -> ModelConfig:
    head_dim = hidden // heads
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=middle,
        max_context=context,
        rope_inv_freq=tuple(500000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)),
    )


SHAPES = {  # of Llama 3.2 1B and Llama 3.1 8B
    "1b": shape(16, 2048, 32, 8, 8192, 128256, 16384),
    "8b": shape(32, 4096, 32, 8, 14336, 128256, 16384),
    "tiny": shape(2, 64, 4, 2, 128, 320, 128),
}


def random_decoder(config: ModelConfig, device: torch.device) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(config).requires_grad_(False)
    decoder = decoder.to(torch.bfloat16).to_empty(device=device)
    for name, weight in decoder.named_parameters():
        weight.fill_(1.0) if "norm" in name else weight.normal_(0.0, 0.02)
    decoder.reset_rope()
    return decoder


def make_step(batch: int, context: int, rows: int, config: ModelConfig, device: torch.device) -> Batch:
    """Every request has ``context`` keys in the cache and asks with its newest token and a chain of ``rows - 1``."""
    numbers = np.random.default_rng(0)
    each = -(-(context + rows) // BLOCK)
    tables = numbers.permutation(batch * each).reshape(batch, each)
    spans = [
        Span(f"r{b}", context, numbers.integers(config.vocab_size, size=1), tables[b].tolist()) for b in range(batch)
    ]
    nodes, cu = rows - 1, torch.arange(batch + 1) * (rows - 1)
    parent = torch.arange(batch * nodes) - 1
    parent[:: nodes or 1] = -1
    tokens = torch.from_numpy(numbers.integers(config.vocab_size, size=batch * nodes)).to(device)
    return make_batch(spans, Draft(tokens, parent, cu, torch.full_like(tokens, -1)), BLOCK, device)


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of single calls, each waited for."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for turn in range(2 + repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        if turn >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second read and written by a copy."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), device, repeats) * 1e3


class Lab:
    """One model, one cache that holds the largest case, runners with and without graphs."""

    def __init__(self, config: ModelConfig, blocks: int, device: torch.device, tile: int) -> None:
        self.config, self.device = config, device
        self.decoder = random_decoder(config, device)
        self.attention = TritonAttention(device, tile=tile)
        self.cache = PagedCache(
            config, blocks=blocks + 1, block_size=BLOCK, dtype=torch.bfloat16, device=device, attention=self.attention
        )
        self.cache.pool = BlockPool(blocks)  # the last block is for padding rows
        for store in (self.cache.keys, self.cache.values):
            store.normal_()
        self.eager = Runner(self.decoder, self.cache, self.attention)
        self.graphed = Runner(self.decoder, self.cache, self.attention)
        self.eager.whole = None
        self.scratch = blocks * BLOCK
        self.weight_bytes = (
            sum(p.numel() for p in self.decoder.parameters()) * 2 - config.vocab_size * config.hidden_size * 2
        )

    def attend(self, batch: Batch) -> Callable[[], None]:
        """The attention of all layers, for a layout that is on the device already."""
        config, rows = self.config, batch.tokens.shape[0]
        q_TNH = torch.randn(rows, config.num_heads, config.head_dim, device=self.device).bfloat16()

        def call() -> None:
            for index in range(config.num_layers):
                keys, values = self.cache.layer(index)
                self.attention(q_TNH, keys, values, batch.layout, scale=config.scale)

        return call


Case = tuple[int, int, int]  # batch, context, rows


def blocks_of(case: Case) -> int:
    batch, context, rows = case
    return batch * -(-(context + rows) // BLOCK)


def fits(case: Case, config: ModelConfig, device: torch.device) -> bool:
    """Whether keys and weights leave a tenth of the free memory for everything else."""
    weights = 2 * (config.body_parameters() + 2 * config.vocab_size * config.hidden_size)
    return weights + 2 * config.kv_elements_per_token * BLOCK * blocks_of(case) < 0.9 * available_memory(device)


def measure_case(lab: Lab, case: Case, read: float, repeats: int) -> Iterator[dict[str, Any]]:
    batch, context, rows = case
    config, device = lab.config, lab.device
    # A graph of exactly these rows: padding is not what is measured here.
    lab.graphed.whole = step_graphs(lab.decoder, lab.cache, lab.attention, scratch=lab.scratch, buckets=(batch * rows,))
    kv = batch * context * config.kv_elements_per_token * 2
    attention_ms = milliseconds(lab.attend(make_step(*case, config, device)), device, repeats)
    for kind, runner in (("eager", lab.eager), ("graphs", lab.graphed)):

        def step(runner: Runner = runner) -> None:
            runner.logits(runner.forward(make_step(*case, config, device)).final_TD)

        step_ms = milliseconds(step, device, repeats)
        yield {
            "batch": batch,
            "context": context,
            "rows": rows,
            "kind": kind,
            "step_ms": round(step_ms, 4),
            "bytes": lab.weight_bytes + kv,
            "fraction": round((lab.weight_bytes + kv) / (step_ms / 1e3) / read, 4),
            "attention_ms": round(attention_ms, 4),
            "attention_fraction": round(kv / (attention_ms / 1e3) / read, 4),
        }


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    read = bandwidth(device, args.repeats)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for model in args.models:
        config = SHAPES[model]
        cases = [(b, c, r) for b in args.batch for c in args.context for r in args.rows]
        fitting = [case for case in cases if fits(case, config, device)]
        skipped += [
            dict(zip(("model", "batch", "context", "rows"), (model, *c), strict=True))
            for c in cases
            if c not in fitting
        ]
        for tile in args.tiles if fitting else ():
            lab = Lab(config, max(map(blocks_of, fitting)), device, tile)
            for case in fitting:
                rows += [{"model": model, "tile": tile} | row for row in measure_case(lab, case, read, args.repeats)]
            del lab
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {"copy_gb_per_s": round(read / 1e9, 1), "rows": rows, "skipped": skipped}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: interpreted, with --tiny only")
    parser.add_argument("--tiny", action="store_true", help="a model and cases that only show that it runs")
    parser.add_argument("--models", nargs="+", default=["1b", "8b"], choices=["1b", "8b"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32, 128])
    parser.add_argument("--context", nargs="+", type=int, default=[1024, 8192])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 5], help="1: a plain step, 5: verify 4 draft tokens")
    parser.add_argument("--tiles", nargs="+", type=int, default=[64])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not triton_is_installed():
        sys.stderr.write("triton is not installed; it comes with torch for CUDA. Nothing was measured.\n")
        return 1
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            "torch sees no CUDA device, so there is nothing to measure; --device cpu --tiny is a smoke test.\n"
        )
        return 1
    if args.device == "cpu" and not args.tiny:
        sys.stderr.write("The interpreter's times mean nothing; on a CPU give --tiny.\n")
        return 1
    if args.tiny:
        args.models, args.batch, args.context, args.rows, args.tiles, args.repeats = (
            ["tiny"],
            [2],
            [40],
            [1, 3],
            [16],
            1,
        )
    device = torch.device(args.device)
    with torch.inference_mode():
        measured = measure(args, device)
    result = {
        "command": " ".join(["python", "bench/gpu.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter",
        "torch": torch.__version__,
        **measured,
    }
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
