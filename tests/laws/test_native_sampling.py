"""The exact law once more, through the native sampler: the engines of the other laws have decoders of torch alone."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
from checks import ENUMERATED, PROCESSORS, PROMPT, SMALL, SMALL_BAD, exact_law
from exact import check_sample
from lab import CPU, CacheKind, drafters, make_engine, make_requests, run
from numpy.typing import NDArray
from torch import Tensor

from steeple.model.decoder import Decoder
from steeple.ops.kernels import kernels
from steeple.ops.native import library_path
from steeple.ops.sampling import NativeSampler
from steeple.types import Draft

pytestmark = pytest.mark.skipif(library_path("cpu") is None, reason="no native library here")
ROWS = ("none", "ngram", "small_lm", "small_lm_self", "sparse_self", "spire", "spire_memory")
Floats = NDArray[np.float64]


@functools.cache
def packed(bad: bool) -> Decoder:
    decoder = copy.deepcopy(SMALL_BAD if bad else SMALL)
    decoder.use(kernels(CPU))
    return decoder


def check(row: str, processors: tuple[str, ...] = ("temperature", "penalties"), samples: int = 2000) -> None:
    names = [name for name in processors for _ in range(samples)]
    each = [replace(PROCESSORS[name], max_tokens=ENUMERATED + 3, seed=i) for i, name in enumerate(names)]
    requests = make_requests([PROMPT] * len(each), each)
    cache = CacheKind(blocks=20_000, block_size=4)
    build = drafters(SMALL, packed(True))[row]
    engine = make_engine(build, cache, target=packed(False), batch_size=5000)
    run(engine, requests)
    for name in processors:
        outputs = [r.output.tolist() for r, own in zip(requests, names, strict=True) if own == name]
        check_sample(outputs, exact_law(name), f"{row}, {name}")


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of the native judge, so that no test passes by another way."""
    calls: list[int] = []
    judge = NativeSampler.judge

    def counting(self: NativeSampler, logits: Tensor, draft: Draft, *rest: object) -> object:
        calls.append(draft.tokens.shape[0])
        return judge(self, logits, draft, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(NativeSampler, "judge", counting)
    return calls


@pytest.mark.parametrize("row", ROWS)
def test_sampled_output_follows_the_exact_law(row: str, counted: list[int]) -> None:
    check(row)
    assert counted
    assert max(counted) > 0 or row == "none"


def accept_all(logits: Tensor, draft: Draft, t: Tensor, accept: Floats, last: Floats) -> tuple[object, ...]:
    return logits, draft, t, accept * 0, last


def one_number(logits: Tensor, draft: Draft, t: Tensor, accept: Floats, last: Floats) -> tuple[object, ...]:
    owner = np.repeat(np.arange(last.shape[0]), draft.counts.numpy())
    return logits, draft, t, last[owner] if accept.shape == owner.shape else accept, last


def other_law(logits: Tensor, draft: Draft, t: Tensor, accept: Floats, last: Floats) -> tuple[object, ...]:
    probs = None if draft.probs is None else draft.probs.flip(-1).contiguous()
    return logits, replace(draft, probs=probs), t, accept, last


def colder(logits: Tensor, draft: Draft, t: Tensor, accept: Floats, last: Floats) -> tuple[object, ...]:
    return logits, draft, t * 0.8, accept, last


@pytest.mark.parametrize("defect", [accept_all, one_number, other_law, colder])
def test_defects_turn_it_red(defect: object, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = NativeSampler.judge
    monkeypatch.setattr(NativeSampler, "judge", lambda self, *given: judge(self, *defect(*given)))  # type: ignore[operator]
    with pytest.raises(AssertionError):
        check("small_lm", ("temperature",), 3000)
