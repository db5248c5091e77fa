"""The server as a client sees it: what it serves, what it counts, and one request from its body to its record."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steeple.bench.serve.acceptance import Acceptance, read_counters
from steeple.bench.serve.config import KEY_VARIABLE, ServeBenchConfig
from steeple.bench.serve.record import BROKEN, CONNECT, MALFORMED, MESSAGE, TIMEOUT, Failed, Record
from steeple.bench.serve.sse import EventReader
from steeple.bench.serve.workload import Call
from steeple.errors import ConfigError

if TYPE_CHECKING:
    import httpx

REUSED_SECONDS = 2.0  # idle connections are let go before servers do so (uvicorn after 5), which would be an error
ASIDE_SECONDS = 30.0  # for requests around the test
COUNTS_SPECULATION = ("steeple",)  # owners of models, by /v1/models, who know the field "metrics"
COUNTS_CHUNKS = ("steeple", "vllm")  # who know stream_options.continuous_usage_stats
OK, NOT_ALLOWED = 200, (401, 403)


def require_httpx() -> types.ModuleType:
    """The HTTP client. ``ConfigError`` if it, or what reads ``/metrics``, is not installed."""
    try:
        import httpx
        import prometheus_client  # noqa: F401  asked for now, so that it is not missed after the test
    except ImportError as error:
        raise ConfigError(
            f'{error.name} is not installed, and the bench needs it: pip install "steeple[serve]".'
        ) from error
    return httpx


def open_client(config: ServeBenchConfig, transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """A client that neither queues, nor retries, nor goes through a proxy. ``ConfigError``: no httpx, no key."""
    http = require_httpx()
    key = config.key()
    client: httpx.AsyncClient = http.AsyncClient(
        base_url=config.root,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=None,  # one deadline for a whole request instead
        limits=http.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=REUSED_SECONDS
        ),  # a limit here would be a queue that nobody measures
        trust_env=False,
        transport=transport,
    )
    return client


@dataclass(frozen=True, slots=True)
class Serving:
    """What is asked: the model's name, what ``/v1/models`` and ``/version`` say, and which details to ask for."""

    model: str
    card: Mapping[str, Any]
    version: Any
    speculation: bool
    chunks: bool


