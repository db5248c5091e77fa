"""Several drafters as one: needs that are all of theirs, and to each only its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from steeple.config import ModelConfig
from steeple.draft.base import Needs
from steeple.draft.parts import Parts, part_configs, parts_memory, slice_of
from steeple.errors import ConfigError
from steeple.model.decoder import Hidden
from steeple.plan.memory_parts import DraftMemory


def part(needs: Needs, **more: object) -> SimpleNamespace:
    seen: list[object] = []
    return SimpleNamespace(
        needs=needs, seen=seen, prepare=seen.append, observe=lambda *args: seen.append(args), forget=seen.append, **more
    )


FIRST = Needs(hidden=(3, 1), nodes=4, own_cache_bytes_per_token=100, scores=True, last_row=True)
SECOND = Needs(hidden=(1, 2), nodes=7, own_cache_bytes_per_token=20, shares_cache=True, adaptive=True, every_row=True)


def test_needs_are_those_of_all() -> None:
    assert Parts("x", [part(FIRST), part(SECOND)]).needs == Needs(
        hidden=(1, 2, 3),
        nodes=7,
        shares_cache=True,
        own_cache_bytes_per_token=120,
        adaptive=True,
        scores=True,
        every_row=True,
        last_row=True,
    )
    assert Parts("x", [part(Needs(nodes=2)), part(Needs(nodes=1))]).needs == Needs(nodes=2)


def test_each_part_observes_what_it_asked_for() -> None:
    first, second = part(FIRST), part(SECOND)
    layers = {layer: torch.full((1,), float(layer)) for layer in (1, 2, 3)}
    hidden = Hidden(torch.zeros(2), layers, torch.ones(3))
    Parts("x", [first, second]).observe("requests", "batch", "kept", hidden)  # type: ignore[arg-type]
    ((*rest, ours),), ((*_, theirs),) = first.seen, second.seen
    assert rest == ["requests", "batch", "kept"]
    assert set(ours.kept) == {1, 3}
    assert ours.scores is hidden.scores
    assert set(theirs.kept) == {1, 2}
    assert theirs.scores is None
    assert theirs.final_TD is hidden.final_TD
    with pytest.raises(KeyError):
        slice_of(hidden, Needs(hidden=(4,)))


def test_all_are_prepared_and_told_to_forget() -> None:
    both = [part(FIRST), part(SECOND)]
    parts = Parts("x", both)
    parts.prepare("cache")  # type: ignore[arg-type]
    parts.forget("request")  # type: ignore[arg-type]
    assert [own.seen for own in both] == [["cache", "request"]] * 2


def test_a_part_that_decides_lengths_is_refused() -> None:
    with pytest.raises(ConfigError, match="owner: SimpleNamespace decides lengths by itself"):
        Parts("owner", [part(FIRST), part(SECOND, lengths=object())])


def test_specs_are_read_with_their_settings() -> None:
    ngram, sparse = part_configs("x", " ngram:min_match=1 ,sparse_self", 3)
    assert (ngram.k, sparse.k) == (3, 3)
    assert getattr(ngram, "min_match") == 1  # noqa: B009 (the register hides the class)
    with pytest.raises(ConfigError, match=r"x\.models = \[\] names no drafter"):
        part_configs("x", [], 3)


def test_memory_is_summed_and_the_largest_forward_counts() -> None:
    def shape(layers: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=10,
            hidden_size=8,
            num_layers=layers,
            num_heads=2,
            num_kv_heads=1,
            head_dim=4,
            intermediate_size=16,
            max_context=32,
            rope_inv_freq=(1.0, 0.1),
        )

    found = [
        DraftMemory(held=5, keys=2, runs=shape(3), layers=2),
        DraftMemory(held=50, keys=1, runs=shape(1), reads_text=True, scores=True),
        DraftMemory(position_state=7),
    ]
    configs = [SimpleNamespace(memory=lambda around, lay, own=own: own) for own in found]
    whole = parts_memory([*configs, SimpleNamespace()], None, None)  # type: ignore[arg-type]
    assert whole == DraftMemory(
        held=55, keys=3, runs=shape(3), reads_text=True, draws=True, position_state=7, layers=2, scores=True
    )
