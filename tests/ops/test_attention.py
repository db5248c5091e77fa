"""Paged attention: the reference against a dense row-by-row computation, the native twin against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from steeple.errors import InternalError
from steeple.ops.attention import PagedAttention, ReferenceAttention, paged_attention
from steeple.ops.native import LEVELS, build, compiler, level
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
    """A step: inputs, and for every row the (slot, rotary position) of what it sees and its own rotary position.

    ``keys`` and ``values`` are ``[P, K, S, H]``; ``attend`` brings them into the order of a backend.
    """

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


def cache_of(backend: PagedAttention, case: Case) -> tuple[Tensor, Tensor]:
    P, K, S, H = case.keys.shape
    keys, values = (x[0] for x in backend.allocate(1, P, K, S, H, case.keys.dtype, "cpu"))
    rows = [x.transpose(1, 2).reshape(P * S, K, H) for x in (case.keys, case.values)]
    backend.write_kv(keys, values, torch.arange(P * S), *rows)
    return keys, values


def attend(
    backend: PagedAttention, case: Case, layout: KVLayout | None = None, *, scale: float = 0.2, **options: float
) -> Tensor:
    return backend(case.q, *cache_of(backend, case), layout or case.layout, scale=scale, **options)  # type: ignore[arg-type]


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
    Shape(4, 2, 32, 4),
    Shape(2, 1, 20, 1),
    Shape(2, 2, 34, 20),
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
    names = list(LEVELS)
    return [LEVELS[name].flags for name in names[names.index(level()) :] if name != "native" or name == level()]


@pytest.fixture(scope="module", params=machines(), ids=lambda flags: "".join(flags) or "portable")
def native(request: pytest.FixtureRequest) -> NativeAttention:
    made = build(machine=request.param)
    if made.path is None:
        pytest.skip(f"native attention cannot be built: {made.reason}")
    return NativeAttention(made.path)


def assert_twins(native: PagedAttention, case: Case, **options: float) -> None:
    got = attend(native, case, **options)
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
    got = attend(native, case, scale=1.0)
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
    want = attend(native, whole)
    for count in (2, 4):
        threads(count)
        assert torch.equal(attend(native, whole), want)
    chain = make(decode, shape)
    assert torch.equal(chain.layout.blocks, whole.layout.blocks)
    assert torch.equal(attend(native, whole, chain.layout), want)
    for row in (0, 17, 39):
        alone = make([Request(1400 + row, 1)], shape).layout
        one = replace(whole, q=whole.q[row : row + 1])
        blocks = whole.layout.blocks[: alone.blocks.shape[0]]
        assert torch.equal(attend(native, one, replace(alone, blocks=blocks))[0], want[row])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 4, 1])
def test_a_path_of_a_tree_rounds_as_the_same_text(native: NativeAttention, dtype: torch.dtype, block_size: int) -> None:
    """Bit for bit: commit the path above a node, then ask for that node as text."""
    parents = [-1, 0, -1, 2, 1, 3, 4, 4, 5, 7, 9, 9, *([11] * 40), 51, 52, 53]
    requests = [Request(57, 1, parents), Request(509, 2, parents[:9]), Request(127, 1, parents)]
    case = make(requests, Shape(4, 2, 32, block_size, dtype))
    keys, values = cache_of(native, case)
    tables = case.layout.cu_blocks.tolist()
    for window in (0, 2, 64):
        options = {"scale": 0.2, "window": window}
        got = native(case.q, keys, values, case.layout, **options)  # type: ignore[arg-type]
        for b, request in enumerate(requests):
            table = case.layout.blocks[tables[b] : tables[b + 1]]
            first, text_len = int(case.layout.node_row[b]), request.cached + request.text
            for node in range(0, len(request.parents), 3):
                way = torch.tensor(path(request.parents, node))
                at = text_len + torch.stack((way, torch.arange(len(way))))
                source, target = table.long()[at // block_size] * block_size + at % block_size
                committed = keys.clone(), values.clone()
                native.move_kv(*committed, source.contiguous(), target.contiguous())
                text = make([Request(text_len + len(way) - 1, 1)], Shape(4, 2, 32, block_size, dtype)).layout
                text = replace(text, blocks=table[: text.blocks.shape[0]].contiguous())
                row = case.q[first + node : first + node + 1]
                want = native(row, *committed, text, **options)  # type: ignore[arg-type]
                assert torch.equal(got[first + node], want[0]), f"request {b}, node {node}, window {window}"


def backends() -> list[PagedAttention]:
    made = build(LEVELS[level()].flags) if compiler() else None
    return [ReferenceAttention(), *([NativeAttention(made.path)] if made and made.path else [])]


@pytest.mark.parametrize("backend", backends(), ids=lambda b: type(b).__name__)
class TestBothTwins:
    def test_a_row_that_sees_nothing_gives_zeros(self, backend: PagedAttention) -> None:
        case = make([Request(20, 2)], Shape(2, 1, 16))
        layout = replace(case.layout, prefix=ints([0, 22]))
        out = attend(backend, case, layout)
        assert torch.equal(out[0], torch.zeros(2, 16))
        assert out[1].abs().min() > 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("large", [3e38, float("inf"), float("nan")])
    @pytest.mark.parametrize(("block_size", "position"), [(16, 21), (16, 22), (4, 21)])
    def test_an_unseen_key_adds_nothing_however_large(
        self, backend: PagedAttention, large: float, dtype: torch.dtype, block_size: int, position: int
    ) -> None:
        """What a row does not see may be anything: seen by later rows, by other branches, or left by somebody else."""
        tree = Request(20, 1, [-1, 0, 0, 1])
        case = make([Request(20, 5), tree], Shape(2, 1, 16, block_size, dtype))
        want = attend(backend, case)
        first = int(case.layout.cu_blocks[1])

        def slot(table: int, position: int) -> tuple[int, int]:
            return int(case.layout.blocks[table + position // block_size]), position % block_size

        seen_by_some, by_none = [slot(0, position), slot(first, 22)], [slot(0, position + 4), slot(first, 25)]
        for block, offset in seen_by_some + by_none:
            case.values[block, :, offset] = large
        for block, offset in by_none:
            case.keys[block, :, offset] = large
        got = attend(backend, case)
        unharmed = [0, 5, 6, 8]  # the first row of either request, node 0 and node 2
        close = 0.0 if isinstance(backend, NativeAttention) else 1e-2  # the reference adds in another order then
        torch.testing.assert_close(got[unharmed], want[unharmed], atol=close, rtol=0.0)
        harmed = got[[position - 20, 7]]
        assert not harmed.isfinite().all() or harmed.abs().max() > 1e30

    def test_an_empty_step(self, backend: PagedAttention) -> None:
        case = make([Request(20, 0)], Shape(2, 1, 16))
        assert attend(backend, case).shape == (0, 2, 16)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("block_size", "head_dim"), [(8, 4), (5, 6), (1, 4), (4, 3)])
    def test_what_is_written_is_read(
        self, backend: PagedAttention, dtype: torch.dtype, block_size: int, head_dim: int
    ) -> None:
        all_keys, all_values = backend.allocate(2, 5, 3, block_size, head_dim, dtype, "cpu")
        assert all_keys.nbytes == all_values.nbytes == 2 * 5 * 3 * block_size * head_dim * dtype.itemsize
        keys, values = all_keys[1], all_values[1]
        fused = torch.randn(4, 9, head_dim).to(dtype)
        slots = torch.tensor([5 * block_size - 1, 0, 2, 3])
        backend.write_kv(keys, values, slots, fused[:, 3:6], fused[:, 6:])
        everywhere = backend.read_kv(keys, values, torch.arange(5 * block_size))
        for read, again, rows in zip(
            everywhere, backend.read_kv(keys, values, slots), (fused[:, 3:6], fused[:, 6:]), strict=True
        ):
            assert torch.equal(read[slots], rows)
            assert torch.equal(again, rows)
            assert int((read != 0).sum()) == rows.numel(), "something else was written"
        assert not all_keys[0].any()
        assert not all_values[0].any()

    def test_write_narrows_to_the_cache(self, backend: PagedAttention) -> None:
        keys, values = (x[0] for x in backend.allocate(1, 1, 1, 8, 4, torch.bfloat16, "cpu"))
        k = torch.randn(1, 1, 4)
        slot = torch.tensor([3])
        backend.write_kv(keys, values, slot, k, -k)
        assert torch.equal(torch.stack(backend.read_kv(keys, values, slot)), torch.stack((k, -k)).bfloat16())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_move_reads_all_before_it_writes(self, backend: PagedAttention, dtype: torch.dtype) -> None:
        keys, values = (x[0] for x in backend.allocate(1, 3, 2, 4, 6, dtype, "cpu"))
        everywhere = torch.arange(12)
        k, v = torch.randn(2, 12, 2, 6).to(dtype)
        backend.write_kv(keys, values, everywhere, k, v)
        backend.move_kv(keys, values, torch.tensor([6, 9, 5]), torch.tensor([5, 6, 9]))
        for read, old in zip(backend.read_kv(keys, values, everywhere), (k, v), strict=True):
            want = old.clone()
            want[[5, 6, 9]] = old[[6, 9, 5]]
            assert torch.equal(read, want)

    @pytest.mark.parametrize(
        ("slots", "rows"),
        [(torch.tensor([1, 2, 3]), 3), (torch.tensor([1, 2]).int(), 3), (torch.tensor([1, 2]), 2)],
    )
    def test_write_checks_shapes(self, backend: PagedAttention, slots: Tensor, rows: int) -> None:
        keys, values = (x[0] for x in backend.allocate(1, 5, 3, 8, 4, torch.float32, "cpu"))
        k = torch.zeros(2, rows, 4)
        with pytest.raises(InternalError, match="Paged attention"):
            backend.write_kv(keys, values, slots, k, k)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda c: setattr(c, "q", c.q.transpose(0, 1).contiguous().transpose(0, 1)),
            lambda c: setattr(c, "q", c.q.half()),
            lambda c: setattr(c, "q", c.q[:-1]),
            lambda c: setattr(c, "q", torch.cat((c.q, c.q[:, :1]), dim=1)),
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
            attend(backend, case)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda keys, values: (keys, values.bfloat16()),
            lambda keys, values: (keys, values[:-1]),
            lambda keys, values: (keys[0], values[0]),
            lambda keys, values: (keys.transpose(0, 1).contiguous().transpose(0, 1), values),
        ],
    )
    def test_what_is_no_cache_raises(
        self, backend: PagedAttention, spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        case = make(MIXED, Shape(4, 2, 32))
        keys, values = spoil(*cache_of(backend, case))
        with pytest.raises(InternalError, match="Paged attention"):
            backend(case.q, keys, values, case.layout, scale=0.2)


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
    keys, values = cache_of(native, case)
    for layout in (replace(case.layout, blocks=outside), short, replace(case.layout, cu_rows=falling)):
        with pytest.raises(InternalError, match="Paged attention"):
            native(case.q, keys, values, layout, scale=0.2)
    k = torch.zeros(1, 2, 32)
    inside = torch.tensor([0])
    for slot in (torch.tensor([-1]), torch.tensor([case.keys.shape[0] * 16])):
        with pytest.raises(InternalError, match="outside"):
            native.write_kv(keys, values, slot, k, k)
        for places in ((slot, inside), (inside, slot)):
            with pytest.raises(InternalError, match="outside"):
                native.move_kv(keys, values, *places)
