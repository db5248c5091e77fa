"""``bench serve`` against a scripted server under a clock that jumps: schedules, waits, faults, sweeps, results."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from scripted_server import DONE, Answer, Scripted, VirtualLoop, answer, event, text, usage

from steeple.bench.serve.config import ServeBenchConfig
from steeple.bench.serve.plots import latency_figure, throughput_figure
from steeple.bench.serve.run import run_serve_bench
from steeple.bench.serve.table import serve_markdown, serve_table
from steeple.cli import bench_serve, main
from steeple.errors import ConfigError

SAID = {
    "num_spec_steps": 4, "num_draft_tokens": 12, "num_accepted_draft_tokens": 5, "acceptance_histogram": [1, 2, 0, 1],
}  # fmt: skip


@pytest.fixture(autouse=True)
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small file of prompts, so that no test reads the standard library; no key in the environment."""
    monkeypatch.delenv("STEEPLE_API_KEY", raising=False)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(40)))
    return str(file)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Requests at 0, 0.5 and 1 s, each of 2 tokens and 9 to be written."""
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n7,2,9\n7.5,2,9\n8,2,9\n")
    return file


def bench(server: Scripted, prompts: str, **settings: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"prompts": prompts, "warmup": 0, "detailed": True} | settings
    return run_serve_bench(ServeBenchConfig(**values), argv=["x"], transport=server, loop_factory=VirtualLoop)


def times(row: dict[str, Any], name: str) -> list[float]:
    return [request[name] for request in row["requests"]]


def test_slow_answers_do_not_hold_up_the_schedule(lines: str, trace: Path) -> None:
    server = Scripted(lambda number: answer(4.0, 0.25, 0.5))
    (row,) = bench(server, lines, trace=trace, requests=3)["rows"]
    assert server.times == times(row, "sent") == times(row, "intended") == [0.0, 0.5, 1.0]
    assert row["max_concurrent_requests"] == 3
    assert row["duration"] == 1.0 + 4.75
    assert (row["p50_ttft_ms"], row["p50_e2el_ms"], row["p50_tpot_ms"]) == (4000.0, 4750.0, 375.0)
    assert (row["p50_itl_ms"], row["max_itl_ms"]) == (375.0, 500.0)
    assert (row["request_rate"], row["arrivals"]) == (2.0, "trace")


def test_waiting_for_a_place_belongs_to_the_latency(lines: str, trace: Path) -> None:
    """One at a time, 4.75 s each: the second is 4.25 s late, the third 8.5 s. To a closed loop all three are equal."""
    server = Scripted(lambda number: answer(4.0, 0.25, 0.5))
    (row,) = bench(server, lines, trace=trace, requests=3, concurrency=(1,))["rows"]
    assert times(row, "intended") == times(row, "dispatched") == [0.0, 0.5, 1.0]
    assert times(row, "sent") == [0.0, 4.75, 9.5]
    assert (row["p50_queue_ms"], row["max_queue_ms"], row["max_lag_ms"]) == (4250.0, 8500.0, 0.0)
    assert (row["p50_ttft_ms"], row["max_ttft_ms"]) == (8250.0, 12500.0)
    assert (row["p50_ttft_from_send_ms"], row["max_ttft_from_send_ms"]) == (4000.0, 4000.0)
    assert (row["max_e2el_ms"], row["max_e2el_from_send_ms"]) == (13250.0, 4750.0)
    assert row["max_concurrent_requests"] == row["max_concurrency"] == 1


def test_a_generator_that_is_late_says_so_and_counts_it(lines: str, trace: Path) -> None:
    """The process is busy for 0.75 s while it sends the first request, so that it gets to the second 0.25 s late."""

    def script(number: int) -> Answer:
        if number == 0:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.selector.now += 0.75
        return answer(0.5)

    result = bench(Scripted(script), lines, trace=trace, requests=3)
    (row,) = result["rows"]
    assert times(row, "intended") == [0.0, 0.5, 1.0]
    assert times(row, "dispatched") == times(row, "sent") == [0.0, 0.75, 1.0]
    assert (row["max_lag_ms"], row["max_ttft_ms"], row["p50_ttft_ms"]) == (250.0, 1250.0, 750.0)
    assert "the generator itself was 245 ms late (p99)" in shown(result)


def test_throughput_and_goodput(lines: str) -> None:
    """Two of four meet both objectives: one is late with its first token, one stalls in between."""
    answers = [answer(0.5, 0.5), answer(1.5, 0.25), answer(0.25, 1.5), answer(1.0, 1.0)]
    server = Scripted(lambda number: answers[number])
    (row,) = bench(server, lines, requests=4, ttft_ms=1000.0, itl_ms=1000.0)["rows"]
    assert row["duration"] == 2.0
    assert (row["request_throughput"], row["request_goodput"], row["goodput_share"]) == (2.0, 1.0, 0.5)
    assert row["missed"] == {"ttft": 1, "itl": 1}
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (20, 8)
    assert (row["output_throughput"], row["total_token_throughput"]) == (4.0, 14.0)
    (row,) = bench(Scripted(lambda number: answers[number]), lines, requests=4)["rows"]
    assert (row["request_goodput"], row["goodput_share"], row["missed"]) == (None, None, {})


FAULTS: dict[str, Answer | Exception] = {
    "http 429": Answer(status=429, wait=0.25, body=b'{"error": {"message": "queue full"}}'),
    "http 500": Answer(status=500),
    "broken stream": Answer([(0.5, text()), (0.5, httpx.ReadError("reset"))]),
    "malformed stream": Answer([(0.5, text()), (0.5, b"data: {oops\n\n"), (9.0, DONE)]),
    "error in stream": Answer([(0.5, text()), (0.25, event({"error": {"message": "engine died"}}) + DONE)]),
    "no connection": httpx.ConnectError("refused"),
    "timeout": Answer([(7.0, text())]),
}


def test_every_request_is_accounted_for(lines: str) -> None:
    quiet_end = Answer([(0.5, text()), (0.5, text())])  # the connection closes in order, the stream is not over
    late_break = Answer([(0.5, text(finish="stop") + usage(1) + DONE), (0.5, httpx.ReadError("reset"))])
    answers = [*FAULTS.values(), quiet_end, answer(1.0, 1.0), Answer([(0.5, b"\xff\n\n"), (0.0, DONE)]), late_break]
    answers.append(Answer([(0.5, b"data: \xff\n\n"), (0.0, DONE)]))
    server = Scripted(lambda number: answers[number])
    (row,) = bench(server, lines, requests=len(answers), timeout=4.0, e2e_ms=1500.0)["rows"]
    assert row["errors"] == {
        "http 429": 1, "http 500": 1, "broken stream": 3, "malformed stream": 2, "error in stream": 1,
        "no connection": 1, "timeout": 1,
    }  # fmt: skip
    assert (row["completed"], row["failed"], row["num_prompts"]) == (2, 10, 12)
    assert sum(row["errors"].values()) == row["failed"]
    assert row["error_examples"]["http 429"] == '{"error": {"message": "queue full"}}'
    assert row["error_examples"]["error in stream"] == "engine died"
    # what failed has no part in latencies and tokens, but its time counts
    assert (row["max_ttft_ms"], row["p50_ttft_ms"], row["max_e2el_ms"]) == (1000.0, 750.0, 2000.0)
    assert row["total_output_tokens"] == 3
    assert row["duration"] == 4.0
    assert (row["goodput_share"], row["request_goodput"]) == (1 / 12, 0.25)
    ended = dict(zip(times(row, "index"), times(row, "ended"), strict=True))
    assert [ended[i] for i in range(7)] == [0.25, 0.0, 1.0, 1.0, 0.75, 0.0, 4.0]
    assert [request["error"] for request in row["requests"]][:7] == list(FAULTS)


def test_a_timeout_counts_from_sending(lines: str) -> None:
    """The second waits 3 s for its place and then has 4 s of its own; the third is cut off."""
    answers = [answer(3.0), answer(3.5), Answer([(3.0, text()), (3.0, text())])]
    server = Scripted(lambda number: answers[number])
    (row,) = bench(server, lines, requests=3, concurrency=(1,), timeout=4.0)["rows"]
    assert [request["error"] for request in row["requests"]] == [None, None, "timeout"]
    assert times(row, "ended") == [3.0, 6.5, 10.5]


def test_a_point_without_any_success(lines: str) -> None:
    result = bench(Scripted(lambda number: Answer(status=503)), lines, requests=3, ttft_ms=5.0)
    (row,) = result["rows"]
    assert (row["completed"], row["errors"], row["p99_ttft_ms"]) == (0, {"http 503": 3}, None)
    assert (row["output_throughput"], row["request_goodput"], row["goodput_share"]) == (0.0, 0.0, 0.0)
    assert bench_serve.nothing_done(result)
    assert [len(line.get_ydata()) for line in latency_figure(result).axes[0].get_lines()[:4]] == [0] * 4
    assert list(throughput_figure(result).axes[1].get_lines()[0].get_ydata()) == [0.0]
    assert "3 x http 503" in shown(result)


def test_a_sweep_sends_new_prompts_at_every_point(lines: str) -> None:
    server = Scripted(lambda number: answer(0.25))
    result = bench(server, lines, requests=4, rate=(2.0, math.inf), concurrency=(0, 2))
    assert [(row["request_rate"], row["max_concurrency"]) for row in result["rows"]] == [
        (2.0, None), (2.0, 2), ("inf", None), ("inf", 2),
    ]  # fmt: skip
    assert [asked["prompt"] for asked in server.asked] == [f"prompt {i}" for i in range(16)]
    assert result["rows"][3]["max_concurrent_requests"] == 2
    assert times(result["rows"][0], "intended") == pytest.approx(times(result["rows"][1], "intended"))
    assert result["workload"]["prompts"] == "whole"
    assert result["workload"]["repeated"] == 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_what_is_sent(lines: str) -> None:
    server = Scripted(lambda number: answer(0.25))
    bench(server, lines, requests=1)
    assert server.asked == [
        {
            "model": "fake", "prompt": "prompt 0", "max_tokens": 128, "temperature": 0.0, "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]  # fmt: skip
    server = Scripted(lambda number: answer(0.25))
    settings: dict[str, Any] = {"model": "m", "temperature": 0.5, "ignore_eos": True, "drafter": "d", "k": 0}
    bench(server, lines, requests=2, chat=True, details="on", extra='{"top_p": 0.5}', **settings)
    first, second = server.asked
    assert first.pop("seed") != second["seed"]
    assert first == {
        "model": "m", "messages": [{"role": "user", "content": "prompt 0"}], "max_tokens": 128, "temperature": 0.5,
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "ignore_eos": True,
        "speculative": {"drafter": "d", "k": 0}, "metrics": True, "top_p": 0.5,
    }  # fmt: skip
    assert server.paths.count("/v1/chat/completions") == 2


@pytest.mark.parametrize(
    ("owner", "metrics", "chunks"), [("steeple", True, True), ("vllm", False, True), ("openai", False, False)]
)
def test_details_are_asked_of_servers_that_know_them(lines: str, owner: str, metrics: bool, chunks: bool) -> None:
    server = Scripted(lambda number: answer(0.25), {"/v1/models": {"data": [{"id": "x", "owned_by": owner}]}})
    bench(server, lines, requests=1)
    assert ("metrics" in server.asked[0], "continuous_usage_stats" in server.asked[0]["stream_options"]) == (
        metrics, chunks,
    )  # fmt: skip


def test_acceptance_from_answers_and_from_metrics(lines: str) -> None:
    (row,) = bench(Scripted(lambda number: answer(0.25, speculation=SAID)), lines, requests=3)["rows"]
    assert (row["acceptance_from"], row["tau"], row["spec_decode_num_drafts"]) == ("responses", 2.25, 12)
    visits: list[int] = []

    def metrics(_body: Any) -> str:
        visits.append(1)
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        counts = dict(zip(names, (10, 40, 25), strict=True))
        return "".join(f"vllm:spec_decode_{name}_total {counts[name] * len(visits)}\n" for name in names)

    server = Scripted(lambda number: answer(0.25))
    server.pages["/metrics"] = metrics
    (row,) = bench(server, lines, requests=1)["rows"]
    assert len(visits) == 2
    assert (row["acceptance_from"], row["tau"], row["spec_decode_acceptance_rate"]) == ("metrics", 3.5, 62.5)
    assert (row["spec_decode_num_drafts"], row["spec_decode_draft_tokens"]) == (10, 40)  # of this row alone


def test_prompts_in_the_tokens_of_the_server(lines: str) -> None:
    server = Scripted(lambda number: Answer([(0.5, text()), (0.0, DONE)]))

    def tokenize(body: Any) -> dict[str, Any]:
        return {"tokens": ([1] if body["add_special_tokens"] else []) + [ord(letter) for letter in body["prompt"]]}

    server.pages["/tokenize"] = tokenize
    result = bench(server, lines, requests=3, prompt_tokens=20)
    assert all(len(asked["prompt"]) == 20 and asked["prompt"][0] == 1 for asked in server.asked)
    assert result["workload"]["unit"] == "tokens"
    # without usage prompts are as long as they were cut, and every chunk counts as a token
    (row,) = result["rows"]
    assert (row["total_input_tokens"], row["total_output_tokens"], row["counted_by_server"]) == (60, 3, 0)
    server = Scripted(lambda number: answer(0.5))
    assert bench(server, lines, requests=3, prompt_tokens=20)["workload"]["unit"] == "characters"
    assert {len(asked["prompt"]) for asked in server.asked} == {80}


def test_the_key_is_sent_and_never_shown(lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEEPLE_API_KEY", "sk-secret")
    server = Scripted(lambda number: answer(0.25))
    result = bench(server, lines, requests=1)
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    assert "sk-secret" not in json.dumps(result) + shown(result)
    monkeypatch.delenv("STEEPLE_API_KEY")
    server = Scripted(lambda number: answer(0.25))
    bench(server, lines, requests=1)
    assert all("authorization" not in headers for headers in server.headers)


def test_warm_up_is_apart_and_must_succeed(lines: str) -> None:
    server = Scripted(lambda number: answer(0.5))
    (row,) = bench(server, lines, requests=2, warmup=2)["rows"]
    assert [asked["prompt"] for asked in server.asked] == [f"prompt {i}" for i in range(4)]
    assert server.times == [0.0, 0.5, 1.0, 1.0]  # one by one, then the first row
    assert (row["num_prompts"], row["duration"]) == (2, 0.5)
    refusing = Scripted(lambda number: Answer(status=400, body=b"max_tokens is too large"))
    with pytest.raises(ConfigError, match="http 400: max_tokens is too large"):
        bench(refusing, lines, requests=2, warmup=1)


def test_servers_that_cannot_be_used(lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_body: Any) -> Any:
        raise httpx.ConnectError("refused")

    for models, says in (
        (nobody, "no server answers"),
        (httpx.Response(401), r"put its API key into \$STEEPLE_API_KEY"),
        ({"data": []}, "give --model"),
        (httpx.Response(404), "give --model"),
        (httpx.Response(200, text="<html>"), "give --model"),
    ):
        with pytest.raises(ConfigError, match=says):
            bench(Scripted(lambda number: answer(0.5), {"/v1/models": models}), lines, requests=1)
    # a name makes up for a missing list
    named = Scripted(lambda number: answer(0.5), {"/v1/models": httpx.Response(404)})
    assert bench(named, lines, requests=1, model="m")["model_id"] == "m"
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ConfigError, match=r'pip install "steeple\[serve\]"'):
        bench(named, lines, requests=1)


# --- what people see


def shown(result: dict[str, Any]) -> str:
    console = Console(width=240, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(serve_table(result))
    return console.export_text()


def test_the_table(lines: str) -> None:
    server = Scripted(
        lambda number: answer(1.0, 0.25, speculation=SAID) if number else Answer(status=429, body=b"full")
    )
    result = bench(server, lines, requests=3, concurrency=(2,), e2e_ms=2000.0)
    text = shown(result)
    assert "fake at http://127.0.0.1:8000" in text
    cells = [cell.strip() for line in text.splitlines() if "│" in line for cell in line.split("│")]
    # the third waits until a place is free: at once, for the first is refused at once
    assert cells[1:-1] == [
        "inf", "2", "2", "1", "1.60", "3.2", "1.60", "1000.0", "1000.0", "250.0", "250.0", "250.0", "250.0", "1250.0",
        "1250.0", "2.25",
    ]  # fmt: skip
    page = serve_markdown(result).splitlines()
    assert [cell.strip() for cell in page[2].split("|")[1:-1]] == cells[1:-1]
    assert page[4] == "rate inf, 2 in flight: 1 x http 429: full"
    assert "goodput: e2e 2000 ms" in text
    assert "rate inf, 2 in flight: 1 x http 429: full" in text


def test_charts_show_the_rows(lines: str, tmp_path: Path) -> None:
    server = Scripted(lambda number: answer(0.25 * (1 + number // 2), 0.5))
    folder = tmp_path / "plots"
    result = bench(server, lines, requests=2, concurrency=(4, 1, 0), ttft_ms=500.0, plots=str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "latency.png", "latency.svg", "throughput.png", "throughput.svg",
    ]  # fmt: skip
    by_limit = {row["max_concurrency"]: row for row in result["rows"]}
    panel = latency_figure(result).axes[0]
    assert [mark.get_text() for mark in panel.get_xticklabels()] == ["1", "4", "no limit"]
    for line, share in zip(panel.get_lines(), (50, 90, 95, 99), strict=False):
        assert list(line.get_ydata()) == [by_limit[limit][f"p{share}_ttft_ms"] for limit in (1, 4, None)]
    tokens, requests = throughput_figure(result).axes
    assert list(tokens.get_lines()[0].get_ydata()) == [by_limit[limit]["output_throughput"] for limit in (1, 4, None)]
    assert list(requests.get_lines()[1].get_ydata()) == [by_limit[limit]["request_goodput"] for limit in (1, 4, None)]


def test_rates_are_the_axis_where_they_vary(lines: str) -> None:
    server = Scripted(lambda number: answer(0.25, 0.25))
    result = bench(server, lines, requests=2, rate=(math.inf, 2.0, 0.5), concurrency=(1, 2))
    panel = latency_figure(result).axes[2]
    assert [mark.get_text() for mark in panel.get_xticklabels()] == ["0.5", "2", "inf"]
    assert [line.get_label() for line in panel.get_lines()] == [
        "in flight: 1, p50", "in flight: 1, p99", "in flight: 2, p50", "in flight: 2, p99",
    ]  # fmt: skip


def test_the_command(lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(Scripted(lambda number: answer(0.25)), lines, requests=1)
    seen: list[ServeBenchConfig] = []

    def run(config: ServeBenchConfig, _progress: Any) -> dict[str, Any]:
        seen.append(config)
        return result

    monkeypatch.setattr(bench_serve, "run_serve_bench", run)

    def steeple(*args: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["bench", "serve", *args])
        return int(ended.value.code or 0)

    arguments = ("--base-url", "http://h:1/v1", "--rate", "1,inf", "--concurrency", "1,8", "--k", "3", "--json", "-")
    assert steeple(*arguments) == 0
    assert seen == [ServeBenchConfig(base_url="http://h:1/v1", rate=(1.0, math.inf), concurrency=(1, 8), k=3)]
    captured = capsys.readouterr()
    assert json.loads(captured.out) == result
    assert "TTFT p50" in captured.err
    result["rows"][0]["completed"] = 0
    assert steeple() == 1
    assert steeple("--details", "offf") == 2
    assert "Did you mean 'off'?" in capsys.readouterr().err
