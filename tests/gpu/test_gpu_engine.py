"""The laws on the GPU path: on a CUDA device with captured graphs, on the CPU through interpreter and plain buffers."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu.accelerator import CUDA, interpret, needs_triton
from gpu.cases import MIXED, Ask, blocks_needed, forest
from gpu.engines import SMALL_BUCKETS, build, greedy, paged
from lab import CACHES, TARGET, CacheKind, dense, make_requests

from steeple.cache.batch import Span, make_batch
from steeple.engine.engine import Engine
from steeple.model.graphs import step_graphs
from steeple.model.run import Runner
from steeple.ops.attention import ReferenceAttention
from steeple.ops.triton_attention import TritonAttention
from steeple.request import Request
from steeple.types import Batch, SamplingParams

pytestmark = needs_triton
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device: the GPU path is not tested on one")]
# Where there is a GPU nothing is interpreted, and compiled kernels do not run on a CPU.
cpu = pytest.mark.skipif(CUDA, reason="a GPU is there: its tests are the better ones")
DEVICES = [pytest.param("cpu", marks=cpu), pytest.param("cuda", marks=gpu)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REQUESTS = {"cpu": 3, "cuda": 8}  # the interpreter is slow


@functools.cache
def attention(device: str) -> TritonAttention:
    interpret()
    return TritonAttention(device) if device == "cuda" else TritonAttention("cpu", tile=16, split=32)


@functools.cache
def plain(device: str, dtype: str) -> list[list[int]]:
    """One request at a time, one token a step, without graphs."""
    if device == "cpu":  # the interpreted kernels differ from these in rounding, not in tokens
        return greedy(build("none", ReferenceAttention(), batch_size=1), REQUESTS["cpu"])
    engine = build("none", attention(device), device=device, dtype=DTYPES[dtype], batch_size=1)
    return greedy(engine, REQUESTS[device])


def step(asks: tuple[Ask, ...], kind: CacheKind, device: str) -> Batch:
    numbers = np.random.default_rng(len(asks))
    free = numbers.permutation(kind.blocks).tolist()
    spans = []
    for number, ask in enumerate(asks):
        held = [free.pop() for _ in range(blocks_needed([ask], kind.block_size))]
        spans.append(Span(f"r{number}", ask.cached, numbers.integers(11, size=ask.text), held))
    draft = forest(asks)
    draft.tokens.copy_(torch.from_numpy(numbers.integers(11, size=draft.tokens.shape[0])))
    return make_batch(spans, replace(draft, tokens=draft.tokens.to(device)), kind.block_size, device)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_forward_equals_the_reference_on_the_cpu(device: str, graphs: bool) -> None:
    kind = CacheKind(block_size=8, blocks=90)
    decoder = copy.deepcopy(TARGET).to(device)
    theirs, scratch = paged(decoder, attention(device), kind)
    runner = Runner(decoder, theirs, attention(device))
    runner.whole = None
    if graphs:
        runner.whole = step_graphs(decoder, theirs, attention(device), scratch=scratch, buckets=(4, 16, 32))
    reference = Runner(TARGET, paged(TARGET, ReferenceAttention(), kind)[0], ReferenceAttention())
    reference.whole = None
    # Twice, with a shorter step between, so that a recorded graph is replayed over the remains of another.
    for asks in (MIXED[2:7], (Ask(9, 1),), MIXED[2:7]):
        want = reference.forward(step(asks, kind, "cpu"), keep=(0,))
        got = runner.forward(step(asks, kind, device), keep=(0,))
        torch.testing.assert_close(got.final_TD.cpu(), want.final_TD, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.kept[0].cpu(), want.kept[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("graphs", [(), SMALL_BUCKETS], ids=["eager", "graphs"])
@pytest.mark.parametrize("row", ["none", "ngram", "small_lm", "drawn_tree"])
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_output_is_that_of_plain_decoding(device: str, row: str, graphs: tuple[int, ...]) -> None:
    if device == "cpu" and (row in ("none", "small_lm")) == bool(graphs):
        pytest.skip("the interpreter is slow: half of the cells")
    engine = build(row, attention(device), device=device, graphs=graphs)
    assert greedy(engine, REQUESTS[device]) == plain(device, "float32")


def check_cached(engine: Engine, request: Request) -> int:
    """Compare with the slow truth on the CPU; returns positions seen."""
    size, at = engine.cache.block_size, torch.arange(request.cached)
    slots = torch.tensor(list(engine.cache.table(request.id)), dtype=torch.int64)[at // size] * size + at % size
    _, keys, values = dense(TARGET, request.tokens[: request.cached].tolist())
    for layer, want in enumerate(zip(keys, values, strict=True)):
        found = engine.parts.attention.read_kv(*engine.cache.layer(layer), slots)
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x.cpu(), y, atol=1e-4, rtol=1e-4)
    return request.cached


@pytest.mark.parametrize("device", DEVICES)
def test_the_cache_equals_recomputation(device: str) -> None:
    """Refusals and moves: what the cache holds after every step is what a fresh forward over the text computes."""
    params = SamplingParams(max_tokens=6 if device == "cpu" else 30, temperature=1.0)
    engine = build("drawn_tree", attention(device), device=device, kind=CACHES["tiny_blocks"], graphs=SMALL_BUCKETS)
    requests = make_requests([[3, 1, 4], [1, 5]], params, seeds=True)
    for request in requests:
        engine.add(request)
    seen = 0
    while not engine.idle:
        engine.step()
        seen += sum(check_cached(engine, request) for request in requests if engine.cache.has(request.id))
    assert seen > 10


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device: bfloat16 determinism is not tested on one")
@pytest.mark.parametrize("graphs", [(), SMALL_BUCKETS], ids=["eager", "graphs"])
def test_bfloat16_attention_depends_on_no_neighbour(graphs: tuple[int, ...]) -> None:
    """Attention alone; that linear layers round alike for any number of rows is the deterministic mode's promise."""
    heads, kind = (TARGET.config.num_heads, TARGET.config.head_dim), CacheKind(block_size=8, blocks=90)
    cache = torch.randn(2, kind.blocks, 1, 8, heads[1], device="cuda").bfloat16()
    alone = step((Ask(70, 1),), kind, "cuda")
    q = torch.randn(1, *heads, device="cuda").bfloat16()
    want = attention("cuda")(q, *cache, alone.layout, scale=0.3)
    for rows in (2, 17, 64):
        many = step((Ask(70, 1), *[Ask(3, 1)] * (rows - 1)), kind, "cuda")
        same = alone.layout.blocks.tolist() == many.layout.blocks[: alone.layout.blocks.shape[0]].tolist()
        assert same, "the first request must lie in the same blocks"
        got = attention("cuda")(q.expand(rows, *heads).contiguous(), *cache, many.layout, scale=0.3)
        assert torch.equal(got[:1], want)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device: bfloat16 graphs are not tested on one")
def test_bfloat16_output_is_the_same_run_after_run() -> None:
    runs = [
        greedy(build("ngram", attention("cuda"), device="cuda", dtype=torch.bfloat16, graphs=SMALL_BUCKETS))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
