"""Pages chosen by the target's scores: which, how many, when, and that a view of them is what a row sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steeple.cache.pages import ChoiceRule, PageChoice
from steeple.cache.window import Chosen, Window, WindowBatches

L, K, PAGE = 2, 3, 4
WINDOW = Window(4, 8)


def some_scores(requests: int, pages: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(L, K, requests, pages, generator=torch.Generator().manual_seed(seed))


def between(length: int) -> list[int]:
    """Pages behind the sink and before the window of the next root."""
    first = max(0, length - 1 - WINDOW.window) // PAGE
    return list(range(min(1, first), first))


@pytest.mark.parametrize("lengths", [[60, 61, 80], [3, 40, 80]])
def test_the_best_pages_between_sink_and_window_are_chosen(lengths: list[int]) -> None:
    scores = some_scores(3, 22)
    choice = PageChoice(ChoiceRule(budget=3 * PAGE, refresh=True), WINDOW, PAGE, slice(0, L))
    choice.note(["a", "b", "c"], lengths, scores)
    found = choice.of(["a", "b", "c"], (L, K))
    for b, length in enumerate(lengths):
        there = between(length)
        count = min(3, len(there))
        assert found.counts[b] == count
        for layer in range(L):
            for head in range(K):
                best = sorted(there, key=lambda page: -float(scores[layer, head, b, page]))[:count]
                assert sorted(found.pages[layer, head, b, :count].tolist()) == sorted(best)


def test_a_share_of_the_text_is_a_budget_too() -> None:
    rule = ChoiceRule(budget=0.1, refresh=True)
    assert [rule.pages(length, PAGE) for length in (40, 41, 400)] == [1, 2, 10]
    assert ChoiceRule(budget=9.0, refresh=True).pages(1000, PAGE) == 3
    assert ChoiceRule(budget=0.0, refresh=True).pages(1000, PAGE) == 0


def test_snapkv_keeps_its_first_choice_and_pillar_does_not() -> None:
    for refresh in (False, True):
        choice = PageChoice(ChoiceRule(budget=8.0, refresh=refresh), WINDOW, PAGE, slice(0, L))
        assert choice.wants("a")
        choice.note(["a"], [80], some_scores(1, 22))
        assert choice.wants("a") == refresh
        choice.forget("a")
        assert choice.wants("a")
        assert not choice.remembered


def test_only_the_drafts_layers_are_looked_at() -> None:
    scores = some_scores(1, 22)
    whole = PageChoice(ChoiceRule(8.0, refresh=True), WINDOW, PAGE, slice(0, L))
    last = PageChoice(ChoiceRule(8.0, refresh=True), WINDOW, PAGE, slice(1, L))
    whole.note(["a"], [80], scores)
    last.note(["a"], [80], scores)
    assert last.of(["a"], (1, K)).pages.tolist() == whole.of(["a"], (L, K)).pages[1:].tolist()


def test_requests_noted_apart_come_together_and_strangers_have_nothing() -> None:
    choice = PageChoice(ChoiceRule(8.0, refresh=True), WINDOW, PAGE, slice(0, L))
    alone = {}
    for number, (id, length) in enumerate((("a", 80), ("b", 20))):
        choice.note([id], [length], some_scores(1, 22, seed=number))
        alone[id] = choice.of([id], (L, K))
    both = choice.of(["b", "stranger", "a"], (L, K))
    assert both.counts.tolist() == [int(alone["b"].counts[0]), 0, 2]
    assert both.pages[:, :, 2, :2].tolist() == alone["a"].pages[:, :, 0].tolist()


def test_rows_see_the_chosen_pages_of_their_layer_and_head() -> None:
    bases, nodes = np.array([70, 9, 50]), 4
    tables = [np.random.default_rng(b).permutation(40).tolist() for b in range(3)]
    pages = np.random.default_rng(0).permuted(np.tile(np.arange(1, 10), (L, K, 3, 1)), axis=3)[..., :3]
    chosen = Chosen(pages, np.array([3, 0, 2]))
    windows = WindowBatches(PAGE, "cpu", WINDOW)
    windows.open(["a", "b", "c"], tables, bases, nodes, chosen)
    for depth in range(nodes):
        batch = windows.at(depth, np.zeros(3, dtype=np.int64))
        layout = batch.layout
        for layer in range(L):
            own = layout.of_layer(layer).blocks.tolist()
            for head in range(K):
                for b, base in enumerate(bases.tolist()):
                    start = head * layout.head_stride + int(layout.cu_blocks[b])
                    compact = range(int(layout.prefix[b]))
                    seen = {tables[b].index(own[start + p // PAGE]) * PAGE + p % PAGE for p in compact}
                    first = max(0, base - WINDOW.window) // PAGE
                    picked = pages[layer, head, b, : chosen.counts[b]].tolist()
                    visible = {
                        p for p in range(base + depth + 1) if p < PAGE or p >= first * PAGE or p // PAGE in picked
                    }
                    assert seen == visible
                    assert len(seen) == len(compact), "a position is read twice"
