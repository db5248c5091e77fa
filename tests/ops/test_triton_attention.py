"""The Triton kernels against the reference: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu.accelerator import CUDA, DEVICE, interpret, needs_triton
from gpu.cases import CHAIN, FEW, LONG, MIXED, Ask, Shape, Step, layout_of, make_step, random_asks

from steeple.errors import InternalError
from steeple.ops import triton_attention
from steeple.ops.attention import paged_attention
from steeple.ops.triton_attention import HeadShape, TritonAttention
from steeple.ops.triton_plan import ITEM, NO_TREE, Tiling, bit_length, make_plan

# Slow: the interpreter takes a minute, and triton comes with other libraries.
pytestmark = [needs_triton, pytest.mark.slow]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    interpret()


@pytest.fixture(scope="module")
def small(_kernels: None) -> TritonAttention:
    """Tiles and splits so short that little work crosses all their edges."""
    return TritonAttention(DEVICE, tile=32, split=64, programs=24)


def run(attention: TritonAttention, step: Step, **options: float) -> torch.Tensor:
    tensors = (x.to(DEVICE) for x in (step.q, step.keys, step.values))
    return attention(*tensors, step.layout, scale=0.2, **options).cpu()  # type: ignore[arg-type]


def assert_twins(attention: TritonAttention, step: Step, **options: float) -> None:
    got = run(attention, step, **options)
    exact = (x.float() for x in (step.q, step.keys, step.values))
    want = paged_attention(*exact, step.layout, scale=0.2, **options)  # type: ignore[arg-type]
    assert got.dtype == step.q.dtype
    tolerance = TOLERANCE[step.q.dtype if step.q.dtype == step.keys.dtype else torch.bfloat16]
    torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (Shape(4, 2, 32, 8, F32), {}),
        (Shape(4, 2, 32, 8, F32), {"window": 3}),
        (Shape(4, 2, 32, 8, F32), {"window": 40}),
        (Shape(4, 2, 32, 8, F32), {"softcap": 4.0}),
        (Shape(6, 2, 64, 16, BF16), {}),
        (Shape(4, 1, 16, 16, BF16), {"window": 17, "softcap": 3.0}),
        (Shape(3, 3, 20, 8, F16), {"window": 1}),
        (Shape(19, 1, 16, 32, F32), {}),
        (Shape(2, 2, 256, 16, F16), {"window": 64}),
    ],
    ids=str,
)
def test_it_agrees_with_the_reference(small: TritonAttention, shape: Shape, options: dict[str, float]) -> None:
    assert_twins(small, make_step(MIXED, shape), **options)


def test_the_tiles_of_a_gpu_agree_too() -> None:
    whole = TritonAttention(DEVICE, split=128, programs=64)
    assert_twins(whole, make_step(LONG, Shape(4, 2, 32, dtype=BF16)))
    assert_twins(whole, make_step(FEW, Shape(4, 2, 128)), window=100)


@pytest.mark.parametrize("seed", range(4))
def test_it_agrees_on_random_batches(small: TritonAttention, seed: int) -> None:
    rng = np.random.default_rng(seed)
    group, kv_heads = int(rng.integers(1, 5)), int(rng.integers(1, 3))
    shape = Shape(
        group * kv_heads, kv_heads, int(rng.choice([16, 48])), int(rng.choice([1, 8, 32])), (F32, BF16)[seed % 2]
    )
    window, softcap = int(rng.choice([0, 2, 70])), float(rng.choice([0.0, 3.0]))
    assert_twins(small, make_step(random_asks(rng, 100), shape, seed), window=window, softcap=softcap)


def test_queries_and_cache_may_differ_in_dtype(small: TritonAttention) -> None:
    """They are computed with in float32, so that only the result is rounded."""
    for q_dtype, kv_dtype in ((F32, BF16), (BF16, F32)):
        step = make_step(FEW, Shape(4, 2, 16, dtype=kv_dtype))
        step.q = step.q.to(q_dtype)
        want = paged_attention(step.q.float(), step.keys.float(), step.values.float(), step.layout, scale=0.2)
        close = (run(small, step).float() - want.to(q_dtype).float()).abs() < 1e-6
        assert close.float().mean() > 0.99


def test_rows_may_be_strided(small: TritonAttention) -> None:
    step = make_step(MIXED, Shape(4, 2, 16))
    step.q = torch.randn(step.q.shape[0], 8, 16)[:, 2:6]
    assert_twins(small, step)


def test_large_scores_do_not_overflow(small: TritonAttention) -> None:
    step = make_step(MIXED[:3], Shape(2, 2, 16))
    step.q = step.q * 3000
    got = run(small, step)
    want = paged_attention(step.q, step.keys, step.values, step.layout, scale=0.2)
    torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)
    assert run(small, step, softcap=5.0).isfinite().all()


def test_tables_of_heads_give_the_same_bits(small: TritonAttention) -> None:
    """The blocks of every head shuffled by themselves, with a gap between two tables, and more behind the last."""
    step = make_step(MIXED, Shape(6, 3, 16))
    keys, values, tables = torch.empty_like(step.keys), torch.empty_like(step.values), []
    for head in range(3):
        to = torch.from_numpy(np.random.default_rng(head).permutation(keys.shape[0]))
        keys[to, head], values[to, head] = step.keys[:, head], step.values[:, head]
        tables += [to[step.layout.blocks.long()].int(), torch.zeros(2, dtype=torch.int32)]
    layout = replace(step.layout, blocks=torch.cat(tables), head_stride=step.layout.blocks.shape[0] + 2)
    own = replace(step, keys=keys, values=values, layout=layout)
    want = run(small, step)
    assert torch.equal(run(small, own), want)
    known_by_contents = replace(own, layout=replace(layout, head_stride=0))
    assert not torch.equal(run(small, known_by_contents), want)
    place = small.place(HeadShape(6, 3, 16, F32, F32), 100, rows=200, table=200)
    assert torch.equal(run(small, replace(own, layout=place.load(layout))), want)
    for changes in ({"blocks": layout.blocks[:-3]}, {"layer_stride": 1}):
        with pytest.raises(InternalError, match="Paged attention"):
            run(small, replace(own, layout=replace(layout, **changes)))


def test_page_scores_are_refused(small: TritonAttention) -> None:
    step = make_step(FEW, Shape(4, 2, 16))
    with pytest.raises(InternalError, match="on the CPU"):
        small(step.q, step.keys, step.values, step.layout, scale=0.2, page_scores=torch.zeros(2, 40))


@pytest.mark.parametrize(("dtype", "window"), [(F32, 0), (BF16, 40)])
def test_how_work_is_shared_out_changes_no_bit(dtype: torch.dtype, window: int) -> None:
    """Each split by a program of its own and combined, or all by one: the same sums in the same order."""
    step = make_step(FEW, Shape(4, 2, 16, dtype=dtype))
    alone = TritonAttention(DEVICE, tile=16, split=32, programs=1)
    shared = TritonAttention(DEVICE, tile=16, split=32, programs=1000)
    shape = HeadShape(4, 2, 16, dtype, dtype)
    assert not alone.plan(step.layout, shape, 100).combines
    assert shared.plan(step.layout, shape, 100).combines
    assert torch.equal(run(alone, step, window=window), run(shared, step, window=window))


@pytest.mark.parametrize(("dtype", "window"), [(F32, 0), (BF16, 0), (F32, 37)])
def test_a_row_depends_on_its_own_keys_alone(small: TritonAttention, dtype: torch.dtype, window: int) -> None:
    """Bit for bit: in a prompt, as a chain of nodes, or one token at a time; whatever stands beside it."""
    shape = Shape(4, 2, 16, dtype=dtype)
    prompt = make_step([Ask(100, 20)], shape)
    want = run(small, prompt, window=window)
    chain = layout_of([Ask(100, 1, CHAIN[:19])], 16)
    assert torch.equal(chain.blocks, prompt.layout.blocks)
    assert torch.equal(run(small, replace(prompt, layout=chain), window=window), want)
    for row in (0, 7, 19):
        alone = layout_of([Ask(100 + row, 1)], 16)
        alone = replace(alone, blocks=prompt.layout.blocks[: alone.blocks.shape[0]])
        one = replace(prompt, q=prompt.q[row : row + 1], layout=alone)
        assert torch.equal(run(small, one, window=window)[0], want[row])


class TestEdges:
    def test_a_row_that_sees_nothing_gives_zeros(self, small: TritonAttention) -> None:
        step = make_step([Ask(20, 2)], Shape(2, 1, 16))
        step.layout = replace(step.layout, prefix=torch.tensor([0, 22], dtype=torch.int32))
        out = run(small, step)
        assert torch.equal(out[0], torch.zeros(2, 16))
        assert out[1].abs().min() > 0
        step.layout = replace(step.layout, prefix=torch.tensor([0, 0], dtype=torch.int32))
        assert not run(small, step).any()

    def test_an_unseen_key_adds_nothing_however_large(self, small: TritonAttention) -> None:
        step = make_step([Ask(20, 5)], Shape(2, 1, 16))
        want = run(small, step)
        step.values[int(step.layout.blocks[1]), :, 21 % 16] = 3e38
        got = run(small, step)
        assert torch.equal(got[0], want[0])
        assert got[1].abs().min() > 1e30

    def test_an_empty_step(self, small: TritonAttention) -> None:
        assert run(small, make_step([Ask(20, 0)], Shape(2, 1, 16))).shape == (0, 2, 16)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda s: setattr(s, "keys", s.keys.transpose(2, 3).contiguous().transpose(2, 3)),
            lambda s: setattr(s, "q", s.q.transpose(0, 1).contiguous().transpose(0, 1)),
            lambda s: setattr(s, "q", s.q.double()),
            lambda s: setattr(s, "q", s.q[:-1]),
            lambda s: setattr(s, "values", s.values.bfloat16()),
            lambda s: setattr(s, "layout", replace(s.layout, block_size=8)),
            lambda s: setattr(s, "layout", replace(s.layout, prefix=s.layout.prefix.long())),
            lambda s: setattr(s, "layout", replace(s.layout, cu_rows=s.layout.cu_rows * 2)),
            lambda s: setattr(s, "layout", replace(s.layout, blocks=s.layout.blocks + 4)),
            lambda s: setattr(s, "layout", replace(s.layout, prefix=s.layout.prefix + 16)),
            lambda s: setattr(s, "layout", replace(s.layout, ancestors=s.layout.ancestors * 2**40)),
        ],
    )
    def test_what_breaks_the_contract_raises(self, small: TritonAttention, spoil: Callable[[Step], None]) -> None:
        step = make_step(MIXED, Shape(4, 2, 16))
        spoil(step)
        with pytest.raises(InternalError, match="Paged attention"):
            run(small, step)


class TestCache:
    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_write_puts_every_row_in_its_slot(self, small: TritonAttention, dtype: torch.dtype) -> None:
        keys, values = (x[1] for x in small.allocate(2, 5, 3, 8, 4, dtype, DEVICE))
        fused = torch.randn(6, 9, 4, device=DEVICE)  # float32: written rounded
        slots = torch.tensor([39, 0, 7, 8, 20, 13], device=DEVICE)
        small.write_kv(keys, values, slots, fused[:, 3:6], fused[:, 6:])
        for found, rows in zip(small.read_kv(keys, values, slots), (fused[:, 3:6], fused[:, 6:]), strict=True):
            assert torch.equal(found, rows.to(dtype))
        assert int((keys != 0).sum()) == int((values != 0).sum()) == 6 * 3 * 4
        assert torch.equal(keys[2, :, 4].cpu(), fused[4, 3:6].to(dtype).cpu())

    def test_move_reads_all_before_it_writes(self, small: TritonAttention) -> None:
        keys, values = torch.randn(2, 3, 2, 4, 5, device=DEVICE).unbind(0)
        before = keys.clone(), values.clone()
        source, target = torch.tensor([6, 9, 5], device=DEVICE), torch.tensor([5, 6, 9], device=DEVICE)
        small.move_kv(keys, values, source, target)
        for cache, old in zip((keys, values), before, strict=True):
            assert torch.equal(cache[1, :, 1], old[1, :, 2])
            assert torch.equal(cache[1, :, 2], old[2, :, 1])
            assert torch.equal(cache[2, :, 1], old[1, :, 1])
            assert int((cache != old).any(-1).sum()) == 6

    def test_shapes_are_checked(self, small: TritonAttention) -> None:
        keys, values = torch.zeros(2, 5, 3, 8, 4, device=DEVICE).unbind(0)
        k, slots = torch.zeros(2, 3, 4, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
        for call in (
            lambda: small.write_kv(keys, values, slots.int(), k, k),
            lambda: small.write_kv(keys, values, slots, k[:, :2], k[:, :2]),
            lambda: small.move_kv(keys, values, slots, slots[:1]),
        ):
            with pytest.raises(InternalError, match="Paged attention"):
                call()


class TestPlan:
    TILING = Tiling(rows=4, keys=16, split=32, programs=8, slots=1000)

    def test_the_highest_bit(self) -> None:
        values = [0, 1, 2, 3, 2**31, 2**32 - 1, 2**53 - 1, 2**62, 2**63 - 1]
        assert bit_length(np.array(values)).tolist() == [v.bit_length() for v in values]

    def items(self, *asks: Ask, tiling: Tiling = TILING) -> np.ndarray:
        plan = make_plan(layout_of(asks, 16), tiling, 1, 1000)
        return plan.array[plan.array[1] :][: plan.items * ITEM].reshape(-1, ITEM)

    def test_a_long_request_is_shared_out_and_short_ones_are_not(self) -> None:
        items = self.items(Ask(319, 1), *[Ask(3, 1)] * 6)
        assert items[:, 0].tolist() == [0] * 10 + list(range(1, 7))
        assert items[:10, 4].tolist() == list(range(0, 320, 32))
        assert items[:, 7].tolist() == [0] * 10 + [1] * 6

    def test_nothing_is_shared_out_where_there_is_work_enough(self) -> None:
        assert self.items(*[Ask(63, 1)] * 9)[:, 7].tolist() == [1] * 9
        assert self.items(*[Ask(63, 1)] * 7)[:, 7].tolist() == [0] * 14

    def test_partial_sums_never_outgrow_their_room(self) -> None:
        """One slot less than both requests need: the rows are done at once, wherever that makes the work longer."""
        asks = (Ask(319, 1, (-1, 0)), Ask(319, 1, (-1, 0)))
        assert len(self.items(*asks, tiling=replace(self.TILING, slots=66))) == 22
        assert len(self.items(*asks, tiling=replace(self.TILING, slots=65))) == 2

    def test_only_the_end_of_a_request_with_nodes_is_a_tree(self) -> None:
        items = self.items(Ask(60, 1, (-1,)), Ask(60, 1), tiling=replace(self.TILING, programs=1))
        assert dict(zip(items[:, 0].tolist(), items[:, 6].tolist(), strict=True)) == {0: 48, 2: NO_TREE}


class TestCopies:
    SHAPE = HeadShape(4, 2, 16, F32, F32)

    @pytest.fixture
    def copies(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
        made: list[object] = []
        stage = triton_attention._staged
        monkeypatch.setattr(triton_attention, "_staged", lambda *args: made.append(args) or stage(*args))
        return made

    def test_all_layers_share_one_copy_of_the_layout(self, small: TritonAttention, copies: list[object]) -> None:
        step = make_step(FEW, Shape(4, 2, 16))
        want = run(small, step)
        run(small, step, window=5)
        assert len(copies) == 1
        # The next step may lie in the same tensors.
        for name in ("prefix", "ancestors", "blocks"):
            x = getattr(step.layout, name)
            before = x.clone()
            x.copy_(torch.where(x > 1, x - 1, x) if name == "prefix" else x.flip(0) if name == "blocks" else x & 1)
            assert_twins(small, step)
            x.copy_(before)
        assert torch.equal(run(small, step), want)
        assert len(copies) == 5

    def test_a_place_serves_step_after_step(self, small: TritonAttention) -> None:
        """A long plan, then a short one over its remains, from the same address."""
        place = small.place(self.SHAPE, 100, rows=200, table=200)
        seen = set()
        for asks in (FEW, MIXED[2:5], FEW):
            step = make_step(asks, Shape(4, 2, 16))
            want = run(small, step)
            placed = place.load(step.layout)
            seen.add(placed.plan.data_ptr())
            assert torch.equal(run(small, replace(step, layout=placed)), want)
        assert len(seen) == 1

    def test_a_plan_that_outgrows_its_place_raises(self, small: TritonAttention) -> None:
        place = small.place(self.SHAPE, 100, rows=1, table=2)
        place._plan = place._plan[:40]
        with pytest.raises(InternalError, match="outgrows"):
            place.load(layout_of(LONG, 16))


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from steeple.ops import triton_kernels as kernels

def compiled(kernel, dtype, capability, warps, constants):
    kinds = {"plan": "*i32", "slots": "*i64", "scale": "fp32", "part_acc": "*fp32", "part_ml": "*fp32"}
    names = kernel.arg_names
    given = {n: "i32" if n.endswith("stride") else kinds.get(n, "*" + dtype) for n in names}
    signature = {n: "constexpr" if n in constants else given[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and n != "scale"}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})

heads = dict(N=32, K=8, H=128, BLOCK_H=128)
for capability in map(int, sys.argv[2:]):
    for dtype, tile, warps in (("bf16", 64, 8), ("fp32", 32, 4))[: int(sys.argv[1])]:
        for window, softcap in ((0, 0.0), (40, 30.0))[: int(sys.argv[1])]:
            made = compiled(kernels.attend, dtype, capability, warps, heads | dict(
                S=16, BLOCK_M=tile, BLOCK_N=tile, SPLIT=512, WINDOW=window, SOFTCAP=softcap, EXACT=False))
            assert made.metadata.shared <= 99 << 10, made.metadata.shared
            assert ("mma" in made.asm["ptx"]) == (dtype == "bf16")
        compiled(kernels.combine, dtype, capability, 4, heads | dict(BLOCK_G=4))
        sizes = dict(K=8, S=16, H=128, BLOCK=1024)
        compiled(kernels.write, dtype, capability, 4, sizes)
        compiled(kernels.move, dtype, capability, 4, sizes | dict(BACK=False))
print("compiled")
"""


def compile_for(variants: int, *capabilities: int) -> None:
    """In a process that does not interpret. No GPU is needed: the compiler and the assembler come with triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(variants), *map(str, capabilities)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr[-3000:]


def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter accepts what the compiler refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_for(1, 90)


@pytest.mark.slow
def test_they_compile_for_every_generation_since_ampere(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_for(2, 80, 86, 89, 90, 100)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device: the compiled kernels are not run")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [Shape(32, 8, 128), Shape(12, 4, 64), Shape(8, 1, 256), Shape(71, 1, 64)], ids=str)
def test_full_size_heads_agree_on_a_gpu(shape: Shape, dtype: torch.dtype) -> None:
    whole = TritonAttention(DEVICE)
    long = (Ask(3000, 1, CHAIN), Ask(5000, 300), Ask(1200, 1), Ask(0, 700))
    for options in ({}, {"window": 1000}, {"softcap": 20.0}):
        assert_twins(whole, make_step(long, replace(shape, dtype=dtype)), **options)
