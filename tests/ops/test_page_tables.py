"""Block tables for every layer and head, and the scores of pages: what a sparse view of the cache stands on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_attention import (
    CHAIN,
    LONG,
    MIXED,
    TREE,
    Case,
    Request,
    Shape,
    backends,
    cache_of,
    ints,
    make,
    native,
    needs_compiler,
    threads,
)
from torch import Tensor

from steeple.errors import InternalError
from steeple.ops.attention import PagedAttention, ReferenceAttention
from steeple.ops.native_attention import NativeAttention
from steeple.types import KVLayout

__all__ = ["native", "threads"]  # fixtures

OPTIONS: list[dict[str, float]] = [{}, {"window": 3}, {"window": 200, "softcap": 4.0}]
GATHERED = [Shape(4, 2, 32, 4), Shape(6, 3, 34, 20), Shape(2, 2, 20, 1)]
SHAPES = [Shape(4, 4, 16), Shape(8, 2, 64, 32), Shape(3, 3, 96, 8), Shape(71, 1, 16), *GATHERED]


def run(backend: PagedAttention, case: Case, page_scores: Tensor | None = None, **options: float) -> Tensor:
    out: Tensor = backend(
        case.q, *cache_of(backend, case), case.layout, scale=0.2, page_scores=page_scores, **options  # type: ignore[arg-type]
    )  # fmt: skip
    return out


def with_own_tables(case: Case, *, gap: int = 0) -> Case:
    """The same step with the blocks of every head shuffled by themselves; ``gap`` entries between two tables."""
    P, K = case.keys.shape[:2]
    keys, values, tables = torch.empty_like(case.keys), torch.empty_like(case.values), []
    nowhere = torch.full((gap,), P, dtype=torch.int32)
    for head in range(K):
        to = torch.from_numpy(np.random.default_rng(head).permutation(P))
        keys[to, head], values[to, head] = case.keys[:, head], case.values[:, head]
        tables += [to[case.layout.blocks.long()].int(), nowhere]
    stride = case.layout.blocks.shape[0] + gap
    layout = replace(case.layout, blocks=torch.cat(tables[:-1]), head_stride=stride)
    return replace(case, keys=keys, values=values, layout=layout)


def scores_of(case: Case) -> Tensor:
    """Room for the scores of a step, full of what is no score."""
    return torch.full((case.keys.shape[1], int(case.layout.cu_blocks[-1])), 7.0)


def dense_scores(case: Case, scale: float, window: int = 0, softcap: float = 0.0) -> Tensor:
    """Straight from the definition, row by row in float64."""
    (_, K, S, _), N = case.keys.shape, case.q.shape[1]
    out = torch.full((K, int(case.layout.cu_blocks[-1])), -np.inf, dtype=torch.float64)
    for b, last in enumerate(case.layout.cu_rows.tolist()[1:]):
        for t in range(max(int(case.layout.cu_rows[b]), last - max(1, 64 // (N // K))), last):
            seen = [(s, p) for s, p in case.seen[t] if not window or case.rotary[t] - p < window]
            slots, page = torch.tensor([s for s, _ in seen]), torch.tensor([p // S for _, p in seen])
            k = case.keys[slots // S, :, slots % S].double().repeat_interleave(N // K, 1)
            scores = (k * case.q[t].double()).sum(-1) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            most = scores.view(-1, K, N // K).amax(-1).T
            pages = out[:, case.layout.cu_blocks[b] :]
            pages.scatter_reduce_(1, page.expand(K, -1), most, "amax")
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", backends(), ids=lambda b: type(b).__name__)
def test_tables_of_heads_give_the_same_bits(backend: PagedAttention, shape: Shape, dtype: torch.dtype) -> None:
    case = make(MIXED, replace(shape, dtype=dtype))
    for options in OPTIONS:
        want_scores, got_scores = scores_of(case), scores_of(case)
        want = run(backend, case, want_scores, **options)
        assert torch.equal(run(backend, with_own_tables(case, gap=3), got_scores, **options), want)
        assert torch.equal(got_scores, want_scores)


@needs_compiler
@pytest.mark.parametrize("shape", [Shape(6, 3, 32), Shape(6, 3, 32, 20)], ids=str)
def test_tables_of_heads_and_many_threads(
    native: NativeAttention, shape: Shape, threads: Callable[[int], None]
) -> None:
    """Split by heads, by positions, or not at all: the same bits, alone or beside others."""
    case = make(LONG, shape)
    own = with_own_tables(case)
    threads(1)
    want_scores = scores_of(case)
    want = run(native, case, want_scores)
    for count in (1, 4, 16):
        threads(count)
        scores = scores_of(case)
        assert torch.equal(run(native, own), want)
        assert torch.equal(run(native, own, scores), want)
        assert torch.equal(scores, want_scores)


@pytest.mark.parametrize("backend", backends(), ids=lambda b: type(b).__name__)
class TestTables:
    def spoiled(self, **changes: object) -> Case:
        case = with_own_tables(make(MIXED, Shape(4, 2, 32)))
        return replace(case, layout=replace(case.layout, **changes))

    def test_of_every_layer(self, backend: PagedAttention) -> None:
        first, second = (with_own_tables(make(MIXED, Shape(4, 2, 32), seed), gap=seed) for seed in (0, 5))
        blocks = torch.cat((first.layout.blocks, second.layout.blocks))
        whole = replace(second.layout, blocks=blocks, layer_stride=first.layout.blocks.shape[0])
        layout = whole.of_layer(1)
        assert layout.blocks.data_ptr() == blocks[whole.layer_stride :].data_ptr()
        assert layout.of_layer(1) is layout
        got = run(backend, replace(second, layout=layout))
        assert torch.equal(got, run(backend, second))
        with pytest.raises(InternalError, match="of_layer"):
            run(backend, replace(second, layout=whole))
        with pytest.raises(InternalError, match="Paged attention"):
            run(backend, replace(second, layout=whole.of_layer(2)))

    def test_that_do_not_fit_are_refused(self, backend: PagedAttention) -> None:
        layout = self.spoiled().layout
        for changes in (
            {"blocks": layout.blocks[:-1]},
            {"head_stride": layout.head_stride + 1},
            {"head_stride": -1},
        ):
            with pytest.raises(InternalError, match="Paged attention"):
                run(backend, self.spoiled(**changes))

    def test_scores_want_room_for_every_page(self, backend: PagedAttention) -> None:
        case = make(MIXED, Shape(4, 2, 32))
        right = scores_of(case)
        for room in (right[:, :-1].contiguous(), right[:1], right.double(), right.repeat(1, 2)[:, ::2]):
            with pytest.raises(InternalError, match="page_scores"):
                run(backend, case, room)

    def test_what_no_scored_row_sees_has_no_score(self, backend: PagedAttention) -> None:
        """Rows further back than a tile, what a window hides, room behind a request's blocks, requests without rows."""
        case = make([Request(10, 90), Request(40, 0), Request(100, 1)], Shape(2, 1, 16))
        blocks, cu = case.layout.blocks, case.layout.cu_blocks.tolist()
        roomy = torch.cat((blocks, blocks.new_zeros(2)))
        layout = replace(case.layout, blocks=roomy, cu_blocks=ints([*cu[:-1], cu[-1] + 2]))
        scores = torch.full((1, cu[-1] + 2), 7.0)
        run(backend, replace(case, layout=layout), scores, window=10)
        seen = (scores[0] > -np.inf).tolist()
        # Rows 68..99 of the first request see positions 59..99, the one row of the last 91..100; pages hold 16.
        assert seen == [False] * 3 + [True] * 4 + [False] * 3 + [False] * 5 + [True] * 2 + [False] * 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [Shape(4, 2, 32, 8), Shape(3, 3, 16), Shape(4, 1, 16, 20)], ids=str)
