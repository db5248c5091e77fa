"""What a draft carries: the state of the row before the newest token, whatever happened to the request in between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from checks import GREEDY, SAMPLED, plain_outputs, prompts
from lab import CACHES, TARGET, dense, drafters, make_engine, make_requests, run
from test_adaptive import rolled

from steeple.draft.auto_k import AutoK
from steeple.draft.base import Drafter, Surroundings
from steeple.draft.windowed import WindowDrafter
from steeple.request import Request
from steeple.types import Draft


class Watched(AutoK):
    """Before every draft the carried states are compared with a fresh forward; after it each request's part of the
    draft with one for the request alone, and what greedy requests drafted with the laws along that path."""

    def __init__(self, drafter: WindowDrafter) -> None:
        super().__init__(drafter)
        self.inner, self.compared = drafter, 0

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        assert self.inner._states is not None
        states = self.inner._states.of([r.id for r in requests])
        found = TARGET.logits(states)
        for row, request in enumerate(requests):
            truth, _, _ = dense(TARGET, request.tokens[:-1].tolist())
            torch.testing.assert_close(found[row], truth[-1], atol=1e-4, rtol=0)
        draft = super().propose(requests, budget)
        for b, (request, nodes) in enumerate(zip(requests, budget, strict=True)):
            alone = super().propose([request], [nodes])
            tokens = alone.tokens.tolist()
            assert draft.tokens[draft.cu[b] : draft.cu[b + 1]].tolist() == tokens
            if tokens and request.params.greedy and not request.params.penalised:
                assert self.inner.forced_laws(request, np.array(tokens)).argmax(dim=-1).tolist() == tokens
            self.compared += nodes > 0
        return draft


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cache", sorted(CACHES))
@pytest.mark.parametrize("row", ["spire_carry", "spire_carry_all"])
def test_the_carried_state_is_the_targets_before_the_newest_token(row: str, cache: str, sampled: bool) -> None:
    watched: list[Watched] = []

    def build(around: Surroundings) -> Drafter:
        inner = drafters()[row](around)
        assert isinstance(inner, WindowDrafter)
        watched.append(Watched(inner))
        return watched[0]

    engine = make_engine(build, CACHES[cache], batch_size=5, step_tokens=12)
    rolled(engine)
    outputs = run(engine, make_requests(prompts(), SAMPLED if sampled else GREEDY, seeds=sampled), join_every=1)
    assert sampled or outputs == plain_outputs()
    assert watched[0].compared > 20
