"""The engine: what it refuses, what it counts, logprobs beside speculation, errors in the middle of a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_model

from steeple.draft import drafter_config
from steeple.draft.base import DrafterConfig
from steeple.draft.small_lm import SmallLMConfig
from steeple.engine import Engine, EngineConfig, build_engine, load_model
from steeple.engine.judge import _logprobs
from steeple.errors import CapacityError, ConfigError, InternalError, RequestError
from steeple.plan.memory import plan_cache
from steeple.request import FinishReason, Request
from steeple.types import SamplingParams

PROMPT = [5, 9, 200, 31, 7, 7, 120]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("engine") / "model", context=64)


def an_engine(folder: Path, drafter: str | DrafterConfig = "none", **settings: object) -> Engine:
    config = EngineConfig(**{"kv_tokens": 512, **settings})
    method = drafter_config(drafter) if isinstance(drafter, str) else drafter
    return build_engine(load_model(str(folder), config), config, method)


def finish(engine: Engine, *requests: Request) -> None:
    for request in requests:
        engine.add(request)
    while not engine.idle:
        engine.step()
    engine.check_integrity()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "request r: the prompt is empty; give at least one token"),
        ([1] * 64, r"prompt has 64 tokens and leaves no room to write in a context of 64; shorten it to 63 tokens"),
        ([1, 320], r"token ids outside 0\.\.319"),
        ([-1, 3], r"token ids outside 0\.\.319"),
    ],
)
def test_bad_prompts_are_refused_and_leave_nothing(folder: Path, prompt: list[int], message: str) -> None:
    engine = an_engine(folder)
    with pytest.raises(RequestError, match=message):
        engine.add(Request("r", prompt, SamplingParams()))
    assert engine.idle
    finish(engine, Request("r", PROMPT, SamplingParams(max_tokens=2)))


def test_a_request_that_can_never_fit_is_refused(folder: Path) -> None:
    engine = an_engine(folder, kv_tokens=16)
    with pytest.raises(CapacityError, match=r"request r: 47 positions \(prompt 7 \+ max_tokens 40\) .* cache of 16"):
        engine.add(Request("r", PROMPT, SamplingParams(max_tokens=40)))
    finish(engine, Request("r", PROMPT, SamplingParams(max_tokens=9)))


def test_an_id_belongs_to_one_request_at_a_time(folder: Path) -> None:
    engine = an_engine(folder)
    engine.add(Request("r", PROMPT, SamplingParams(max_tokens=2)))
    with pytest.raises(RequestError, match="'r' is in use"):
        engine.add(Request("r", PROMPT, SamplingParams()))
    finish(engine)
    finish(engine, Request("r", PROMPT, SamplingParams(max_tokens=2)))


def test_the_context_ends_a_request(folder: Path) -> None:
    for drafter in ("none", f"small_lm:{folder}"):
        request = Request("r", PROMPT, SamplingParams(max_tokens=500, ignore_eos=True))
        finish(an_engine(folder, drafter), request)
        assert len(request) == 64
        assert request.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("drafter", ["none", "self"])
def test_logprobs_are_those_of_transformers_at_every_position(folder: Path, drafter: str) -> None:
    methods = {"none": "none", "self": SmallLMConfig(model=str(folder))}
    engine = an_engine(folder, methods[drafter], step_tokens=3)
    loop = [3, 4, 5, 6] * 4
    requests = [
        Request("greedy", loop, SamplingParams(max_tokens=12, logprobs=4, ignore_eos=True)),
        Request("none", loop, SamplingParams(max_tokens=12)),
        Request("hot", PROMPT, SamplingParams(max_tokens=12, logprobs=0, temperature=0.9, top_k=5, seed=1)),
        Request("far", PROMPT, SamplingParams(max_tokens=9, logprobs=100, frequency_penalty=1.0, ignore_eos=True)),
    ]
    finish(engine, *requests)
    assert (engine.stats.speculation.accepted > 10) == (drafter == "self"), "something must be accepted to be shown"
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    assert requests[1].logprobs == []
    for request in (requests[0], *requests[2:]):
        assert [entry.token_id for entry in request.logprobs] == request.output.tolist()
        with torch.no_grad():
            logits = model(torch.from_numpy(request.tokens)[None]).logits[0, request.prompt_len - 1 : -1]
        logs = logits.float().log_softmax(-1)
        for entry, row in zip(request.logprobs, logs, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            best = row.topk(request.params.logprobs)
            assert [t for t, _ in entry.top] == best.indices.tolist()
            assert [v for _, v in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_more_logprobs_than_tokens_give_all_of_them() -> None:
    entry = _logprobs(torch.zeros(1, 7), [3], 50)[0]
    assert len(entry.top) == 7


def test_a_prompt_seen_before_is_not_computed_again(folder: Path) -> None:
    prompt = np.arange(1, 41).tolist()
    counted = {}
    for share in (True, False):
        engine = an_engine(folder, share_prefixes=share)
        finish(engine, Request("first", prompt, SamplingParams(max_tokens=3)))
        before = engine.stats.prompt_tokens
        finish(engine, Request("again", prompt, SamplingParams(max_tokens=3)))
        counted[share] = (before, engine.stats.prompt_tokens - before)
    # The last token of a prompt is the one that samples; of 40 tokens two blocks of 16 are found again.
    assert counted == {True: (39, 7), False: (39, 39)}


def test_times_and_steps_are_counted(folder: Path) -> None:
    engine = an_engine(folder, "ngram", step_tokens=4)
    finish(engine, Request("r", PROMPT, SamplingParams(max_tokens=6, ignore_eos=True)))
    stats = engine.stats
    assert stats.steps == stats.decode_steps + 2, "a prompt of 7 takes two steps of 4"
    assert stats.decode_steps == stats.speculation.rounds
    assert min(stats.draft_seconds, stats.verify_seconds, stats.other_seconds, stats.prompt_seconds) > 0


def test_a_failed_forward_leaves_everything_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for drafter in ("none", "ngram", f"small_lm:{folder}"):
        expected = Request("r", [3, 4] * 5, SamplingParams(max_tokens=15, ignore_eos=True))
        finish(an_engine(folder, drafter), expected)
        engine = an_engine(folder, drafter)
        request = Request("r", [3, 4] * 5, SamplingParams(max_tokens=15, ignore_eos=True))
        engine.add(request)
        while not engine.idle:
            text, cached = request.tokens.tolist(), request.cached
            with monkeypatch.context() as patch:
                patch.setattr(engine._judge, "judge", lambda *_: (_ for _ in ()).throw(InternalError("planted")))
                with pytest.raises(InternalError, match="planted"):
                    engine.step()
            assert (request.tokens.tolist(), request.cached) == (text, cached)
            engine.step()
        assert request.output.tolist() == expected.output.tolist()
        engine.check_integrity()


def test_a_loaded_model_runs_only_in_its_own_dtype(folder: Path) -> None:
    target = load_model(str(folder), EngineConfig())
    with pytest.raises(ConfigError, match=r"dtype = 'bfloat16', but the model was loaded in float32"):
        build_engine(target, EngineConfig(dtype="bfloat16"))


def test_integrity_is_checked_only_when_idle(folder: Path) -> None:
    engine = an_engine(folder)
    engine.add(Request("r", PROMPT, SamplingParams(max_tokens=3)))
    engine.step()
    with pytest.raises(InternalError, match="still running"):
        engine.check_integrity()
    engine.abort("r", FinishReason.ERROR, "given up")
    engine.abort("r")
    engine.abort("never seen")
    engine.check_integrity()


def test_memory_plan_says_what_is_missing() -> None:
    plan = plan_cache(available=10_000, bytes_per_token=10, block_size=16, max_context=100)
    assert plan.blocks == 31, "half of the memory, in whole blocks"
    assert plan.tokens * 10 == plan.bytes <= 5000
    assert plan_cache(available=10**9, bytes_per_token=10, block_size=16, max_context=100).tokens == 64 * 100
    assert (
        plan_cache(available=10_000, bytes_per_token=10, block_size=16, max_context=100, wanted_tokens=17).blocks == 2
    )
    with pytest.raises(CapacityError, match=r"kv_tokens = 500000 takes 48 MiB, 38 MiB more .* lower it to 104857"):
        plan_cache(available=10 << 20, bytes_per_token=100, block_size=10, max_context=9, wanted_tokens=500_000)
    with pytest.raises(CapacityError, match=r"a cache block takes 1\.6 MiB and 1\.0 MiB are free; lower block_size"):
        plan_cache(available=1 << 20, bytes_per_token=100 << 10, block_size=16, max_context=9)
