"""The server behind a real socket: OpenAI's client, clients that hang up or do not read, the process and its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import Running, Start, listening
from typer.testing import CliRunner

from steeple import LLM, SamplingParams
from steeple.errors import ConfigError
from steeple.serve import ServeConfig
from steeple.serve.server import address, listen

TALK: Any = [{"role": "user", "content": "print the index"}]
ENDLESS = {"prompt": "def area(", "max_tokens": 240, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def url(server: Running) -> Iterator[str]:
    with listening(server) as address:
        yield address


def client_of(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, **options)


def test_the_openai_client(url: str, offline: LLM) -> None:
    client = client_of(url)
    assert [model.id for model in client.models.list()] == ["tiny"]
    done = client.completions.create(model="tiny", prompt="def area(", max_tokens=12, temperature=0, logprobs=2)
    assert done.choices[0].text == offline.generate("def area(", SamplingParams(max_tokens=12)).pop().text
    assert done.choices[0].logprobs is not None
    assert done.usage is not None
    assert done.usage.completion_tokens == 12
    expected = offline.chat(TALK, SamplingParams(max_tokens=12)).text
    chat = client.chat.completions.create(
        model="tiny", messages=TALK, max_completion_tokens=12, temperature=0, logprobs=True, top_logprobs=1
    )
    assert chat.choices[0].message.content == expected
    assert chat.choices[0].logprobs is not None
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=TALK,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"speculative": {"k": 1}, "metrics": True},
        )
    )
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == expected
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["metrics"]["speculative_decoding"]["num_spec_tokens"] == 3


def test_the_openai_client_meets_errors(url: str, server: Running) -> None:
    client = client_of(url)
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported") as wrong:
        client.chat.completions.create(model="tiny", messages=TALK, tools=[tool])
    assert wrong.value.param == "tools"
    with pytest.raises(openai.NotFoundError, match="not served here") as unknown:
        client.completions.create(model="other", prompt="a")
    assert unknown.value.code == "model_not_found"
    step, count = server.engine.step, iter(range(9))

    def fails() -> Any:
        if next(count) == 3:
            raise RuntimeError("inside")
        return step()

    server.engine.step = fails  # type: ignore[method-assign]
    with pytest.raises(openai.APIError, match="engine failed"):
        list(client.completions.create(model="tiny", prompt="a", max_tokens=90, stream=True))


def test_many_at_once_by_the_async_client(url: str, offline: LLM) -> None:
    prompts = [f"for index in range({i}):" for i in range(24)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:

            async def one(number: int, prompt: str) -> str:
                stream: Any = number % 2 == 0
                answer: Any = await client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=16, temperature=0, stream=stream
                )
                if not stream:
                    return str(answer.choices[0].text)
                return "".join([chunk.choices[0].text async for chunk in answer if chunk.choices])

            return list(await asyncio.gather(*[one(*pair) for pair in enumerate(prompts)]))

    assert asyncio.run(ask()) == [out.text for out in offline.generate(prompts, SamplingParams(max_tokens=16))]


def test_json_by_the_openai_client(url: str) -> None:
    schema = {"type": "object", "properties": {"side": {"enum": [1, 10]}}, "required": ["side"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    chat = client_of(url).chat.completions.create(model="tiny", messages=TALK, max_tokens=60, response_format=form)
    assert json.loads(chat.choices[0].message.content or "")["side"] in (1, 10)


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_leaves_nothing(url: str, server: Running, stream: bool) -> None:
    step = server.engine.step

    def slowly() -> Any:
        time.sleep(0.02)
        return step()

    server.engine.step = slowly  # type: ignore[method-assign]
    with httpx.Client(base_url=url, timeout=20) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json={**ENDLESS, "n": 3, "stream": True}) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json={**ENDLESS, "n": 3}, timeout=0.3)
    server.settle()
    assert server.loop.tally.outcomes == {"cancelled": 3}
    assert server.loop.tally.generation_tokens < 3 * 240


def test_who_hangs_up_in_the_queue_leaves_it(url: str, server: Running) -> None:
    server.engine.step, step = lambda: [], server.engine.step  # type: ignore[method-assign]
    with httpx.Client(base_url=url) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={**ENDLESS, "n": 12}, timeout=0.3)
    server.engine.step = step  # type: ignore[method-assign]
    server.settle()
    assert server.loop.tally.outcomes == {"cancelled": 12}


def test_who_does_not_read_is_given_up(start: Start) -> None:
    """Pieces larger than any buffer on the way, to a client that never reads."""
    server = start(write_timeout=0.2)
    server.service.texts.token_text = lambda token: "x" * 400_000  # type: ignore[method-assign]
    with listening(server) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as deaf:
            body = json.dumps({**ENDLESS, "stream": True, "logprobs": 0}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            deaf.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            until = time.monotonic() + 15
            while not server.loop.tally.outcomes and time.monotonic() < until:
                time.sleep(0.01)
            assert sum(server.loop.tally.outcomes.values()) == 1
        server.settle()
        assert client_of(url).completions.create(model="tiny", prompt="a", max_tokens=1).choices


# ---------------------------------------------------------------------- the process


def test_addresses() -> None:
    with listen(ServeConfig(port=0)) as bound:
        port = bound.getsockname()[1]
        assert address(ServeConfig(port=port), bound) == f"http://127.0.0.1:{port}"
        assert address(ServeConfig(port=port, host="0.0.0.0"), bound) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen(ServeConfig(port=port))
    with pytest.raises(ConfigError, match="give another port or host"):
        listen(ServeConfig(host="no.such.host.example", port=0))


COMMAND = "import sys; from steeple.cli.serve import app; app(sys.argv[1:])"


class Process:
    """A server in a process of its own, by its command."""

    def __init__(self, folder: Path, *options: str) -> None:
        arguments = ["--model", str(folder), "--served-name", "tiny", "--port", "0", "--kv-tokens", "2048", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "STEEPLE_API_KEYS": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if " at http" in line:
                self.url = line.rsplit(" at ", 1)[1].strip()
                return
        raise AssertionError("".join(self.lines))

    def wait_until_ready(self) -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.02)
        raise AssertionError("it never became ready")

    def end(self, number: int) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_process_finishes_what_runs(target_folder: Path, number: int) -> None:
    server = Process(target_folder, "--drafter", "ngram", "--json", "-", "--log-format", "json")
    try:
        server.wait_until_ready()
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**ENDLESS, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        status, out, err = server.end(signal.SIGTERM)
        assert status == 0, err
        assert json.loads(out)["outcomes"] == {"length": 1}
        assert json.loads(out)["generation_tokens"] == 240
        logged = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
        assert any("/v1/completions" in line["message"] and line["status"] == 200 for line in logged)
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.mark.slow
def test_a_process_ends_by_its_deadline(target_folder: Path) -> None:
    """What cannot finish in time is answered with an error."""
    server = Process(target_folder, "--drain-seconds", "0", "--batch-size", "1")
    try:
        server.wait_until_ready()
        body = {**ENDLESS, "n": 100, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
        assert server.process.wait(20) == 0
    finally:
        server.process.kill()
        server.process.communicate()


def test_the_command_refuses_what_cannot_be(tmp_path: Path) -> None:
    from steeple.cli.serve import app

    keys = tmp_path / "keys"
    keys.write_text("nothing")
    for options, message in (
        (["--port", "99999"], "port = 99999"),
        (["--model", "./nowhere", "--port", "0"], "there is no such folder"),
        (["--keys-file", str(keys), "--port", "0"], "line 1 of"),
    ):
        done = CliRunner().invoke(app, options)
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())
