"""The parts of ``bench serve``: events, records, schedules, prompts, percentiles, goodput, acceptance, settings."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_server import event, text

from steeple.bench.serve.acceptance import Acceptance, of_answer, pooled, read_counters
from steeple.bench.serve.config import ServeBenchConfig
from steeple.bench.serve.load import Point, lengths, points
from steeple.bench.serve.record import Failed, Record
from steeple.bench.serve.rows import acceptance, in_flight, missed, summary
from steeple.bench.serve.sse import EventReader
from steeple.bench.serve.workload import CHARACTERS, SHIFT, Lines, Text, calls
from steeple.errors import ConfigError
from steeple.evidence.prompts import Source

ODD = "\u00e4\u2028\u0085\x0b\U0001f600"
STREAM = f"data: one\n\n: a comment\r\ndata:two\r\ndata:  2\r\n\r\nevent: x\rid: 7\rdata: {ODD}\r\rdata: end"
EVENTS = ["one", "two\n 2", ODD, "end"]


def read(pieces: list[bytes]) -> list[str]:
    reader = EventReader()
    return [data for piece in pieces for data in reader.feed(piece)] + list(reader.end())


def test_events_do_not_depend_on_where_bytes_are_cut() -> None:
    whole = STREAM.encode()
    assert read([whole]) == EVENTS
    assert read([whole[i : i + 1] for i in range(len(whole))]) == EVENTS
    for cut in range(len(whole)):
        assert read([whole[:cut], whole[cut:]]) == EVENTS


def test_an_event_is_told_with_its_last_byte_and_not_before() -> None:
    reader = EventReader()
    assert list(reader.feed(b"data: a\n")) == []
    assert list(reader.feed(b"\ndata: b")) == ["a"]
    assert list(reader.feed(b"\n\n")) == ["b"]
    assert list(reader.end()) == []


def heard(*said: tuple[float, bytes], intended: float = 0.0, sent: float = 0.0) -> Record:
    record = Record(0, intended, sent=sent)
    for now, data in said:
        for one in read([data]):
            record.take(one, now)
    return record


def test_latencies_of_a_record_from_both_origins() -> None:
    record = heard((3.0, text()), (3.5, text()), (5.5, text(finish="stop")), intended=1.0, sent=2.0)
    record.output_tokens = 6
    assert (record.ttft(), record.ttft(from_send=True)) == (2.0, 1.0)
    assert (record.e2e(), record.e2e(from_send=True)) == (4.5, 3.5)
    assert record.gaps == [0.5, 2.0]
    assert record.tpot == (5.5 - 3.0) / 5
    assert record.token_gaps is None  # nobody said how many tokens came with which chunk
    record.output_tokens = None
    assert (record.tokens, record.tpot) == (3, 1.25)


def test_a_gap_is_shared_by_the_tokens_that_it_brought() -> None:
    record = heard((1.0, text(count=2)), (2.0, text(count=6)), (2.5, text(count=6)), (3.0, text(count=7)))
    assert record.gaps == [1.0, 0.5, 0.5]
    assert record.token_gaps == [0.25] * 4 + [1.0]
    assert record.output_tokens == 7


def test_what_counts_as_a_chunk() -> None:
    opening = event({"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": {"completion_tokens": 1}})
    words = event({"choices": [{"delta": {"content": "a"}}]})
    thought = event({"choices": [{"delta": {"reasoning_content": "b"}}]})
    over = event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    record = heard((1.0, opening), (2.0, words), (3.0, thought), (4.0, over))
    assert (record.heard, record.ended) == ([2.0, 3.0], 4.0)
    held_back = heard((1.0, text("", count=1)), (2.0, text("", count=1)), (3.0, text("", "stop", count=2)))
    assert held_back.heard == [1.0, 3.0]
    nothing = heard((2.0, text("", "stop")))
    assert (nothing.heard, nothing.ended, nothing.tpot) == ([2.0], 2.0, None)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("{", "malformed stream"),
        ("[1]", "malformed stream"),
        ('{"choices": 3}', "malformed stream"),
        ('{"choices": ["x"]}', "malformed stream"),
        ('{"usage": {"completion_tokens": "many"}}', "malformed stream"),
        ('{"error": {"message": "out of memory"}}', "error in stream"),
        ('{"error": "no"}', "error in stream"),
    ],
)
def test_events_that_end_a_request(said: str, kind: str) -> None:
    with pytest.raises(Failed) as failed:
        Record(0, 0.0).take(said, 1.0)
    assert failed.value.kind == kind
    if "memory" in said:
        assert failed.value.message == "out of memory"


def test_a_stream_must_say_that_it_is_over() -> None:
    with pytest.raises(Failed, match="after 1 chunks"):
        heard((1.0, text(finish="stop"))).check()
    with pytest.raises(Failed, match="without text"):
        heard((1.0, b"data: [DONE]\n\n")).check()
    heard((1.0, text(finish="stop") + b"data: [DONE]\n\n")).check()


# --- schedules


def test_poisson_arrivals_have_their_rate_and_follow_from_the_seed() -> None:
    (point,) = points(ServeBenchConfig(requests=20_000, rate=(4.0,), seed=3))
    gaps = np.diff(point.times, prepend=0.0)
    assert abs(gaps.mean() - 0.25) < 4 * 0.25 / math.sqrt(20_000)
    assert abs(gaps.std() - 0.25) < 0.02  # an exponential law's deviation is its mean
    assert (point.arrivals, point.rate) == ("poisson", 4.0)
    again, other = (points(ServeBenchConfig(requests=50, rate=(4.0,), seed=s))[0] for s in (3, 4))
    np.testing.assert_array_equal(again.times, point.times[:50])
    assert not np.any(again.times == other.times)


def test_rates_and_limits_are_crossed_and_rates_share_their_draws() -> None:
    found = points(ServeBenchConfig(requests=9, rate=(1.0, 2.0, math.inf), concurrency=(0, 3)))
    assert [(p.rate, p.limit) for p in found] == [(r, c) for r in (1.0, 2.0, math.inf) for c in (0, 3)]
    np.testing.assert_allclose(found[0].times, 2 * found[2].times)
    assert found[4].arrivals == "at once"
    assert not found[4].times.any()
    assert points(ServeBenchConfig())[0].rate == math.inf


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n10,100,5\n11,20,300\n14,3000,7\n")
    return file


def test_a_trace_gives_times_and_lengths(trace: Path) -> None:
    config = ServeBenchConfig(trace=trace, requests=3, time_scale=0.5, max_tokens=64, max_prompt=1000)
    (point,) = points(config)
    assert (list(point.times), point.arrivals, point.rate) == ([0.0, 0.5, 2.0], "trace", 1.0)
    wanted = lengths(config, whole=False)
    assert (wanted.prompt, wanted.output, wanted.clipped) == ([100, 20, 1000], [5, 64, 7], 1)
    (faster,) = points(ServeBenchConfig(trace=trace, requests=3, rate=(2.0,)))
    np.testing.assert_allclose(faster.times, [0.0, 0.25, 1.0])
    assert faster.arrivals == "trace"


def test_lengths_without_a_trace() -> None:
    assert lengths(ServeBenchConfig(requests=2), whole=True).prompt == [0, 0]
    assert lengths(ServeBenchConfig(requests=2), whole=False).prompt == [256, 256]
    assert lengths(ServeBenchConfig(requests=2, prompt_tokens=9), whole=True).prompt == [9, 9]
    drawn = lengths(ServeBenchConfig(requests=400, lengths="conversation", prompt_tokens=1000), whole=False).prompt
    assert max(drawn) == 1000
    assert 200 < np.median(drawn) < 300  # 1020 of 4142 tokens in the trace


# --- prompts

SOURCE = Source("some", ("abcdefghij" * 3, "", "0123456789" * 2))


def take(prompts: Text | Lines, *wanted: int) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return [await prompts.take(length) for length in wanted]

    return asyncio.run(all_of_them())


def test_text_is_cut_into_characters_where_nobody_counts_tokens() -> None:
    first, second = take(Text(SOURCE, 0), 3, 5)
    assert (len(first[0]), len(second[0])) == (3 * CHARACTERS, 5 * CHARACTERS)
    assert first[1] is None
    orders = ("abcdefghij" * 3 + "0123456789" * 2, "0123456789" * 2 + "abcdefghij" * 3)
    assert any(order.startswith(first[0] + second[0]) for order in orders)


def test_token_prompts_are_exact_and_shift_when_the_text_comes_again() -> None:
    asked: list[str] = []

    async def encode(said: str) -> list[int]:
        asked.append(said)
        return [ord(letter) for letter in said]

    source = Source("long", ("".join(map(chr, range(1, 61))),))
    prompts = Text(source, 0, encode, start=[0])
    found = take(prompts, *[21] * 6)
    assert all(count == 21 == len(tokens) and tokens[0] == 0 for tokens, count in found)
    body = [token for tokens, _ in found for token in tokens[1:]]
    assert body == ([*range(1, 61), *range(1 + SHIFT, 61), *range(1 + 2 * SHIFT, 61)])[: len(body)]
    assert len({tuple(tokens) for tokens, _ in found}) == 6
    assert (prompts.rounds, len(asked)) == (2, 3)
    assert take(Text(source, 0, encode, start=[0]), *[21] * 6) == found


def test_lines_come_whole_in_order_and_again() -> None:
    lines = Lines(Source("lines", ("a", "b")))
    assert [prompt for prompt, _ in take(lines, 0, 0)] == ["a", "b"]
    assert lines.rounds == 0
    assert take(lines, 0) == [("a", None)]
    assert lines.rounds == 1
    for empty in (lambda: Lines(Source("none", ())), lambda: Text(Source("none", ("",)), 0)):
        with pytest.raises(ConfigError, match="give another file"):
            empty()


def test_calls_carry_the_schedule_and_take_new_prompts() -> None:
    config = ServeBenchConfig(requests=4, rate=(1.0,), prompt_tokens=2, max_tokens=7)
    (point,) = points(config)
    prompts = Text(SOURCE, 0)

    async def twice() -> list[Any]:
        wanted = lengths(config, whole=False)
        return [await calls(point.times, wanted, prompts, 0) for _ in range(2)]

    first, second = asyncio.run(twice())
    assert [call.at for call in first] == list(point.times)
    assert {call.max_tokens for call in first} == {7}
    assert len({call.seed for call in first}) == 4
    assert first[0].prompt != second[0].prompt
    assert [call.seed for call in first] == [call.seed for call in second]


# --- numbers


def test_percentiles_are_interpolated() -> None:
    found = summary("ttft", [0.004, 0.001, 0.003, 0.002])
    assert found["mean_ttft_ms"] == found["median_ttft_ms"] == found["p50_ttft_ms"] == pytest.approx(2.5)
    assert found["p90_ttft_ms"] == pytest.approx(3.7)
    assert found["p99_ttft_ms"] == pytest.approx(3.97)
    assert found["max_ttft_ms"] == 4.0
    assert found["std_ttft_ms"] == pytest.approx(math.sqrt(1.25))
    assert set(summary("itl", []).values()) == {None}


def test_a_request_is_good_if_it_meets_every_objective() -> None:
    record = heard((0.5, text()), (1.0, text()), (3.0, text(finish="stop")), intended=0.25, sent=0.4)
    exact = {"ttft": 250.0, "itl": 2000.0, "tpot": 1250.0, "e2e": 2750.0}
    assert missed(record, exact) == []  # at most, so equal is good; and the clock starts at the intended time
    for name, most in exact.items():
        assert missed(record, {**exact, name: most - 1}) == [name]
    assert missed(record, dict.fromkeys(exact, 1.0)) == list(exact)
    assert missed(record, {}) == []
    alone = heard((0.5, text(finish="stop")), intended=0.25)
    assert missed(alone, {"itl": 1.0, "tpot": 1.0}) == []


def test_in_flight_is_counted_over_half_open_spans() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (9.0, 9.0)]
    assert in_flight([Record(i, 0.0, sent=sent, ended=ended) for i, (sent, ended) in enumerate(spans)]) == 2
    assert in_flight([]) == 0


# --- acceptance

SAID = {
    "num_spec_steps": 4, "num_draft_tokens": 12, "num_accepted_draft_tokens": 5, "acceptance_histogram": [1, 2, 0, 1],
}  # fmt: skip


def test_acceptance_of_answers() -> None:
    one = of_answer(SAID)
    assert one == Acceptance(4, 12, 5, [3, 1, 1])
    assert one.row() == {
        "tau": 2.25,
        "spec_decode_acceptance_length": 2.25,
        "spec_decode_acceptance_rate": pytest.approx(500 / 12),
        "spec_decode_num_drafts": 4,
        "spec_decode_draft_tokens": 12,
        "spec_decode_accepted_tokens": 5,
        "spec_decode_per_position_acceptance_rates": [0.75, 0.25, 0.25],
    }
    assert pooled([one, Acceptance(6, 6, 6, [6])]) == Acceptance(10, 18, 11, [9, 1, 1])
    assert of_answer({"num_spec_steps": 4}) is None
    assert of_answer({**SAID, "acceptance_histogram": None}) is None
    assert Acceptance().row()["tau"] is None


def page(drafts: float, prefix: str = "vllm:", engines: int = 2) -> str:
    lines = [f"# TYPE {prefix}spec_decode_num_drafts_total counter"]
    for engine in range(engines):
        mark = f'model_name="num_drafts",engine="{engine}"'
        lines += [
            f"{prefix}spec_decode_num_drafts_total{{{mark}}} {drafts}",
            f"{prefix}spec_decode_num_drafts_created{{{mark}}} 1.7e9",
            f"{prefix}spec_decode_num_draft_tokens_total{{{mark}}} {4 * drafts}",
            f"{prefix}spec_decode_num_accepted_tokens_total{{{mark}}} {1.5 * drafts}",
            f'{prefix}spec_decode_num_accepted_tokens_per_pos_total{{{mark},position="0"}} {drafts}',
            f'{prefix}spec_decode_num_accepted_tokens_per_pos_total{{{mark},position="2"}} {drafts / 2}',
            f"{prefix}prompt_tokens_total{{{mark}}} 99",
        ]
    return "\n".join(lines) + "\n"


def test_acceptance_out_of_counters() -> None:
    before, after = read_counters(page(2)), read_counters(page(10))
    assert before == Acceptance(4, 16, 6, [4, 0, 2])
    assert after is not None
    assert after.since(before) == Acceptance(16, 64, 24, [16, 0, 8])
    assert before.since(after) is None  # the server was started again in between
    both = page(8, "vllm:", 1) + page(2, "steeple_", 1)
    assert read_counters(both) == Acceptance(2, 8, 3, [2, 0, 1])  # one name of each counter, not two
    assert read_counters("steeple_prompt_tokens_total 3\n") is None
    assert read_counters("<html>no such page</html>") is None


def test_answers_win_over_counters_if_all_of_them_say_it() -> None:
    counters = Acceptance(100, 100, 50, [50])
    telling = [Record(i, 0.0, speculation=SAID) for i in range(2)]
    found = acceptance(telling, counters)
    assert (found["acceptance_from"], found["spec_decode_num_drafts"], found["tau"]) == ("responses", 8, 2.25)
    assert found["mean_tau_of_requests"] == 2.25
    found = acceptance([*telling, Record(2, 0.0)], counters)
    assert (found["acceptance_from"], found["tau"]) == ("metrics", 1.5)
    found = acceptance([Record(2, 0.0)], None)
    assert (found["acceptance_from"], found["tau"]) == (None, None)


# --- settings


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"base_url": "localhost:8000"}, "give one like http://host:8000"),
        ({"base_url": "http://host:port"}, "give one like http://host:8000"),
        ({"base_url": "http://me:secret@host"}, "holds a password"),
        ({"rate": (0.0,)}, "ServeBenchConfig.rate = 0.0 is out of range"),
        ({"rate": (1.0, 1.0)}, "names a value twice"),
        ({"rate": (math.nan,)}, "out of range"),
        ({"concurrency": (-1,)}, "ServeBenchConfig.concurrency = -1"),
        ({"requests": 0}, "ServeBenchConfig.requests = 0"),
        ({"lengths": "convresation"}, "Did you mean 'conversation'?"),
        ({"details": "yes"}, "ServeBenchConfig.details = 'yes'"),
        ({"extra": "{"}, "is no JSON"),
        ({"extra": "[1]"}, "is no JSON object"),
        ({"extra": '{"stream": false}'}, "sets 'stream'"),
        ({"time_scale": 2.0}, "time_scale is only for a trace"),
        ({"max_prompt": 9}, "max_prompt is only for a trace"),
        ({"trace": Path("t.csv"), "prompt_tokens": 9}, "prompt_tokens: the trace says"),
        ({"trace": Path("t.csv"), "lengths": "code"}, "lengths: the trace says"),
        ({"trace": Path("t.csv"), "rate": (2.0,), "time_scale": 2.0}, "does not go with rate"),
        ({"k": -1}, "ServeBenchConfig.k = -1"),
        ({"timeout": 0.0}, "ServeBenchConfig.timeout = 0.0"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ServeBenchConfig(**values)
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)


def test_settings_as_json_and_address() -> None:
    config = ServeBenchConfig(rate=(2.0, math.inf), trace=Path("folder/of/mine/t.csv"), base_url="https://host/v1/")
    shown = config.shown()
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert (shown["rate"], shown["trace"]) == ([2.0, "inf"], "t.csv")
    assert config.root == "https://host"
    assert ServeBenchConfig(base_url="http://host:1/api/v1").root == "http://host:1/api"


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEEPLE_API_KEY", raising=False)
    assert ServeBenchConfig().key() == ""
    monkeypatch.setenv("STEEPLE_API_KEY", "abc")
    assert ServeBenchConfig().key() == "abc"
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"\$MY_KEY is not set"):
        ServeBenchConfig(api_key_env="MY_KEY").key()


def test_labels_of_points() -> None:
    assert Point(math.inf, 0, "at once", np.zeros(1)).label == "all at once"
    assert Point(2.5, 8, "poisson", np.zeros(1)).label == "2.5 requests/s, at most 8 in flight"
