"""Depths that the engine chooses by the clock: outputs keep the target's tokens and law, and rounds without a draft do
no harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checks import GREEDY, PROCESSORS, PROMPT, SMALL, SMALL_BAD, exact_law, plain_outputs, prompts
from exact import check_sample
from lab import CACHES, CacheKind, drafters, make_engine, make_requests, run

from steeple.draft.auto import AutoConfig
from steeple.draft.auto_k import AutoK
from steeple.draft.base import Drafter, Surroundings
from steeple.engine.engine import Engine
from steeple.engine.length import GoodputLengths
from steeple.model.decoder import Decoder
from steeple.request import Request

CALIBRATION = Path(__file__).parents[2] / "bench" / "results" / "calibration.json"
ROWS = ("ngram", "small_lm", "sparse_self", "sparse_self_pillar", "spire", "spire_memory", "auto")


class Rolled:
    """Depths that come from a die: what the clock may choose, however mad."""

    def __init__(self, most: int) -> None:
        self._rng, self._most, self.chosen = np.random.default_rng(0), most, set[int]()

    def begin(self, running: Sequence[Request]) -> None:
        pass

    def __call__(self, request: Request) -> int:
        depth = int(self._rng.integers(0, self._most + 1)) * int(self._rng.integers(0, 2))
        self.chosen.add(depth)
        return depth

    def learn(
        self, requests: Sequence[Request], depths: Sequence[int], accepted: Sequence[int], seconds: float | None
    ) -> None:
        assert all(kept <= depth for kept, depth in zip(accepted, depths, strict=True))


def adaptive(row: str, target: Decoder | None = None, bad: Decoder | None = None) -> Callable[[Surroundings], Drafter]:
    if row == "auto":  # takes the one that needs no model beside the target's, for there is no other
        return AutoConfig(k=4, calibration=str(CALIBRATION)).build
    rows = drafters() if target is None or bad is None else drafters(target, bad)

    def build(around: Surroundings) -> Drafter:
        drafter = rows[row](around)
        assert drafter is not None
        return AutoK(drafter)

    return build


def rolled(engine: Engine) -> Rolled:
    """The engine with a die in place of its choice."""
    assert isinstance(engine.budget, GoodputLengths), "an adaptive drafter was not given a choice of depths"
    die = Rolled(4)
    engine._lengths = engine.budget = die
    return die


@pytest.mark.parametrize("cache", ["paged", "odd_blocks_tight"])
@pytest.mark.parametrize("row", ROWS)
def test_greedy_output_does_not_depend_on_depths(row: str, cache: str) -> None:
    engine = make_engine(adaptive(row), CACHES[cache], batch_size=5, step_tokens=12)
    die = rolled(engine)
    outputs = run(engine, make_requests(prompts(), GREEDY), join_every=1)
    assert outputs == plain_outputs()
    assert die.chosen == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("row", ROWS)
def test_sampled_output_follows_the_exact_law_at_any_depths(row: str) -> None:
    each = [replace(PROCESSORS["temperature"], max_tokens=7, seed=i) for i in range(1500)]
    requests = make_requests([PROMPT] * len(each), each)
    build = adaptive(row, SMALL, SMALL_BAD)
    engine = make_engine(build, CacheKind(blocks=20_000, block_size=4), target=SMALL, bad=SMALL_BAD, batch_size=3000)
    rolled(engine)
    run(engine, requests)
    check_sample([r.output.tolist() for r in requests], exact_law("temperature"), row)


def test_the_clock_decides_and_the_tokens_stay() -> None:
    engine = make_engine(adaptive("spire"), CACHES["paged"], batch_size=5)
    assert run(engine, make_requests(prompts(), GREEDY)) == plain_outputs()
    assert isinstance(engine.budget, GoodputLengths)
