"""Attention over pieces, merged, is attention over the whole; and so is what the native kernel does by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from steeple.cache.batch import Span, make_batch
from steeple.errors import InternalError
from steeple.ops.merge import Partial, merge, partial_attention
from steeple.ops.native_attention import NativeAttention, attention_backend
from steeple.types import Draft

N, T, H = 3, 4, 8


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """The slow truth in float64; a query that sees nothing gives zeros."""
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~seen, -math.inf)
    return (torch.nan_to_num(torch.softmax(scores, dim=-1)) @ v.double()).float()


def cut(length: int, generator: torch.Generator, most: int = 5) -> list[int]:
    """Random lengths, zeros among them, that add up to ``length``."""
    marks = torch.randint(0, length + 1, (int(torch.randint(0, most, (), generator=generator)),), generator=generator)
    ends = [0, *sorted(marks.tolist()), length]
    return [b - a for a, b in pairwise(ends)]


def of_pieces(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, lengths: list[int], scale: float) -> Partial:
    """Each piece by itself, ``[pieces, N, T]``: of one request."""
    parts = []
    at = 0
    for length in lengths:
        piece = slice(at, at + length)
        mask = seen[:, piece].expand(1, N, T, length)
        parts.append(partial_attention(q[None], k[None, :, piece], v[None, :, piece], mask, scale=scale))
        at += length
    return joined(parts)


def joined(parts: list[Partial]) -> Partial:
    return Partial(*(torch.cat([getattr(part, name) for part in parts]) for name in ("most", "mass", "mixed")))


@pytest.mark.parametrize("size", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("seed", range(6))
def test_random_ragged_pieces_give_the_whole(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts, owners, wanted = [], [], []
    for request in range(4):
        length = int(torch.randint(1, 40, (), generator=generator))
        q, k = (torch.randn(N, n, H, generator=generator) for n in (T, length))
        v = torch.randn(N, length, H, generator=generator)
        seen = torch.rand(T, length, generator=generator) < 0.7
        seen[0] = False  # sees nothing
        lengths = cut(length, generator)
        parts.append(of_pieces(q * size, k, v, seen, lengths, H**-0.5))
        owners += [request] * len(lengths)
        wanted.append(dense(q * size, k, v, seen, H**-0.5))
    shuffle = torch.randperm(len(owners), generator=generator)
    whole = joined(parts)
    mixed_up = Partial(whole.most[shuffle], whole.mass[shuffle], whole.mixed[shuffle])
    found = merge(mixed_up, torch.tensor(owners)[shuffle], 4)
    # float32 scores of a size of 10^4 are themselves known to 10^-3 only
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5 * max(1.0, size / 10), rtol=1e-5)
    assert not found.isnan().any()


@pytest.mark.parametrize("lengths", [[9], [0, 9], [9, 0, 0], [0, 4, 0, 5, 0], [1] * 9])
def test_one_piece_and_empty_pieces(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(N, n, H, generator=generator) for n in (T, 9, 9))
    seen = torch.ones(T, 9, dtype=torch.bool)
    partial = of_pieces(q, k, v, seen, lengths, 0.4)
    found = merge(partial, torch.zeros(len(lengths), dtype=torch.int64), 1)
    torch.testing.assert_close(found[0], dense(q, k, v, seen, 0.4), atol=1e-6, rtol=1e-5)


def test_huge_logits_of_either_sign_neither_overflow_nor_vanish() -> None:
    q, v = torch.ones(1, 1, 1), torch.tensor([[[1.0], [2.0], [4.0]]])
    for height in (-1e30, -1e4, 1e4, 1e30):
        k = torch.full((1, 3, 1), height)
        seen = torch.ones(1, 3, dtype=torch.bool)
        parts = [
            partial_attention(q[None], k[None, :, piece], v[None, :, piece], seen[:, piece], scale=1.0)
            for piece in (slice(0, 1), slice(1, 3))
        ]
        found = merge(joined(parts), torch.tensor([0, 0]), 1)
        torch.testing.assert_close(found, torch.full((1, 1, 1, 1), 7 / 3))


def test_outputs_with_a_logarithm_of_their_weights_merge_alike() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(N, n, H, generator=generator) for n in (T, 20, 20))
    seen = torch.ones(T, 20, dtype=torch.bool)
    partial = of_pieces(q, k, v, seen, [6, 0, 14], 0.5)
    out, lse = partial.mixed / partial.mass.unsqueeze(-1), partial.most + partial.mass.log()
    assert out[1].isnan().all(), "what an attention over nothing gives is not to matter"
    found = merge(Partial.of_normalised(out, lse), torch.tensor([0, 0, 0]), 1)
    torch.testing.assert_close(found[0], dense(q, k, v, seen, 0.5), atol=1e-6, rtol=1e-5)


def test_a_request_without_pieces_gives_zeros() -> None:
    partial = Partial(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, 3))
    found = merge(partial, torch.tensor([2]), 3)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 2, 3))
    with pytest.raises(InternalError, match="1 pieces"):
        merge(partial, torch.tensor([0, 1]), 3)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SPLIT = 512  # positions that the native kernel keeps apart


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_splits_of_the_native_kernel_are_the_whole(threads: None, count: int, dtype: torch.dtype) -> None:
    """It splits a request every 512 positions, and shares the splits among threads, however many."""
    native = attention_backend(torch.device("cpu"))
    if not isinstance(native, NativeAttention):
        pytest.skip("the native kernels are not built")
    torch.set_num_threads(count)
    lengths, size = (2 * SPLIT + 77, 5, SPLIT, SPLIT + 1, 3 * SPLIT - 1), 16
    heads, kv_heads, width = 4, 2, 32
    generator = torch.Generator().manual_seed(3)
    blocks = [-(-length // size) for length in lengths]
    tables = torch.randperm(sum(blocks), generator=generator).split(blocks)
    k, v = (torch.randn(sum(lengths), kv_heads, width, generator=generator).to(dtype) for _ in range(2))
    spans = [
        Span(str(b), n - 1, torch.tensor([7]).numpy(), t.tolist())
        for b, (n, t) in enumerate(zip(lengths, tables, strict=True))
    ]
    batch = make_batch(spans, Draft.empty(len(lengths)), size, torch.device("cpu"))
    keys, values = native.allocate(1, sum(blocks), kv_heads, size, width, dtype, "cpu")
    slots = torch.cat(
        [t[torch.arange(n) // size] * size + torch.arange(n) % size for n, t in zip(lengths, tables, strict=True)]
    )
    native.write_kv(keys[0], values[0], slots, k, v)
    q = torch.randn(len(lengths), heads, width, generator=generator).to(dtype)
    found = native(q, keys[0], values[0], batch.layout, scale=0.2)
    parts, owners = [], []
    for b, (own_k, own_v) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        spread = [x.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1).float() for x in (own_k, own_v)]
        seen = torch.ones(1, lengths[b], dtype=torch.bool)
        wanted = dense(q[b, :, None].float(), *spread, seen, 0.2)[:, 0]
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 8e-3, "rtol": 2e-2}
        torch.testing.assert_close(found[b].float(), wanted, **close)
        for at in range(0, lengths[b], SPLIT):
            piece = [x[None, :, at : at + SPLIT] for x in spread]
            parts.append(partial_attention(q[b, None, :, None], *piece, seen[:, at : at + SPLIT], scale=0.2))
            owners.append(b)
    merged = merge(joined(parts), torch.tensor(owners), len(lengths))[:, :, 0]
    torch.testing.assert_close(found.float(), merged, **close)
