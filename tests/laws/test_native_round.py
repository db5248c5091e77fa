"""A whole round of drafting in one native call drafts what its passes draft one by one, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from checks import prompts
from lab import BAD, CACHES, CPU, TARGET, make_engine, make_requests, run

from steeple.draft.auto_k import AutoK
from steeple.draft.base import Drafter, Surroundings
from steeple.draft.carry import Carry
from steeple.draft.small_lm import SmallLM, SmallLMConfig
from steeple.draft.sparse_self import SparseSelfConfig
from steeple.draft.spire import SpireDraftConfig, SpireParts, spire_drafter
from steeple.draft.spire_model import SpireShape, prune
from steeple.draft.windowed import WindowDrafter
from steeple.model.decoder import Decoder
from steeple.ops.kernels import kernels
from steeple.ops.native import library_path
from steeple.request import Request
from steeple.types import Draft, SamplingParams

pytestmark = pytest.mark.skipif(library_path("cpu") is None, reason="no native library here")
Build = Callable[[Surroundings], Drafter]


def packed(decoder: Decoder) -> Decoder:
    decoder.use(kernels(CPU))
    return decoder


def spire(*, carry: bool, choose: str = "window") -> Build:
    generator = torch.Generator().manual_seed(3)
    draft = prune(TARGET, 1)
    draft.head.weight.add_(torch.randn(draft.head.weight.shape, generator=generator) * 0.3)
    shape = SpireShape(target_layers=(TARGET.config.num_layers - 1,), sink=1, window=3, carry=carry)
    carried = Carry(TARGET.config.hidden_size).requires_grad_(False) if carry else None
    if carried is not None:
        carried.projection.weight.normal_(std=0.2, generator=generator)
        carried.projection.use(kernels(CPU).pack)
    parts = SpireParts(packed(draft), None, carried)
    return lambda around: spire_drafter(SpireDraftConfig(k=4, choose=choose), shape, parts, around)


BUILDS: dict[str, Build] = {
    "spire": spire(carry=False),
    "carry": spire(carry=True),
    "pillar": spire(carry=True, choose="pillar"),
    "sparse_self": SparseSelfConfig(sink=1, window=3, k=4).build,
    "small_lm": lambda around: SmallLM(SmallLMConfig(k=4), packed(copy.deepcopy(BAD)), around),
    "compact": SparseSelfConfig(sink=1, window=3, k=4, compact=True).build,
}


class Twice(AutoK):
    """Every draft is made in one call, then pass by pass, and compared."""

    def __init__(self, drafter: WindowDrafter | SmallLM) -> None:
        super().__init__(drafter)
        self.inner, self.rounds, self.parted = drafter, 0, 0

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> Draft:
        inner, calls = self.inner, [0]
        native = inner._round
        assert native is not None

        def counted(*given: object) -> object:
            calls[0] += 1
            return native(*given)  # type: ignore[arg-type]

        inner._round = counted  # type: ignore[assignment]
        found = super().propose(requests, budget)
        inner._round = None
        if isinstance(inner, SmallLM):  # its cache holds the draft of the first proposal; the text decides
            for request in requests:
                inner._states[request.id].nodes = []
                inner._states[request.id].cached = min(inner._states[request.id].cached, len(request) - 1)
        wanted = super().propose(requests, budget)
        inner._round = native
        assert torch.equal(found.tokens, wanted.tokens)
        assert torch.equal(found.row, wanted.row)
        assert (found.probs is None) == (wanted.probs is None)
        if found.probs is not None and wanted.probs is not None:
            assert torch.equal(found.probs, wanted.probs)
        self.rounds += calls[0] > 0
        self.parted += calls[0] > 1
        return found


LAWS = {
    "greedy": SamplingParams(max_tokens=40),
    "temperature": SamplingParams(temperature=0.9, max_tokens=40),
    "top_k": SamplingParams(temperature=0.9, top_k=3, max_tokens=40),
}


@pytest.mark.parametrize("law", sorted(LAWS))
@pytest.mark.parametrize("name", sorted(BUILDS))
def test_one_call_drafts_what_the_passes_draft(name: str, law: str) -> None:
    made: list[Twice] = []

    def build(around: Surroundings) -> Drafter:
        inner = BUILDS[name](around)
        assert isinstance(inner, WindowDrafter | SmallLM)
        made.append(Twice(inner))
        return made[0]

    engine = make_engine(build, CACHES["paged"], target=packed(copy.deepcopy(TARGET)), batch_size=5)
    die = iter(range(10**6))
    # Every third round is ragged: a call as far as all chains reach, then one for those that go on.
    engine._lengths = None
    engine.budget = lambda request: 4 if (next(die) // 5) % 3 else 1 + len(request) % 4
    each = [replace(LAWS[law], seed=i) for i in range(8)]
    run(engine, make_requests(prompts(), each), join_every=1)
    if law == "top_k":
        assert made[0].rounds == 0
    else:
        assert made[0].rounds >= 5
        assert made[0].parted >= 2
