"""The native whole forward equals the decoder's own, layer by layer, for every family and over any batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_families import CASES, loaded, published
from torch import Tensor

from steeple.cache.batch import Span, make_batch
from steeple.cache.paged import PagedCache
from steeple.errors import InternalError
from steeple.hf import resolve
from steeple.model import Decoder, load_decoder
from steeple.model.decoder import Hidden
from steeple.model.run import Runner
from steeple.model.whole import PARTS, NativeForward
from steeple.ops.attention import ReferenceAttention
from steeple.ops.kernels import Kernels, kernels
from steeple.ops.native import library_path
from steeple.ops.native_attention import attention_backend
from steeple.types import Batch, Draft

# Requests: text read at once, then a tree of nodes behind it (parents; -1 = the newest token).
TEXTS = (5, 1, 23)
TREES = ((-1, 0, 0, 2), (), (-1, -1))
BLOCK = 16

pytestmark = pytest.mark.skipif(library_path() is None, reason="no compiler: there is no native library")


def draft_of(trees: tuple[tuple[int, ...], ...], vocab: int) -> Draft:
    counts = [len(tree) for tree in trees]
    cu = torch.tensor([0, *np.cumsum(counts)])
    parents = [p if p < 0 else p + int(cu[b]) for b, tree in enumerate(trees) for p in tree]
    tokens = torch.arange(sum(counts)) * 7 % vocab
    return Draft(tokens, torch.tensor(parents, dtype=torch.int64), cu, torch.full_like(tokens, -1))


class Side:
    """A decoder with a cache of its own."""

    def __init__(self, decoder: Decoder, *, native: bool) -> None:
        attention = attention_backend("cpu") if native else ReferenceAttention()
        decoder.use(kernels("cpu") if native else Kernels())
        self.cache = PagedCache(decoder.config, blocks=40, block_size=BLOCK, dtype=decoder.dtype, attention=attention)
        self.runner = Runner(decoder, self.cache, attention)
        self.vocab = decoder.config.vocab_size

    def batch(
        self, texts: tuple[int, ...] = TEXTS, trees: tuple[tuple[int, ...], ...] = TREES, start: int = 0
    ) -> Batch:
        spans = []
        for b, length in enumerate(texts):
            name = f"request {b}"
            tokens = (np.arange(length) * (b + 3) + b + start) % self.vocab
            if not self.cache.has(name):
                self.cache.attach(name, tokens)
            self.cache.reserve(name, start + length + len(trees[b]))
            spans.append(Span(name, start, tokens, self.cache.table(name)))
        return make_batch(spans, draft_of(trees, self.vocab), BLOCK, "cpu")

    def forward(self, *batches: Batch, keep: tuple[int, ...] = (), scores: bool = False) -> Hidden:
        for batch in batches:
            hidden = self.runner.forward(batch, keep=keep, scores=scores)
        return hidden

    def shuffle(self, batch: Batch) -> Batch:
        """Shuffle the blocks that ``batch`` does not write, for every layer and head by themselves, in the cache and in
        the batch's tables."""
        L, P, K = self.cache.keys.shape[:3]
        free = torch.tensor(sorted(set(range(P)) - set((batch.slots // BLOCK).tolist())))
        tables = []
        for store in (self.cache.keys, self.cache.values):
            old = store.clone()
            for index in range(L * K):
                layer, head, to = index // K, index % K, torch.arange(P)
                to[free] = free[torch.from_numpy(np.random.default_rng(index).permutation(len(free)))]
                store[layer][to, head] = old[layer][:, head]
                tables.append(to[batch.layout.blocks.long()].int())
        entries = batch.layout.blocks.shape[0]
        strides = {"layer_stride": K * entries, "head_stride": entries}
        return replace(batch, layout=replace(batch.layout, blocks=torch.cat(tables[: L * K]), **strides))


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert (found.float() - wanted.float()).abs().max() <= tolerance * wanted.float().abs().max()


@pytest.mark.parametrize("case", CASES)
def test_every_family_gives_the_decoders_own_numbers(case: str, tmp_path: Path) -> None:
    model = published(case)
    native, twin = Side(loaded(model, tmp_path), native=True), Side(loaded(model, tmp_path), native=False)
    assert isinstance(native.runner.whole, NativeForward)
    assert twin.runner.whole is None
    keep = (0, 2)
    found = native.forward(native.batch(), native.batch((1, 4, 1), start=23), keep=keep)
    wanted = twin.forward(twin.batch(), twin.batch((1, 4, 1), start=23), keep=keep)
    close(found.final_TD, wanted.final_TD, 1e-5)
    assert set(found.kept) == set(keep)
    for layer in keep:
        close(found.kept[layer], wanted.kept[layer], 1e-5)
    logits = native.runner.logits(found.final_TD)
    close(logits, twin.runner.logits(wanted.final_TD), 1e-5)
    assert torch.equal(native.runner.best(found.final_TD), logits.argmax(-1))


@pytest.mark.parametrize("case", ["llama-biases", "qwen3", "gemma2", "phi3-partial"])
def test_bfloat16_is_as_near_to_exact_as_the_decoders_own(case: str, tmp_path: Path) -> None:
    model = published(case)
    model.to(torch.bfloat16)  # weights that both can hold
    exact = Side(loaded(model, tmp_path), native=False)
    sides = [Side(loaded(model, tmp_path, dtype=torch.bfloat16), native=native) for native in (True, False)]
    wanted = exact.forward(exact.batch()).final_TD
    errors = [(side.forward(side.batch()).final_TD.float() - wanted).norm() / wanted.norm() for side in sides]
    assert errors[0] < 0.05
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_rounded_alike_in_any_batch(dtype: torch.dtype, tmp_path: Path) -> None:
    """Text read at once, in pieces, as a drafted chain, beside others or alone, by one thread or two."""
    model = published("llama")
    whole = Side(loaded(model, tmp_path, dtype=dtype), native=True)
    wanted = whole.forward(whole.batch((40, 3, 9), ((), (), ()))).final_TD
    pieces = Side(loaded(model, tmp_path, dtype=dtype), native=True)
    texts = [span[:, None] for span in wanted.split((40, 3, 9))]
    alone = pieces.batch((40,), ((),)).tokens
    assert torch.equal(alone, whole.batch((40,), ((),)).tokens)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for start, length in ((0, 17), (17, 1), (18, 22)):
            batch = pieces.batch((length,), ((),), start)
            batch.tokens.copy_(alone[start : start + length])
            rows.append(pieces.forward(batch).final_TD)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(rows), texts[0].squeeze(1))


def test_a_tree_path_is_rounded_as_the_same_text(tmp_path: Path) -> None:
    model = published("llama")
    text = Side(loaded(model, tmp_path, dtype=torch.bfloat16), native=True)
    tree = Side(loaded(model, tmp_path, dtype=torch.bfloat16), native=True)
    as_tree = tree.batch((9,), ((-1, -1, 0, 1, 3),))  # node 1 - 3 - 4 is a path with gaps
    hidden = tree.forward(as_tree).final_TD
    path = as_tree.tokens[[10, 12, 13]]
    as_text = text.batch((12,), ((),))
    as_text.tokens[9:] = path
    assert torch.equal(as_text.tokens[:9], as_tree.tokens[:9])
    assert torch.equal(text.forward(as_text).final_TD[9:], hidden[[10, 12, 13]])


def tables_step(side: Side) -> Batch:
    """A second step over some pages; the first is done."""
    side.forward(side.batch((50, 35, 40), ((), (), ())))
    return side.batch((1, 4, 1), TREES, start=35)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_layers_and_heads_may_have_tables_of_their_own(case: str, native: bool, tmp_path: Path) -> None:
    side = Side(loaded(published(case), tmp_path), native=native)
    batch = tables_step(side)
    wanted = side.forward(batch, scores=True)
    shuffled = side.shuffle(batch)
    assert not torch.equal(side.forward(batch).final_TD, wanted.final_TD), "nothing was shuffled"
    found = side.forward(shuffled, scores=True)
    assert torch.equal(found.final_TD, wanted.final_TD)
    assert found.scores is not None
    assert wanted.scores is not None
    assert torch.equal(found.scores, wanted.scores)


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    side = Side(loaded(published("llama"), tmp_path), native=True)
    batch = side.shuffle(tables_step(side))
    layout = batch.layout
    for changes in (
        {"blocks": layout.blocks[:-1]},
        {"layer_stride": layout.layer_stride + 1},
        {"layer_stride": -1},
        {"head_stride": layout.head_stride + 1},
    ):
        with pytest.raises(InternalError, match="block tables"):
            side.forward(replace(batch, layout=replace(layout, **changes)))


@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_page_scores_of_all_layers_are_the_decoders_own(case: str, tmp_path: Path) -> None:
    """gemma2: with windows in every other layer, and a softcap."""
    model = published(case)
    sides = [Side(loaded(model, tmp_path), native=native) for native in (True, False)]
    found, wanted = (side.forward(tables_step(side), scores=True).scores for side in sides)
    assert found is not None
    assert wanted is not None
    config = sides[0].runner.decoder.config
    assert found.shape == (config.num_layers, config.num_kv_heads, int(tables_step(sides[0]).layout.cu_blocks[-1]))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    assert len({tuple(row.tolist()) for row in found.flatten(0, 1)}) == found.shape[0] * found.shape[1]
    assert all(side.forward(side.batch()).scores is None for side in sides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_what_is_added_to_the_embeddings_is_added_after_their_scale(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """gemma2: with a scale. Rows of odd strides and another type are taken as well."""
    model = published(case)
    sides = [Side(loaded(model, tmp_path, dtype=dtype), native=native) for native in (True, False)]
    rows, width = sides[0].batch().tokens.shape[0], sides[0].runner.decoder.config.hidden_size
    added = torch.randn(width, rows, generator=torch.Generator().manual_seed(0)).T
    found, wanted = (side.runner.forward(side.batch(), added=added, keep=(0,)).kept[0] for side in sides)
    close(found, wanted, 1e-5 if dtype == torch.float32 else 2e-2)
    without = sides[0].runner.forward(sides[0].batch(), keep=(0,)).kept[0]
    assert (found.float() - without.float()).abs().amax(dim=-1).min() > 0.1


def test_seconds_are_booked_by_part_on_request(tmp_path: Path) -> None:
    side = Side(loaded(published("llama"), tmp_path), native=True)
    native = side.runner.whole
    assert isinstance(native, NativeForward)
    side.forward(side.batch())
    assert native.parts == dict.fromkeys(PARTS, 0.0)
    native.timing = True
    side.forward(side.batch())
    assert all(seconds > 0 for seconds in native.parts.values())


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("tokens", 10**6, "vocabulary"), ("positions", 10**6, "max_context"), ("slots", 40 * BLOCK, "outside the cache")],
)
def test_wrong_input_is_refused_before_anything_is_written(field: str, value: int, reason: str, tmp_path: Path) -> None:
    side = Side(loaded(published("llama"), tmp_path), native=True)
    batch = side.batch()
    getattr(batch, field)[3] = value
    keys = side.cache.keys.clone()
    with pytest.raises(InternalError, match=reason):
        side.forward(batch)
    assert torch.equal(side.cache.keys, keys)


def test_what_it_does_not_have_it_leaves_to_the_decoder(tmp_path: Path) -> None:
    model = published("llama")
    assert Side(loaded(model, tmp_path, dtype=torch.float64), native=True).runner.whole is None
    decoder = loaded(model, tmp_path)
    decoder.use(kernels("cpu"))
    cache = PagedCache(decoder.config, blocks=4, block_size=16, dtype=torch.float32, attention=ReferenceAttention())
    assert not NativeForward.supported(decoder, cache)


def test_of_equal_tokens_the_first_is_best(tmp_path: Path) -> None:
    side = Side(loaded(published("llama"), tmp_path), native=True)
    nothing = torch.zeros(3, side.runner.decoder.config.hidden_size)
    assert side.runner.best(nothing).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_the_work_of_a_real_model(dtype: torch.dtype) -> None:
    """A tiny model is not worth a second thread; this one is, with few rows (by heads) and with many (by rows)."""
    decoders = [load_decoder(resolve("demo"), dtype=dtype) for _ in range(2)]
    native, twin = Side(decoders[0], native=True), Side(decoders[1], native=False)
    steps = (((3, 1, 2), TREES, 0), ((100, 80, 90), ((), (), ()), 3))
    for texts, trees, start in steps:
        found, wanted = (s.forward(s.batch(texts, trees, start)).final_TD for s in (native, twin))
        close(found, wanted, 1e-5 if dtype == torch.float32 else 0.1)
        assert (found.float() - wanted.float()).norm() < 0.02 * wanted.float().norm()
