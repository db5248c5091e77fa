"""Forwards over static, padded buffers - what a CUDA graph replays - against the plain runner, without capture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu.accelerator import DEVICE, interpret, needs_triton
from gpu.cases import MIXED, Ask, blocks_needed, forest
from gpu.engines import SMALL_BUCKETS, build, greedy, paged
from lab import CACHES, TARGET, CacheKind
from torch import Tensor

from steeple.cache.batch import Span, make_batch
from steeple.errors import InternalError
from steeple.model.decoder import Hidden
from steeple.model.graphs import BUCKETS, NoPlace, StepGraphs, padded, step_graphs
from steeple.model.run import Runner
from steeple.ops.attention import PagedAttention, ReferenceAttention
from steeple.ops.triton_attention import TritonAttention
from steeple.types import Batch

KIND = CacheKind(block_size=8, blocks=90)
STEPS = [(Ask(20, 1), Ask(3, 1), Ask(33, 1, (-1, 0, 0))), (Ask(5, 1),), MIXED[2:7], (Ask(0, 7), Ask(9, 1, (-1,)))]


def make(asks: Sequence[Ask], seed: int) -> Batch:
    numbers = np.random.default_rng(seed)
    free = numbers.permutation(KIND.blocks).tolist()
    spans = []
    for number, ask in enumerate(asks):
        held = [free.pop() for _ in range(blocks_needed([ask], KIND.block_size))]
        spans.append(Span(f"r{number}", ask.cached, numbers.integers(11, size=ask.text), held))
    draft = forest(asks)
    draft.tokens.copy_(torch.from_numpy(numbers.integers(11, size=draft.tokens.shape[0])))
    return make_batch(spans, draft, KIND.block_size, "cpu")


def pair(attention: PagedAttention) -> tuple[Runner, StepGraphs]:
    """A plain runner and its padded twin, each with a cache full of the same noise."""
    caches = [paged(TARGET, attention, KIND) for _ in range(2)]
    for cache, _ in caches:
        for number, store in enumerate((cache.keys, cache.values)):
            store.copy_(torch.randn(store.shape, generator=torch.Generator().manual_seed(number)))
    plain = Runner(TARGET, caches[0][0], attention)
    plain.whole = None
    cache, scratch = caches[1]
    return plain, step_graphs(TARGET, cache, attention, scratch=scratch, buckets=(1, 2, 4, 8, 16, 24, 32))


def differences(plain: Runner, graphs: StepGraphs) -> set[int]:
    """Blocks in which the two caches differ."""
    ours, theirs = plain.cache, graphs._runner.cache
    different = torch.zeros(KIND.blocks + 1, dtype=torch.bool)
    for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        different |= ((a - b).abs() > 1e-5).any(4).any(3).any(2).any(0)
    return set(different.nonzero().flatten().tolist())


def test_hidden_states_and_cache_equal_the_plain_forward() -> None:
    plain, graphs = pair(ReferenceAttention())
    for seed, asks in enumerate((*STEPS, *STEPS[::-1])):
        batch = make(asks, seed)
        keep = (0, 1) if seed % 2 else ()
        want, got = plain.forward(batch, keep=keep), graphs(batch, keep)
        assert got is not None
        torch.testing.assert_close(got.final_TD, want.final_TD, atol=1e-5, rtol=1e-5)
        assert set(got.kept) == set(keep)
        for layer in keep:
            torch.testing.assert_close(got.kept[layer], want.kept[layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(graphs.logits(got.final_TD), plain.logits(want.final_TD), atol=1e-4, rtol=1e-5)
        assert torch.equal(graphs.best(got.final_TD), plain.best(want.final_TD))
    assert differences(plain, graphs) == {KIND.blocks}, "padding rows write to their scratch block and nowhere else"


class Recording:
    """What a captured graph is but for speed: ``replay`` runs the same forward over the same buffers."""

    def __init__(self, runner: Runner, static: Batch, layers: tuple[int, ...]) -> None:
        self._runner, self._static, self._layers = runner, static, layers
        self.hidden = runner.forward(static, keep=layers)

    def replay(self) -> None:
        fresh = self._runner.forward(self._static, keep=self._layers)
        self.hidden.final_TD.copy_(fresh.final_TD)
        for layer, kept in self.hidden.kept.items():
            kept.copy_(fresh.kept[layer])


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> tuple[Runner, StepGraphs]:
    """The twins, with recordings in the place of captured graphs."""
    interpret()
    if DEVICE.type == "cuda":
        pytest.skip("the GPU's own tests do this with capture")

    def record(self: StepGraphs, static: Batch, layers: tuple[int, ...]) -> tuple[Recording, Hidden]:
        made = Recording(self._runner, static, layers)
        return made, made.hidden

    monkeypatch.setattr(StepGraphs, "_record", record)
    graphs = pair(TritonAttention("cpu", tile=16, split=32))[1]
    graphs._capture = True
    return pair(ReferenceAttention())[0], graphs


@needs_triton
def test_a_recorded_forward_depends_on_its_buffers_alone(recording: tuple[Runner, StepGraphs]) -> None:
    """Replayed with other tokens, lengths, trees and numbers of requests than it was recorded with."""
    plain, graphs = recording
    for seed, asks in enumerate((STEPS[0], STEPS[1], STEPS[3][:1], (Ask(60, 1), Ask(2, 1, (-1, -1, 0, 1)), Ask(1, 1)))):
        batch = make(asks, seed)
        got = graphs(batch, (1,))
        want = plain.forward(batch, keep=(1,))
        assert got is not None
        torch.testing.assert_close(got.final_TD, want.final_TD, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.kept[1], want.kept[1], atol=1e-4, rtol=1e-4)
    assert sorted(graphs._graphs) == [(1, (1,)), (8, (1,))]


@needs_triton
def test_what_is_returned_outlives_the_next_step(recording: tuple[Runner, StepGraphs]) -> None:
    _, graphs = recording
    first = graphs(make(STEPS[1], 0), (0,))
    assert first is not None
    before = first.final_TD.clone(), first.kept[0].clone()
    graphs(make([Ask(3, 1)], 1), (0,))
    assert torch.equal(first.final_TD, before[0])
    assert torch.equal(first.kept[0], before[1])


def test_the_least_bucket_that_holds_the_rows() -> None:
    _, graphs = pair(ReferenceAttention())
    rows = [graphs.bucket(make([Ask(0, n)], 0)) for n in (1, 2, 3, 4, 5, 9, 17, 32, 33)]
    assert rows == [1, 2, 4, 4, 8, 16, 24, 32, None]
    assert graphs(make([Ask(0, 33)], 0), ()) is None
    assert graphs.bucket(make([], 0)) is None
    assert list(BUCKETS) == sorted(set(BUCKETS))


def test_a_block_table_beyond_the_place_is_declined() -> None:
    _, graphs = pair(ReferenceAttention())
    batch = make([Ask(5, 1)], 0)
    crowded = replace(batch.layout, blocks=torch.zeros(graphs._table + 1, dtype=torch.int32))
    assert graphs(replace(batch, layout=crowded), ()) is None


def test_a_batch_with_tables_of_heads_or_page_scores_is_none_of_theirs() -> None:
    _, graphs = pair(ReferenceAttention())
    batch = make([Ask(5, 1)], 0)
    assert graphs(batch, ()) is not None
    assert graphs(batch, (), True) is None
    for own in ({"layer_stride": 1}, {"head_stride": 1}):
        assert graphs(replace(batch, layout=replace(batch.layout, **own)), ()) is None


def test_padding_adds_one_request_that_sees_nothing() -> None:
    layout = make(STEPS[0], 0).layout
    assert padded(layout, 6) is layout
    longer = padded(layout, 8)
    assert longer.cu_rows.tolist() == [0, 1, 2, 6, 8]
    assert longer.cu_blocks.tolist() == [*layout.cu_blocks.tolist(), layout.blocks.shape[0]]
    assert longer.prefix.tolist() == [*layout.prefix.tolist(), 0, 0]
    assert longer.ancestors.tolist()[6:] == longer.positions.tolist()[6:] == [0, 0]
    assert longer.node_row.tolist() == [*layout.node_row.tolist(), 8]
    assert all(getattr(longer, n).dtype == torch.int32 for n in ("cu_rows", "cu_blocks", "text_len", "node_row"))


def test_an_attention_that_reads_the_host_is_not_recorded() -> None:
    cache, scratch = paged(TARGET, ReferenceAttention(), KIND)
    with pytest.raises(InternalError, match="recorded"):
        StepGraphs(TARGET, cache, ReferenceAttention(), scratch=scratch, place=NoPlace(), table=9)


@pytest.mark.parametrize("row", ["none", "ngram", "small_lm", "drawn_tree", "ragged"])
@pytest.mark.parametrize("kind", ["paged", "odd_blocks_tight"])
def test_l1_greedy_output_is_that_of_plain_decoding(row: str, kind: str) -> None:
    attention = ReferenceAttention()
    engine = build(row, attention, kind=CACHES[kind], graphs=SMALL_BUCKETS)
    served = []
    whole = engine._runner.whole
    engine._runner.whole = Recorder(whole, served)
    assert greedy(engine) == greedy(build("none", attention, batch_size=1))
    assert True in served, "no step was one for the graphs"
    assert False in served, "no step was too long for them"


class Recorder:
    """Notes whether the graphs took a batch."""

    def __init__(self, whole: StepGraphs, served: list[bool]) -> None:
        self._whole, self._served = whole, served
        self.logits, self.best = whole.logits, whole.best

    def __call__(self, batch: Batch, keep: Sequence[int], scores: bool, added: Tensor | None = None) -> object:
        hidden = self._whole(batch, keep, scores, added)
        self._served.append(hidden is not None)
        return hidden
