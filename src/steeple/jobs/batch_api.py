"""Lines of the OpenAI Batch API, as a job's own fields.

What the body asks for is honoured or refused by name. Three fields say nothing about the answer and are taken as they
are: ``model`` (a job has one model for all lines), ``user`` and ``metadata``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from steeple.errors import RequestError, did_you_mean
from steeple.types import SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
INPUT = {CHAT: "messages", COMPLETIONS: "prompt"}
ENVELOPE = ("custom_id", "method", "url", "body")
LABELS = ("model", "user", "metadata")
# A field that is not supported may be there with the value that asks for nothing.
NEUTRAL: dict[str, object] = {
    "stream": False,
    "echo": False,
    "store": False,
    "best_of": 1,
    "logit_bias": {},
    "tools": [],
    "response_format": {"type": "text"},
}


def is_batch_line(line: Mapping[str, Any]) -> bool:
    """Whether a JSON line is meant for the Batch API."""
    return "custom_id" in line or "body" in line


def from_batch(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line's ``prompt`` or ``messages`` and its sampling fields, under their own names.

    Raises ``RequestError`` for a field that cannot be honoured.
    """
    for key in line:
        if key not in ENVELOPE:
            raise RequestError(f"{key!r} is no field of a batch line. {did_you_mean(key, ENVELOPE)}")
    if line.get("method", "POST") != "POST":
        raise RequestError(f"method = {line['method']!r} is not supported; give 'POST'.")
    body = line.get("body")
    if not isinstance(body, dict):
        raise RequestError("body is missing or is not an object; give the request in it.")
    url = line.get("url", CHAT if "messages" in body else COMPLETIONS)
    if not isinstance(url, str) or url not in INPUT:
        raise RequestError(f"url = {url!r} is not supported. {did_you_mean(str(url), INPUT)}")
    if INPUT[url] not in body:
        raise RequestError(f"body has no {INPUT[url]!r}, which {url} needs.")
    given = {key: value for key, value in body.items() if value is not None and key not in LABELS}
    rules: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {CHAT: _chat_logprobs, COMPLETIONS: dict}
    return _supported(_one_length(rules[url](given)), INPUT[url])


def _one_length(body: dict[str, Any]) -> dict[str, Any]:
    longest = body.pop("max_completion_tokens", None)
    if longest is not None and body.setdefault("max_tokens", longest) != longest:
        raise RequestError(f"max_tokens = {body['max_tokens']!r} and max_completion_tokens = {longest!r} differ.")
    return body


def _chat_logprobs(body: dict[str, Any]) -> dict[str, Any]:
    """Chat says *whether* in ``logprobs`` and *how many* in ``top_logprobs``; completions say both in ``logprobs``."""
    fields = {key: value for key, value in body.items() if key not in ("logprobs", "top_logprobs")}
    wanted, top = body.get("logprobs", False), body.get("top_logprobs")
    if not isinstance(wanted, bool):
        raise RequestError(f"logprobs = {wanted!r} is not true or false.")
    if top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs = true.")
    return {**fields, "logprobs": top or 0} if wanted else fields


def _supported(body: dict[str, Any], text: str) -> dict[str, Any]:
    known = {text, *SamplingParams.__dataclass_fields__}
    for key, value in body.items():
        if key not in known and (key not in NEUTRAL or value != NEUTRAL[key]):
            raise RequestError(f"body.{key} = {value!r} is not supported; leave it out. {did_you_mean(key, known)}")
    return {key: value for key, value in body.items() if key in known}
