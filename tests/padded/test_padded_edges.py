"""Ends of texts, wrong prompts, tokens that look like state, interrupts, and the arithmetic of the statistics."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from tiny import tiny_tokenizer
from zoo import CONTEXT, VOCAB, alone, noisy, texts, zoo

from steeple.errors import ConfigError, RequestError, UnsupportedModel
from steeple.padded import PaddedConfig, generate
from steeple.padded.config import SCHEDULE_NAMES
from steeple.padded.generate import SCHEDULES
from steeple.padded.pool import chosen
from steeple.request import Request
from steeple.types import SamplingParams

LENGTHS = (5, 1, 12, 3, 7, 20, 2, 9)


def test_settings_and_schedules_agree() -> None:
    assert tuple(SCHEDULES) == SCHEDULE_NAMES
    with pytest.raises(ConfigError, match="align"):
        PaddedConfig(schedule="alig")
    for wrong in ({"k": 0}, {"batch_size": 0}, {"window": 0}, {"waste": 1.0}):
        with pytest.raises(ConfigError):
            PaddedConfig(**wrong)
    with pytest.raises(ConfigError, match="batch_size"):
        generate(zoo("llama"), None, [[1]], batchsize=3)


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_an_end_token_in_mid_draft(schedule: str) -> None:
    """The assistant is the target, so every draft is accepted; ends lie at every place of a draft."""
    free = [alone(zoo("llama"), prompt, 12) for prompt in texts(LENGTHS)]
    ends = sorted({own[place] for place, own in enumerate(free)})
    expected = [alone(zoo("llama"), prompt, 12, ends) for prompt in texts(LENGTHS)]
    assert len({len(own) % 5 for own in expected}) > 2, "ends must come at several depths"
    for assistant in (zoo("llama"), noisy("llama")):
        out = generate(
            zoo("llama"), assistant, texts(LENGTHS), max_tokens=12, stop_token_ids=ends, batch_size=3,
            schedule=schedule,
        )  # fmt: skip
        assert [result.token_ids for result in out] == expected
        for result in out:
            ended = result.token_ids[-1] in ends
            assert result.finish_reason == ("stop" if ended else "length")


def test_the_models_own_end_token_and_ignoring_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo("llama")
    free = alone(model, [5, 9], 12)
    monkeypatch.setattr(model.generation_config, "eos_token_id", free[4])
    cut = free[: free.index(free[4]) + 1]
    assert generate(model, None, [[5, 9]], max_tokens=12)[0].token_ids == cut
    assert generate(model, None, [[5, 9]], max_tokens=12, ignore_eos=True)[0].token_ids == free
    monkeypatch.setattr(model.generation_config, "eos_token_id", [free[4], 60])
    assert generate(model, noisy("llama"), [[5, 9]], max_tokens=12)[0].token_ids == cut


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_prompts_may_hold_end_and_padding_tokens(schedule: str) -> None:
    """Padding is where lengths say, not where a token is 0; only written tokens can end a text."""
    end = 7
    prompts = [[0, 0, 0, 5], [end, 3], [0], [end, end, end, end, end], [4, 0, end, 0, 0], [end]]
    expected = [alone(zoo("llama"), prompt, 9, [end]) for prompt in prompts]
    for batch in (1, 4):
        out = generate(
            zoo("llama"), noisy("llama"), prompts, max_tokens=9, stop_token_ids=[end], batch_size=batch,
            schedule=schedule,
        )  # fmt: skip
        assert [result.token_ids for result in out] == expected


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_wrong_prompts_are_answered_and_the_others_finished(schedule: str) -> None:
    good = texts((3, 6))
    prompts = [good[0], [], [VOCAB], [-1], [3] * CONTEXT, "text", good[1]]
    out = generate(zoo("llama"), noisy("llama"), prompts, max_tokens=6, schedule=schedule, batch_size=2)
    assert [result.token_ids for result in (out[0], out[-1])] == [alone(zoo("llama"), own, 6) for own in good]
    words = ("empty", f"id {VOCAB}", "id -1", "context of", "tokenizer")
    for result, word in zip(out[1:-1], words, strict=True):
        assert (result.finish_reason, result.token_ids) == ("error", [])
        assert word in str(result.error)


def test_nothing_to_do() -> None:
    assert generate(zoo("llama"), noisy("llama"), []) == []
    assert len(generate(zoo("llama"), noisy("llama"), [[]])) == 1
    with pytest.raises(ConfigError, match="max_tokens"):
        generate(zoo("llama"), None, texts((2, 3)), max_tokens=[4])
    with pytest.raises(RequestError, match="temperature"):
        generate(zoo("llama"), None, texts((2,)), temperature=-1.0)


def test_models_that_are_no_decoders_are_refused() -> None:
    model = zoo("llama")
    model.config.is_encoder_decoder = True
    try:
        with pytest.raises(UnsupportedModel, match="encoder"):
            generate(model, None, texts((2,)))
    finally:
        model.config.is_encoder_decoder = False


def test_text_in_and_out() -> None:
    tokenizer = tiny_tokenizer()
    model = zoo("llama", len(tokenizer))
    out = generate(model, None, ["def area", tokenizer.encode("class Box")], tokenizer=tokenizer, max_tokens=7)
    for result, text in zip(out, ("def area", "class Box"), strict=True):
        assert result.token_ids == alone(model, tokenizer.encode(text), 7)
        assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert generate(model, None, [[3]], max_tokens=2)[0].text is None


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_an_interrupt_keeps_what_is_written(schedule: str) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    out = generate(
        zoo("llama"), noisy("llama"), texts(LENGTHS), max_tokens=14, schedule=schedule, batch_size=3, progress=stop
    )
    reasons = [result.finish_reason for result in out]
    assert reasons.count("length") >= 3
    assert reasons.count("cancelled") >= 2
    for result, prompt in zip(out, texts(LENGTHS), strict=True):
        assert result.token_ids == alone(zoo("llama"), prompt, len(result.token_ids))


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
@pytest.mark.parametrize("drafted", [False, True])
def test_statistics_add_up(schedule: str, drafted: bool) -> None:
    told, counts = [], [14, 3, 9, 20, 6, 11, 17, 8]
    out = generate(
        zoo("llama"), noisy("llama") if drafted else None, texts(LENGTHS), max_tokens=counts, schedule=schedule,
        batch_size=3, window=5, progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    stats, own = out.stats, [result.stats for result in out]
    written = sum(len(result.token_ids) for result in out)
    assert stats.committed == written == sum(counts)
    assert stats.speculation.committed == written - len(out), "rounds write all but the first token of each"
    assert stats.rows == stats.speculation.rounds == sum(each.rounds for each in own)
    assert stats.mean_rows == stats.rows / stats.rounds <= 3
    assert stats.prompt_tokens == sum(LENGTHS)
    assert 0 < stats.held <= stats.slots
    assert 0 <= stats.grouped <= stats.rounds
    assert stats.refills == 8 - (5 if schedule == "pool" else 3)
    assert told[-1] == (8, 8)
    assert told == sorted(told)
    busy = {part for part, seconds in stats.seconds.items() if seconds > 0}
    assert {"probe", "prefill", "verify", "judge"} <= busy
    assert ("draft" in busy) == drafted
    assert stats.total_seconds == pytest.approx(sum(stats.seconds.values()) - stats.seconds["probe"])
    for each in own:
        assert sum(each.accepted_at) == each.accepted <= each.drafted
        assert each.accepted <= each.committed <= each.accepted + each.rounds
    json.dumps(asdict(stats))


def test_the_pool_prefers_rows_of_one_length() -> None:
    requests = [Request(str(i), [1] * length, SamplingParams()) for i, length in enumerate((4, 7, 5, 7, 4, 7))]
    assert chosen(requests, 2) == ([requests[1], requests[3]], True)
    assert chosen(requests, 3) == ([requests[1], requests[3], requests[5]], True)
    assert chosen(requests, 4) == (requests[:4], False)
    assert chosen(requests[:1], 4) == (requests[:1], True)


def test_the_pool_groups_more_than_a_batch_does() -> None:
    prompts = texts((5, 1, 12, 3, 7, 6, 2, 9) * 2)
    rates = [
        generate(
            zoo("llama"), noisy("llama"), prompts, max_tokens=12, schedule=schedule, batch_size=2, window=16
        ).stats.grouping_rate
        for schedule in ("align", "pool")
    ]
    assert rates[0] < rates[1]