def test_the_reference_scores_are_the_definition(shape: Shape, options: dict[str, float]) -> None:
    case = make([*MIXED, Request(30, 70, [-1, 0, 0, 2])], shape)
    scores = scores_of(case)
    run(ReferenceAttention(), case, scores, **options)
    torch.testing.assert_close(scores.double(), dense_scores(case, 0.2, **options), atol=2e-5, rtol=1e-5)  # type: ignore[arg-type]


def assert_scores(native: PagedAttention, case: Case, **options: float) -> None:
    got, want = scores_of(case), scores_of(case)
    with_scores = run(native, case, got, **options)
    assert torch.equal(with_scores, run(native, case, **options)), "asking for scores changed the result"
    run(ReferenceAttention(), case, want, **options)
    tolerance = 1e-5 if case.q.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_scores_are_the_references(native: NativeAttention, shape: Shape, dtype: torch.dtype) -> None:
    case = make([*MIXED, Request(10, 150)], replace(shape, dtype=dtype))
    for options in OPTIONS:
        assert_scores(native, case, **options)


@needs_compiler
@pytest.mark.parametrize("block_size", [16, 128, 20])
def test_native_scores_of_long_contexts(
    native: NativeAttention, block_size: int, threads: Callable[[int], None]
) -> None:
    """Several splits, pages that hold several chunks or lie across two splits, many threads."""
    requests = [Request(1500, 1, TREE), Request(600, 70), Request(505, 1, CHAIN)]
    for count in (1, 16):
        threads(count)
        for dtype in (torch.float32, torch.bfloat16):
            for options in OPTIONS:
                assert_scores(native, make(requests, Shape(4, 2, 32, block_size, dtype)), **options)


@needs_compiler
def test_native_heads_read_only_inside_their_tables(native: NativeAttention) -> None:
    """A head's own block outside the cache, or a row that sees beyond its request's part of it."""
    for shape in (Shape(4, 2, 32), Shape(4, 2, 32, 20)):
        case = with_own_tables(make(MIXED, shape))
        keys, values = cache_of(native, case)
        outside, longer = case.layout.blocks.clone(), case.layout.prefix.clone()
        outside[case.layout.head_stride] = case.keys.shape[0]
        longer[0] = 60
        layouts: list[KVLayout] = [replace(case.layout, blocks=outside), replace(case.layout, prefix=longer)]
        for layout in layouts:
            with pytest.raises(InternalError, match="outside the cache"):
                native(case.q, keys, values, layout, scale=0.2)
