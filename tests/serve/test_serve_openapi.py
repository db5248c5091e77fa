"""The OpenAPI description: it is complete, and no request made by it breaks the server."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Running, Start
from hypothesis import HealthCheck, given, settings


def test_every_route_is_described(server: Running) -> None:
    described = server.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/version",
        "/metrics",
        "/stats",
    }
    body = described["components"]["schemas"]["ChatRequest"]
    assert body["additionalProperties"] is False
    assert {"messages", "speculative", "response_format"} <= set(body["properties"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_no_request_breaks_the_server(start: Start, kind: str) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    mode = schemathesis.GenerationMode(kind)
    server = start(max_new_tokens=4)
    schema: Any = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    statuses: set[int] = set()

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(schema.as_strategy(generation_mode=mode))
    def probe(case: Any) -> None:
        answer = case.call()
        statuses.add(answer.status_code)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    probe()
    assert {"positive": {200, 400}, "negative": {400}}[kind] <= statuses
    assert server.loop.ready
    server.settle()
