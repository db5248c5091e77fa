"""Pipelined rounds write what rounds one after the other write: for every drafter, greedy and sampled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from checks import GREEDY, SAMPLED, lone_outputs, plain_outputs, prompts
from lab import CACHES, DEPEND_ON_HISTORY, ROWS, check_cache, make_engine, make_requests, run

from steeple.engine.engine import Engine, EngineParts
from steeple.engine.pipeline import PipelinedEngine
from steeple.errors import ConfigError

WHOLE_BATCH = ("spin", "spin_rolled")  # these plan a round for all requests together
PIPELINED = [row for row in ROWS if row not in WHOLE_BATCH]


def pipelined(count: int) -> Callable[[EngineParts], Engine]:
    return partial(PipelinedEngine, micro_batches=count)


FEW = ["none", "small_lm", "spire_carry_all", "sparse_self_wide", "minions", "motley_tree", "two_drafters"]
GREEDY_CELLS = [(row, 3, "odd_blocks_tight") for row in PIPELINED] + [(row, 2, "paged") for row in FEW]
SAMPLED_CELLS = [(row, 2, "odd_blocks_tight") for row in PIPELINED if row not in DEPEND_ON_HISTORY]
SAMPLED_CELLS += [(row, 3, "paged") for row in FEW]


@pytest.mark.parametrize(("row", "count", "cache"), GREEDY_CELLS)
def test_greedy_output_is_that_of_plain_decoding(row: str, count: int, cache: str) -> None:
    engine = make_engine(row, CACHES[cache], batch_size=6, step_tokens=12, engine=pipelined(count))
    assert run(engine, make_requests(prompts(), GREEDY), join_every=1) == plain_outputs()
    assert (engine.stats.preemptions > 0) == (cache == "odd_blocks_tight")


@pytest.mark.parametrize(("row", "count", "cache"), SAMPLED_CELLS)
def test_the_same_seed_writes_the_same_tokens(row: str, count: int, cache: str) -> None:
    requests = make_requests(prompts(), SAMPLED, seeds=True)
    engine = make_engine(row, CACHES[cache], batch_size=6, step_tokens=14, engine=pipelined(count))
    assert run(engine, requests, join_every=1) == lone_outputs(row, CACHES[cache].block_size)


@pytest.mark.parametrize("row", WHOLE_BATCH)
def test_who_plans_for_all_is_refused(row: str) -> None:
    with pytest.raises(ConfigError, match="give micro_batches = 1"):
        make_engine(row, engine=pipelined(2))


@pytest.mark.parametrize("row", ["small_lm", "motley_tree", "spire_own_keys"])
def test_the_cache_holds_what_recomputation_gives(row: str) -> None:
    engine = make_engine(row, CACHES["odd_blocks_tight"], batch_size=6, step_tokens=16, engine=pipelined(2))
    requests = make_requests(prompts(), SAMPLED, seeds=True)
    for request in requests:
        engine.add(request)
    while not engine.idle:
        engine.step()
        check_cache(engine, requests)
    engine.check_integrity()
