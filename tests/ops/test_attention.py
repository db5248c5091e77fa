"""Paged attention: the reference against a dense row-by-row computation, the native twin against the reference."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from steeple.errors import InternalError
from steeple.ops.attention import PagedAttention, ReferenceAttention, move_kv, paged_attention, write_kv
from steeple.ops.native import THIS_MACHINE, build, compiler
from steeple.ops.native_attention import NativeAttention
from steeple.types import KVLayout

needs_compiler = pytest.mark.skipif(not compiler(), reason="no C++ compiler: native attention not tested")


@dataclass
class Request:
    """``cached`` positions, then ``text`` rows, then a node per entry of ``parents`` (-1 = the newest text)."""

    cached: int
    text: int
    parents: list[int] = field(default_factory=list)
    shared: int = 0  # leading blocks taken from the request before


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32


@dataclass
class Case:
    """A step: inputs, and for every row the (slot, rotary position) of what it sees and its own rotary position."""

    q: Tensor
    keys: Tensor
    values: Tensor
    layout: KVLayout
    seen: list[list[tuple[int, int]]]
    rotary: list[int]


def path(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [*path(parents, parents[node]), node]


def make(requests: list[Request], shape: Shape, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    size = shape.block_size
    lengths = [r.cached + r.text + len(r.parents) for r in requests]
    free = rng.permutation(sum(-(-length // size) for length in lengths) + 3).tolist()
    tables: list[list[int]] = []
    rows: dict[str, list[int]] = {"prefix": [], "ancestors": [], "positions": []}
    seen: list[list[tuple[int, int]]] = []
    for request, length in zip(requests, lengths, strict=True):
        table = tables[-1][: request.shared] if request.shared else []
        table = table + [free.pop() for _ in range(-(-length // size) - len(table))]
        tables.append(table)
        text_len = request.cached + request.text
        slots = [table[s // size] * size + s % size for s in range(length)]
        for position in range(request.cached, text_len):
            rows["prefix"].append(position + 1)
            rows["ancestors"].append(0)
            rows["positions"].append(position)
            seen.append([(slots[s], s) for s in range(position + 1)])
        for node in range(len(request.parents)):
            way = path(request.parents, node)
            rows["prefix"].append(text_len)
            rows["ancestors"].append(sum(1 << j for j in way))
            rows["positions"].append(text_len + len(way) - 1)
            above = [(slots[text_len + j], text_len + depth) for depth, j in enumerate(way)]
            seen.append([(slots[s], s) for s in range(text_len)] + above)
    counts = np.array([r.text + len(r.parents) for r in requests])
    cu_rows = np.concatenate(([0], counts.cumsum()))
    layout = KVLayout(
        cu_rows=ints(cu_rows),
        blocks=ints([b for table in tables for b in table]),
        cu_blocks=ints(np.concatenate(([0], np.cumsum([len(t) for t in tables])))),
        block_size=size,
        prefix=ints(rows["prefix"]),
        ancestors=torch.tensor(rows["ancestors"], dtype=torch.int64),
        text_len=ints([r.cached + r.text for r in requests]),
        positions=ints(rows["positions"]),
        node_row=ints(cu_rows[:-1] + [r.text for r in requests]),
    )
    generator = torch.Generator().manual_seed(seed)
    cache_shape = (sum(-(-n // size) for n in lengths) + 3, shape.kv_heads, size, shape.head_dim)
    keys, values = (torch.randn(cache_shape, generator=generator).to(shape.dtype) for _ in range(2))
    q = torch.randn((int(cu_rows[-1]), shape.heads, shape.head_dim), generator=generator).to(shape.dtype)
    return Case(q, keys, values, layout, seen, rows["positions"])


def ints(values: object) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int32))


def dense(case: Case, scale: float, window: int, softcap: float) -> Tensor:
    """Row by row, head by head, in float64, straight from the definition."""
    T, N, H = case.q.shape
    K, S = case.keys.shape[1:3]
    out = torch.zeros(T, N, H, dtype=torch.float64)
    for t in range(T):
        slots = torch.tensor([s for s, p in case.seen[t] if not window or case.rotary[t] - p < window])
        for n in range(N):
            k, v = (x[slots // S, n // (N // K), slots % S].double() for x in (case.keys, case.values))
            scores = k @ case.q[t, n].double() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[t, n] = scores.softmax(0) @ v
    return out


TREE = [-1, -1, 0, 0, 1, 2, 2, 3, 5, -1, 9]
MIXED = [
    Request(0, 21),  # a prompt
    Request(37, 13),  # a chunk of one, with a cached prefix
    Request(70, 1),  # plain decoding
    Request(5, 0),  # nothing to do in this step
    Request(64, 1, [-1, 0, 1, 2, 3]),  # a chain
    Request(90, 1, TREE, shared=2),
    Request(0, 1, [-1, -1]),
    Request(130, 3, [-1, 0, 0, 1, 1, 2, 2, -1]),
]
CHAIN = list(range(-1, 62))
LONG = [Request(1100, 1, TREE), Request(600, 70), Request(510, 1, CHAIN), Request(535, 1, CHAIN)]
SHAPES = [
    Shape(4, 4, 16),
    Shape(4, 2, 32, 8),
    Shape(6, 2, 64, 32),
    Shape(2, 1, 80),
    Shape(3, 3, 96, 8),
    Shape(8, 1, 128),
    Shape(2, 2, 256),
    Shape(4, 2, 20),
    Shape(71, 1, 16),
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 1, 3, 40])
@pytest.mark.parametrize("shape", [Shape(4, 2, 32, 8), Shape(3, 3, 16), Shape(4, 1, 16, 32)])
def test_the_reference_is_dense_attention(shape: Shape, window: int, softcap: float) -> None:
    case = make(MIXED, shape)
    out = paged_attention(case.q, case.keys, case.values, case.layout, scale=0.3, window=window, softcap=softcap)
    torch.testing.assert_close(out.double(), dense(case, 0.3, window, softcap), atol=2e-5, rtol=1e-5)


def test_the_reference_tiles_long_prompts() -> None:
    case = make([Request(10, 600)], Shape(1, 1, 16))
    out = paged_attention(case.q, case.keys, case.values, case.layout, scale=0.3)
    torch.testing.assert_close(out.double(), dense(case, 0.3, 0, 0.0), atol=2e-5, rtol=1e-5)


def machines() -> list[tuple[str, ...]]:
    """Flags of the instruction sets that this processor has: its own, and the lesser ones it would run."""
    known = [THIS_MACHINE, ()]
    has_avx2 = platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if has_avx2:
        known.append(("-mavx2", "-mfma"))
    return known


@pytest.fixture(scope="module", params=machines(), ids=lambda flags: "".join(flags) or "portable")
def native(request: pytest.FixtureRequest) -> NativeAttention:
    made = build(machine=request.param)
    if made.path is None:
        pytest.skip(f"native attention cannot be built: {made.reason}")
    return NativeAttention(made.path)


def assert_twins(native: PagedAttention, case: Case, **options: float) -> None:
    got = native(case.q, case.keys, case.values, case.layout, scale=0.2, **options)  # type: ignore[arg-type]
    want = paged_attention(case.q, case.keys, case.values, case.layout, scale=0.2, **options)  # type: ignore[arg-type]
    assert got.dtype == case.q.dtype
    tolerance = 2e-5 if case.q.dtype == case.keys.dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


OPTIONS: list[dict[str, float]] = [{}, {"window": 1}, {"window": 3}, {"window": 200}, {"softcap": 4.0}]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_agrees_with_the_reference(native: NativeAttention, shape: Shape, dtype: torch.dtype) -> None:
    for options in OPTIONS:
        assert_twins(native, make(MIXED, replace(shape, dtype=dtype)), **options)


@needs_compiler
@pytest.mark.parametrize("count", [1, 2, 4])
def test_native_agrees_on_long_contexts(native: NativeAttention, count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    for dtype in (torch.float32, torch.bfloat16):
        for options in OPTIONS:
            assert_twins(native, make(LONG, Shape(4, 2, 32, dtype=dtype)), **options)


@needs_compiler
@pytest.mark.parametrize("seed", range(12))
def test_native_agrees_on_random_batches(native: NativeAttention, seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(rng.integers(1, 6)):
        parents = [int(rng.integers(-1, j)) if j else -1 for j in range(rng.integers(0, 30))]
        requests.append(Request(int(rng.integers(0, 700)), int(rng.integers(1 if parents else 0, 40)), parents))
    group, kv_heads = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    dtype = torch.bfloat16 if seed % 2 else torch.float32
    shape = Shape(group * kv_heads, kv_heads, int(rng.choice([16, 32, 48, 64])), int(rng.choice([8, 16, 32])), dtype)
    window, softcap = int(rng.choice([0, 2, 100])), float(rng.choice([0.0, 3.0]))
    assert_twins(native, make(requests, shape, seed), window=window, softcap=softcap)


@needs_compiler
def test_query_and_cache_may_differ_in_dtype(native: NativeAttention) -> None:
    for q_dtype, kv_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        case = make(MIXED, Shape(4, 2, 32, dtype=kv_dtype))
        case.q = case.q.to(q_dtype)
        assert_twins(native, case)


@needs_compiler
def test_an_odd_head_dim_goes_to_the_reference(native: NativeAttention) -> None:
    assert_twins(native, make(MIXED, Shape(2, 1, 15, dtype=torch.bfloat16)))


@needs_compiler
def test_rows_may_be_strided(native: NativeAttention) -> None:
    case = make(MIXED, Shape(4, 2, 32))
    fused = torch.randn(case.q.shape[0], 8, 32)
    case.q = fused[:, :4]
    assert_twins(native, case)


@needs_compiler
def test_large_scores_do_not_overflow(native: NativeAttention) -> None:
    case = make(MIXED, Shape(4, 2, 32))
    case.q = case.q * 3000
    got = native(case.q, case.keys, case.values, case.layout, scale=1.0)
    want = paged_attention(case.q, case.keys, case.values, case.layout, scale=1.0)
    torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_its_own_keys_alone(
    native: NativeAttention, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """Bit for bit: alone or in a batch, one token at a time or as a chain, on one thread or four."""
    prompt, decode = [Request(1400, 40)], [Request(1400, 1, list(range(-1, 38)))]
    shape = Shape(4, 2, 64, dtype=dtype)
    whole = make(prompt, shape)
    threads(1)
    want = native(whole.q, whole.keys, whole.values, whole.layout, scale=0.2)
    for count in (2, 4):
        threads(count)
        assert torch.equal(native(whole.q, whole.keys, whole.values, whole.layout, scale=0.2), want)
    chain = make(decode, shape)
    assert torch.equal(chain.layout.blocks, whole.layout.blocks)
    assert torch.equal(native(whole.q, whole.keys, whole.values, chain.layout, scale=0.2), want)
    for row in (0, 17, 39):
        alone = make([Request(1400 + row, 1)], shape).layout
        blocks = whole.layout.blocks[: alone.blocks.shape[0]]
        got = native(whole.q[row : row + 1], whole.keys, whole.values, replace(alone, blocks=blocks), scale=0.2)
        assert torch.equal(got[0], want[row])


def backends() -> list[PagedAttention]:
    made = build() if compiler() else None
    return [ReferenceAttention(), *([NativeAttention(made.path)] if made and made.path else [])]


@pytest.mark.parametrize("backend", backends(), ids=lambda b: type(b).__name__)
class TestBothTwins:
    def test_a_row_that_sees_nothing_gives_zeros(self, backend: PagedAttention) -> None:
        case = make([Request(20, 2)], Shape(2, 1, 16))
        layout = replace(case.layout, prefix=ints([0, 22]))
        out = backend(case.q, case.keys, case.values, layout, scale=0.2)
        assert torch.equal(out[0], torch.zeros(2, 16))
        assert out[1].abs().min() > 0

    def test_an_unseen_key_adds_nothing_however_large(self, backend: PagedAttention) -> None:
        case = make([Request(20, 5)], Shape(2, 1, 16))
        want = backend(case.q, case.keys, case.values, case.layout, scale=0.2)
        block = int(case.layout.blocks[1])
        case.values[block, :, 21 % 16] = 3e38
        got = backend(case.q, case.keys, case.values, case.layout, scale=0.2)
        assert torch.equal(got[0], want[0])
        assert got[1].abs().min() > 1e30

    def test_an_empty_step(self, backend: PagedAttention) -> None:
        case = make([Request(20, 0)], Shape(2, 1, 16))
        assert backend(case.q, case.keys, case.values, case.layout, scale=0.2).shape == (0, 2, 16)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_write_puts_every_row_in_its_slot(self, backend: PagedAttention, dtype: torch.dtype) -> None:
        keys, values = torch.zeros(2, 5, 3, 8, 4, dtype=dtype).unbind(0)
        fused = torch.randn(6, 9, 4).to(dtype)
        slots = torch.tensor([39, 0, 7, 8, 20, 13])
        backend.write_kv(keys, values, slots, fused[:, 3:6], fused[:, 6:])
        for cache, rows in ((keys, fused[:, 3:6]), (values, fused[:, 6:])):
            for t, slot in enumerate(slots.tolist()):
                assert torch.equal(cache[slot // 8, :, slot % 8], rows[t])
            assert int((cache != 0).sum()) == 6 * 3 * 4

    def test_write_narrows_to_the_cache(self, backend: PagedAttention) -> None:
        keys, values = torch.zeros(2, 1, 1, 8, 4, dtype=torch.bfloat16).unbind(0)
        k = torch.randn(1, 1, 4)
        backend.write_kv(keys, values, torch.tensor([3]), k, k)
        assert torch.equal(keys[0, 0, 3], k[0, 0].bfloat16())

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda c: setattr(c, "keys", c.keys.transpose(2, 3).contiguous().transpose(2, 3)),
            lambda c: setattr(c, "q", c.q.transpose(0, 1).contiguous().transpose(0, 1)),
            lambda c: setattr(c, "q", c.q.half()),
            lambda c: setattr(c, "q", c.q[:-1]),
            lambda c: setattr(c, "q", torch.cat((c.q, c.q[:, :1]), dim=1)),
            lambda c: setattr(c, "values", c.values.bfloat16()),
            lambda c: setattr(c, "layout", replace(c.layout, block_size=8)),
            lambda c: setattr(c, "layout", replace(c.layout, prefix=c.layout.prefix.long())),
            lambda c: setattr(c, "layout", replace(c.layout, ancestors=c.layout.ancestors.int())),
            lambda c: setattr(c, "layout", replace(c.layout, cu_rows=c.layout.cu_rows[:-1])),
        ],
    )
    def test_what_breaks_the_contract_raises(self, backend: PagedAttention, spoil: Callable[[Case], None]) -> None:
        case = make(MIXED, Shape(4, 2, 32))
        spoil(case)
        with pytest.raises(InternalError, match="Paged attention"):
            backend(case.q, case.keys, case.values, case.layout, scale=0.2)


@needs_compiler
def test_native_reads_and_writes_only_inside_the_cache(native: NativeAttention) -> None:
    case = make(MIXED, Shape(4, 2, 32))
    outside = case.layout.blocks.clone()
    outside[0] = case.keys.shape[0]
    longer = case.layout.prefix.clone()
    longer[0] = 40  # beyond its own two blocks, among those of the next request
    short = replace(case.layout, prefix=longer)
    falling = case.layout.cu_rows.clone()
    falling[1] = 2**20
    for layout in (replace(case.layout, blocks=outside), short, replace(case.layout, cu_rows=falling)):
        with pytest.raises(InternalError, match="Paged attention"):
            native(case.q, case.keys, case.values, layout, scale=0.2)
    k = torch.zeros(1, 2, 32)
    for slot in (-1, case.keys.shape[0] * 16):
        with pytest.raises(InternalError, match="outside"):
            native.write_kv(case.keys, case.values, torch.tensor([slot]), k, k)


def test_move_reads_all_before_it_writes() -> None:
    keys, values = torch.randn(2, 3, 2, 4, 5).unbind(0)
    before, before_values = keys.clone(), values.clone()
    move_kv(keys, values, torch.tensor([6, 9, 5]), torch.tensor([5, 6, 9]))
    for cache, old in ((keys, before), (values, before_values)):
        assert torch.equal(cache[1, :, 1], old[1, :, 2])
        assert torch.equal(cache[1, :, 2], old[2, :, 1])
        assert torch.equal(cache[2, :, 1], old[1, :, 1])
        assert int((cache != old).any(-1).sum()) == 6


def test_write_kv_checks_shapes() -> None:
    keys, values = torch.zeros(2, 5, 3, 8, 4).unbind(0)
    k = torch.zeros(2, 3, 4)
    for slots, rows in (
        (torch.tensor([1, 2, 3]), k),
        (torch.tensor([1, 2]).int(), k),
        (torch.tensor([1, 2]), k[:, :2]),
    ):
        with pytest.raises(InternalError):
            write_kv(keys, values, slots, rows, rows)
