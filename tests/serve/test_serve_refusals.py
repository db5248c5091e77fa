"""What is refused: by a status, in OpenAI's shape, naming the field; and who is let in at all."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Running, Start

from steeple.errors import ConfigError
from steeple.serve import ServeConfig, middleware
from steeple.serve.auth import VARIABLE, Keys, hashed
from steeple.serve.errors import ApiError
from steeple.serve.reports import JsonLines

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ""),
        ("prompt", ["a", 5]),
        ("prompt", [5, "a"]),
        ("prompt", [5, 320]),
        ("prompt", [True, 3]),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("n", 0),
        ("n", True),
        ("n", 200),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop_token_ids", [1.5]),
        ("logprobs", 21),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"320": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", [5]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("min_tokens", 17),
        ("metrics", "all"),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "text", "json_schema": {"schema": {}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}}),
        ("speculative", {"k": 4}),
        ("speculative", {"k": -1}),
        ("speculative", {"drafter": "spire"}),
        ("speculative", {"origins": True}),
        ("echo", True),
        ("best_of", 2),
        ("suffix", "end"),
        ("tools", [{"type": "function"}]),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("prediction", {"type": "content", "content": "x"}),
        ("temprature", 1.0),
        ("chat_template", "{{ 7 * 7 }}"),
        ("\ud800", 1),
        ("{message}", 1),
    ],
)
def test_a_wrong_field_is_named(server: Running, field: str, value: Any) -> None:
    body = {"prompt": "def area(", "max_tokens": 16, field: value}
    answer = asyncio.run(_raw(server, COMPLETIONS, json.dumps(body).encode()))
    error = refusal(answer)
    assert error["type"] == "invalid_request_error"
    if field == "\ud800":
        assert "is no field of this request" in error["message"]
    else:
        assert error["param"].startswith(field)
        assert field in error["message"]
    assert not server.loop.tally.outcomes


async def _raw(server: Running, path: str, content: Any, **headers: str) -> httpx.Response:
    async with server.client() as client:
        return await client.post(path, content=content, headers={"Content-Type": "application/json", **headers})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", [{"role": "robot", "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": "x", "tool_calls": [1]}]),
        ("top_logprobs", 2),
        ("max_completion_tokens", 5),
        ("logprobs", 3),
        ("prompt", "x"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(server: Running, field: str, value: Any) -> None:
    error = refusal(server.post(CHAT, {"messages": USER, "max_tokens": 4, field: value}))
    named = str(error["param"]) + error["message"]
    assert field in named or "tool_calls" in named or field == "max_completion_tokens"


def test_tools_are_refused_by_name(server: Running) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    error = refusal(server.post(CHAT, {"messages": USER, "tools": [tool]}))
    assert error["param"] == "tools"
    assert "not supported" in error["message"]


def test_what_asks_for_nothing_is_taken(server: Running) -> None:
    neutral = {"tools": [], "echo": False, "best_of": 1, "stop": None, "user": "me", "logit_bias": {}, "seed": None}
    body = {"prompt": "a", "max_tokens": 2, "response_format": {"type": "text"}, **neutral}
    assert server.post(COMPLETIONS, body).status_code == 200


@pytest.mark.parametrize(
    "pair",
    [
        {"ignore_eos": True, "response_format": {"type": "json_object"}},
        {"min_tokens": 2, "response_format": {"type": "json_object"}},
        {"min_tokens": 2, "stop": "x"},
    ],
)
def test_fields_that_do_not_go_together(server: Running, pair: dict[str, Any]) -> None:
    assert refusal(server.post(COMPLETIONS, {"prompt": "a", **pair}))["param"] in pair


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": ' + b"1" * 5000 + b"}", b"{}"],
)
def test_bodies_that_are_none(server: Running, content: bytes) -> None:
    refusal(asyncio.run(_raw(server, COMPLETIONS, content)))


def test_numbers_that_are_none(server: Running) -> None:
    for number in (b"NaN", b"Infinity", b"1e999"):
        for field in (b"temperature", b"seed"):
            body = b'{"prompt": "a", "' + field + b'": ' + number + b"}"
            assert refusal(asyncio.run(_raw(server, COMPLETIONS, body)))["param"] == field.decode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, b'{"prompt": "\\ud800"}'),
        (COMPLETIONS, b'{"prompt": "a", "stop": ["\\ud800"]}'),
        (COMPLETIONS, b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}'),
        (COMPLETIONS, b'{"prompt": "a", "logit_bias": {"\\ud800": "x"}}'),
        (COMPLETIONS, b'{"prompt": "a", "speculative": {"\\ud800": 1, "drafter": "\\ud800"}}'),
        (COMPLETIONS, b'{"prompt": "a", "response_format": {"type": "\\ud800"}}'),
        (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
        (CHAT, b'{"messages": [{"role": "user", "content": "a", "\\ud800": 1}]}'),
        ("/tokenize", b'{"prompt": "\\ud800"}'),
    ],
)
def test_half_a_character_is_no_text(server: Running, path: str, body: bytes) -> None:
    assert refusal(asyncio.run(_raw(server, path, body)))["type"] == "invalid_request_error"


def test_an_error_may_quote_half_a_character() -> None:
    body = bytes(ApiError(400, "\ud800 is no text").response().body)
    assert json.loads(body)["error"]["message"] == "\ud800 is no text"


def test_a_schema_may_hold_half_a_character(server: Running) -> None:
    body = b'{"prompt": "a", "max_tokens": 4, "response_format": {"type": "json_schema", "json_schema": '
    for schema in (b'{"enum": ["\\ud800"]}', b'{"properties": {"\\ud800": {}}}', b'{"pattern": "\\ud800"}'):
        answer = asyncio.run(_raw(server, COMPLETIONS, body + b'{"schema": ' + schema + b"}}}"))
        assert answer.status_code in (200, 400)


def test_schemas_have_bounds(server: Running) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    for schema in (deep, {"type": "string", "enum": ["x" * 70_000]}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        error = refusal(server.post(COMPLETIONS, {"prompt": "a", "response_format": form}))
        assert "too large" in error["message"]


def test_unknown_models(server: Running) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": USER}), ("/tokenize", {"prompt": "a"})):
        error = refusal(server.post(path, {"model": "other", **body}), 404)
        assert error["code"] == "model_not_found"
        assert error["param"] == "model"
        assert "'other'" in error["message"]
    refusal(asyncio.run(_raw(server, COMPLETIONS, b'{"prompt": "a", "model": "\\ud800"}')), 404)
    refusal(server.get("/v1/models/../../etc/passwd"), 404)
    refusal(server.get("/nowhere"), 404)
    refusal(server.get(COMPLETIONS), 405)


def test_too_many_tokens(server: Running, start: Start) -> None:
    error = refusal(server.post(COMPLETIONS, {"prompt": [5] * 200, "max_tokens": 100}))
    assert error["code"] == "context_length_exceeded"
    refusal(server.post(COMPLETIONS, {"prompt": [5] * 256}))
    refusal(server.post(CHAT, {"messages": [{"role": "user", "content": "width " * 400}]}))
    small = start(max_new_tokens=8, max_sequences=3, engine={"kv_tokens": 64})
    assert small.service.context == 64
    assert refusal(small.post(COMPLETIONS, {"prompt": "a", "max_tokens": 9}))["param"] == "max_tokens"
    assert refusal(small.post(COMPLETIONS, {"prompt": ["a"] * 4}))["param"] == "prompt"
    assert refusal(small.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 2}))["param"] == "n"
    assert small.post(COMPLETIONS, {"prompt": "a"}).json()["usage"]["completion_tokens"] == 8


def test_a_full_queue_says_when_to_come_again(start: Start) -> None:
    server = start(queue_size=2, retry_after=9, engine={"batch_size": 1})
    server.engine.step, step = lambda: [], server.engine.step  # type: ignore[method-assign]

    async def flood() -> list[httpx.Response]:
        async with server.client() as client:
            body = {"prompt": "a", "max_tokens": 2, "temperature": 0}
            tasks = [asyncio.create_task(client.post(COMPLETIONS, json=body)) for _ in range(8)]
            while sum(task.done() for task in tasks) < 5:
                await asyncio.sleep(0.01)
            server.engine.step = step  # type: ignore[method-assign]
            return await asyncio.gather(*tasks)

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) in (5, 6)  # whether the engine had taken the first one yet
    assert {answer.headers["retry-after"] for answer in refused} == {"9"}
    assert refusal(refused[0], 429)["code"] == "queue_full"
    assert sum(answer.status_code == 200 for answer in answers) == 8 - len(refused)


def test_a_time_limit(start: Start) -> None:
    server = start(timeout=0.05)
    server.engine.step = lambda: []  # type: ignore[method-assign]
    for stream in (False, True):
        error = refusal(server.post(COMPLETIONS, {"prompt": "a", "stream": stream}), 408)
        assert error["code"] == "timeout"


@pytest.mark.parametrize("limit", [0.0, 100.0])
def test_a_request_may_limit_its_own_time(start: Start, limit: float) -> None:
    server = start(timeout=limit)
    server.engine.step = lambda: []  # type: ignore[method-assign]
    refusal(server.post(COMPLETIONS, {"prompt": "a", "timeout": 0.05}), 408)


def test_a_failure_in_a_stream_is_an_event(server: Running) -> None:
    step, count = server.engine.step, iter(range(100))

    def fails() -> Any:
        if next(count) == 3:
            raise RuntimeError("inside")
        return step()

    server.engine.step = fails  # type: ignore[method-assign]
    answer = server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True})
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    assert json.loads(lines[-2])["error"]["code"] == "engine_error"
    assert "inside" not in answer.text
    assert refusal(_failing(server), 500)["code"] == "engine_error"


def _failing(server: Running) -> httpx.Response:
    def fails() -> Any:
        raise RuntimeError("inside")

    server.engine.step = fails  # type: ignore[method-assign]
    return server.post(COMPLETIONS, {"prompt": "a"})


def test_bodies_are_bounded(start: Start) -> None:
    server = start(max_body=1000)
    large = json.dumps({"prompt": "x" * 1000}).encode()
    assert refusal(asyncio.run(_raw(server, COMPLETIONS, large)), 413)["type"] == "request_too_large"

    async def pieces() -> Any:  # no length is declared
        for _ in range(20):
            yield b"x" * 100

    refusal(asyncio.run(_raw(server, COMPLETIONS, pieces())), 413)
    assert server.post(COMPLETIONS, {"prompt": "x" * 10, "max_tokens": 1}).status_code == 200


def test_bodies_that_never_end(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.05)

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(5)

    refusal(asyncio.run(asyncio.wait_for(_raw(server, COMPLETIONS, slow()), 3)), 408)


# ---------------------------------------------------------------------- keys


@pytest.fixture
def locked(start: Start, tmp_path: Path) -> Running:
    """A server for two holders of keys."""
    file = tmp_path / "keys"
    file.write_text(f"# who may come in\nann: {hashed('key-of-ann')}\n\nbob:{hashed('key-of-bob')}  # her brother\n")
    return start(keys_file=file)


def test_a_key_lets_in(locked: Running) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    told = refusal(locked.post(COMPLETIONS, body), 401)
    assert told["code"] == "missing_api_key"
    for wrong in ("Bearer nobody", "Bearer ", "Basic key-of-ann", f"Bearer {hashed('key-of-ann')}", "Bearer \u00fc"):
        answer = locked.post(COMPLETIONS, body, headers={"Authorization": wrong.encode()})
        assert refusal(answer, 401)["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
    for right in ("Bearer key-of-ann", "bearer  key-of-bob"):
        assert locked.post(COMPLETIONS, body, headers={"Authorization": right}).status_code == 200
    assert refusal(locked.get("/v1/models"), 401)
    assert refusal(locked.get("/stats"), 401)
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert locked.get(path).status_code == 200


def test_a_key_says_whose_turn_it_is(locked: Running) -> None:
    locked.engine.step = lambda: []  # type: ignore[method-assign]

    async def ask() -> dict[str, int]:
        async with locked.client() as client:
            tasks = [
                asyncio.create_task(
                    client.post(COMPLETIONS, json={"prompt": "a"}, headers={"Authorization": f"Bearer key-of-{name}"})
                )
                for name in ["ann"] * 6 + ["bob"] * 2
            ]
            while locked.loop.waiting < 4:
                await asyncio.sleep(0.01)
            waiting = locked.loop.tenants
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return waiting

    waiting = asyncio.run(ask())
    assert set(waiting) <= {"ann", "bob"}
    assert sum(waiting.values()) >= 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ann", "line 1 of .* is not 'name:sha256'"),
        ("\nann:abc", "line 2 of .* is not 'name:sha256'"),
        ("ann:" + "0" * 64 + "\nann:" + "1" * 64, "line 2 of .* names 'ann' again"),
        ("# nobody", "holds no keys"),
    ],
)
def test_wrong_files_of_keys(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Keys.load(file, {})


def test_keys_of_the_environment(tmp_path: Path) -> None:
    keys = Keys.load(None, {VARIABLE: "one, two,"})
    assert len(keys) == 2
    assert keys.tenant([(b"authorization", b"Bearer two")]) == "environment-2"
    assert "one" not in repr(vars(keys))
    with pytest.raises(ApiError):
        keys.tenant([(b"authorization", b"Bearer three")])
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.load(tmp_path / "none", {})
    assert Keys.load(None, {}).tenant([]) == ""


# ---------------------------------------------------------------------- browsers, logs, settings


def test_other_origins_are_kept_out_unless_named(server: Running, start: Start) -> None:
    headers = {"Origin": "https://page.example"}
    assert "access-control-allow-origin" not in server.get("/health", headers=headers).headers
    named = start(cors_origins=("https://page.example",))
    assert named.get("/health", headers=headers).headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in named.get("/health", headers={"Origin": "https://evil.example"}).headers


def test_the_log_tells_no_secrets(locked: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "steeple.serve.middleware"):
        body = {"prompt": "my own secret", "max_tokens": 1}
        answer = locked.post(COMPLETIONS + "?key=secret", body, headers={"Authorization": "Bearer key-of-ann"})
        locked.get("/v1/models/a%0Aline")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert len(lines) == 2
    assert lines[0]["tenant"] == "ann"
    assert lines[0]["status"] == 200
    assert lines[0]["request"] == answer.headers["x-request-id"]
    text = json.dumps(lines)
    assert "secret" not in text
    assert "key-of" not in text
    assert "\n" not in lines[1]["message"]


def test_a_fault_of_the_server_is_answered(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    def fault() -> Any:
        raise RuntimeError("inside")

    server.service.check_ready = fault  # type: ignore[method-assign]
    error = refusal(server.get("/ready"), 500)
    assert "inside" not in json.dumps(error)
    assert error["type"] == "server_error"
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port = 70000 is out of range"),
        ({"drafter": "engram"}, "Did you mean 'ngram'"),
        ({"log_format": "xml"}, "log_format = 'xml'"),
        ({"timeout": -1.0}, "timeout = -1.0 is out of range"),
        ({"ssl_keyfile": Path("x")}, "without ssl_certfile"),
        ({"ssl_certfile": Path("nowhere")}, "nowhere does not exist"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeConfig(**settings)


def test_a_folder_is_served_under_its_last_name(tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "mine"
    folder.mkdir(parents=True)
    assert ServeConfig(model=str(folder)).name == "mine"
    assert ServeConfig(model="owner/name").name == "owner/name"