class Server:
    """Requests to one server. Args: client: an open one."""

    def __init__(self, config: ServeBenchConfig, client: httpx.AsyncClient) -> None:
        self._config, self._client, self._http = config, client, require_httpx()
        self._more = config.more()

    async def find(self) -> Serving:
        """Who is there. ``ConfigError`` if nobody is, or no model can be found."""
        cards = await self._models()
        named = [card for card in cards if self._config.model in ("", card.get("id"))]
        card = named[0] if named else {}
        model = self._config.model or str(card.get("id", ""))
        if not model:
            raise ConfigError(f"{self._config.root}/v1/models names no model; give --model.")
        owner = str(card.get("owned_by", ""))
        details = self._config.details
        version = await self._json("GET", "/version")
        return Serving(
            model=model,
            card=card,
            version=None if version is None else version.get("version"),
            speculation=details == "on" or (details == "auto" and owner in COUNTS_SPECULATION),
            chunks=details == "on" or (details == "auto" and owner in COUNTS_CHUNKS),
        )

    async def _models(self) -> list[dict[str, Any]]:
        where = f"ServeBenchConfig.base_url = {self._config.base_url!r}"
        try:
            response = await self._client.get("/v1/models", timeout=ASIDE_SECONDS)
        except self._http.HTTPError as error:
            raise ConfigError(
                f"{where}: no server answers ({type(error).__name__}: {error}); start one, or give its address."
            ) from error
        if response.status_code in NOT_ALLOWED:
            name = self._config.api_key_env or KEY_VARIABLE
            raise ConfigError(f"{where} answers {response.status_code}; put its API key into ${name}.")
        found = _object(response) if response.status_code == OK else None
        cards = (found or {}).get("data")
        return [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []

    async def _json(self, method: str, path: str, body: Any = None) -> dict[str, Any] | None:
        """An object, or None where the server has no such thing."""
        try:
            response = await self._client.request(method, path, json=body, timeout=ASIDE_SECONDS)
        except self._http.HTTPError:
            return None
        return _object(response) if response.status_code == OK else None

    async def tokens(self, model: str, text: str, *, special: bool = False) -> list[int] | None:
        """Token ids by the server's ``/tokenize`` (vLLM's and Steeple's); None where there is none."""
        found = await self._json("POST", "/tokenize", {"model": model, "prompt": text, "add_special_tokens": special})
        tokens = (found or {}).get("tokens")
        return tokens if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens) else None

    async def counters(self) -> Acceptance | None:
        """The server's counters of speculation by now; None where ``/metrics`` does not have them."""
        try:
            response = await self._client.get("/metrics", timeout=ASIDE_SECONDS)
        except self._http.HTTPError:
            return None
        return read_counters(response.text) if response.status_code == OK else None

    def body(self, serving: Serving, call: Call) -> dict[str, Any]:
        """The fields of a request."""
        config = self._config
        options = {"include_usage": True} | ({"continuous_usage_stats": True} if serving.chunks else {})
        fields: dict[str, Any] = {"model": serving.model}
        fields |= {"messages": [{"role": "user", "content": call.prompt}]} if config.chat else {"prompt": call.prompt}
        fields |= {"max_tokens": call.max_tokens, "temperature": config.temperature, "stream": True}
        fields["stream_options"] = options
        if config.temperature:
            fields["seed"] = call.seed
        if config.ignore_eos:
            fields["ignore_eos"] = True
        speculative = {"drafter": config.drafter or None, "k": config.k}
        if any(value is not None for value in speculative.values()):
            fields["speculative"] = {name: value for name, value in speculative.items() if value is not None}
        if serving.speculation:
            fields["metrics"] = True
        return fields | self._more

    async def complete(self, serving: Serving, call: Call, record: Record) -> None:
        """Send a request and hear it out. Whatever goes wrong is in the record afterwards; only a cancel raises."""
        clock = asyncio.get_running_loop().time
        body = self.body(serving, call)
        record.prompt_tokens = call.prompt_tokens
        record.sent = clock()
        try:
            async with asyncio.timeout(self._config.timeout):
                await self._stream(body, record)
            record.check()
        except Failed as failed:
            record.fail(failed.kind, failed.message, clock())
        except TimeoutError:
            self._late(record, TIMEOUT, f"not over after {self._config.timeout:g} s")
        except self._http.ConnectError as error:
            record.fail(CONNECT, str(error), clock())
        except self._http.HTTPError as error:
            self._late(record, BROKEN, f"{type(error).__name__}: {error}")

    def _late(self, record: Record, kind: str, message: str) -> None:
        """An end of the connection is a failure unless all was said before."""
        if not (record.done and record.heard):
            record.fail(kind, message, asyncio.get_running_loop().time())

    async def _stream(self, body: Mapping[str, Any], record: Record) -> None:
        clock = asyncio.get_running_loop().time
        path = "/v1/chat/completions" if self._config.chat else "/v1/completions"
        async with self._client.stream("POST", path, json=body) as response:
            if response.status_code != OK:
                raise Failed(f"http {response.status_code}", _said(await response.aread()))
            reader = EventReader()
            try:
                async for piece in response.aiter_bytes():
                    now = clock()
                    for data in reader.feed(piece):
                        record.take(data, now)
                for data in reader.end():
                    record.take(data, clock())
            except UnicodeDecodeError as error:
                raise Failed(MALFORMED, f"the stream is no UTF-8 ({error})") from error


def _object(response: httpx.Response) -> dict[str, Any] | None:
    try:
        found = response.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _said(body: bytes) -> str:
    return body[: 2 * MESSAGE].decode(errors="replace")
