"""Settings of a load test. Light: importing this loads no torch."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from steeple.bench.config import settle_lists
from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean

KEY_VARIABLE = "STEEPLE_API_KEY"
LENGTH_NAMES = ("code", "conversation")
DETAILS = ("auto", "on", "off")
RESERVED = ("stream", "stream_options", "prompt", "messages", "n")
PROMPT_TOKENS = 256  # of a prompt that is cut from text, if nothing else is said
MOST = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ServeBenchConfig:
    """What is sent to which server, how fast, and what counts as good. Times in seconds unless a name says ms."""

    base_url: str = field(default="http://127.0.0.1:8000", metadata={"help": "the server; a /v1 at the end is cut off"})
    model: str = field(default="", metadata={"help": "the model's name in requests; empty: the first of /v1/models"})
    chat: bool = field(default=False, metadata={"help": "ask /v1/chat/completions instead of /v1/completions"})
    prompts: str = field(
        default="",
        metadata={"help": ".jsonl (a prompt a line) or .txt (cut) file; empty: cut from the held-out standard library"},
    )
    prompt_tokens: int = field(
        default=0, metadata={"help": "length of every prompt; 0 = lines of a .jsonl file as they are, else 256"}
    )
    lengths: str = field(
        default="",
        metadata={"help": "code or conversation: lengths spread as in a published trace, 99 % below prompt_tokens"},
    )
    trace: Path | None = field(
        default=None,
        metadata={"help": "CSV with TIMESTAMP, ContextTokens, GeneratedTokens: arrivals, prompt and output lengths"},
    )
    time_scale: float = field(
        default=1.0, metadata={"help": "the trace's time is multiplied by this; 0.5 = twice as fast"}
    )
    max_prompt: int = field(default=0, metadata={"help": "longer prompts of a trace are cut to this, 0 = never"})
    requests: int = field(default=64, metadata={"help": "requests of each row of the result"})
    rate: tuple[float, ...] = field(
        default=(),
        metadata={
            "help": "requests per second, Poisson or the trace stretched; inf = all at once. Default: trace or inf"
        },
    )
    concurrency: tuple[int, ...] = field(
        default=(0,), metadata={"help": "most requests in flight; others wait here, which counts. 0 = no limit"}
    )
    max_tokens: int = field(
        default=128, metadata={"help": "most tokens that a request writes; a trace may ask for fewer"}
    )
    temperature: float = field(default=0.0, metadata={"help": "sampling temperature, 0 = greedy"})
    seed: int = field(default=0, metadata={"help": "decides arrivals, prompts and the seeds of requests"})
    drafter: str = field(default="", metadata={"help": 'sent as "speculative": {"drafter": ...}; empty: not sent'})
    k: int | None = field(default=None, metadata={"help": 'sent as "speculative": {"k": ...}; 0 = no speculation'})
    ignore_eos: bool = field(default=False, metadata={"help": "ask the server to write max_tokens in any case"})
    ttft_ms: float = field(default=0.0, metadata={"help": "objective: most ms to the first token, 0 = none"})
    itl_ms: float = field(default=0.0, metadata={"help": "objective: longest gap between two chunks in ms, 0 = none"})
    tpot_ms: float = field(default=0.0, metadata={"help": "objective: most ms per token after the first, 0 = none"})
    e2e_ms: float = field(default=0.0, metadata={"help": "objective: most ms to the end, 0 = none"})
    timeout: float = field(default=600.0, metadata={"help": "seconds from sending until a request is given up"})
    api_key_env: str = field(
        default=KEY_VARIABLE, metadata={"help": "environment variable that holds the API key, if there is one"}
    )
    warmup: int = field(default=1, metadata={"help": "requests before the first row, one by one; they must succeed"})
    details: str = field(
        default="auto",
        metadata={"help": "ask for acceptance and token counts per chunk: on, off, or auto = of servers that know it"},
    )
    extra: str = field(default="", metadata={"help": "JSON object of further fields for every request"})
    detailed: bool = field(default=False, metadata={"help": "keep the times of every single request in the result"})
    plots: str = field(default="", metadata={"help": "folder to draw charts into; empty: none"})

    def __post_init__(self) -> None:
        settle_lists(self, ("concurrency", "rate") if self.rate else ("concurrency",))
        _check_numbers(self)
        _check_url(self.base_url)
        for name, known in (("lengths", ("", *LENGTH_NAMES)), ("details", DETAILS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"ServeBenchConfig.{name} = {value!r}. {did_you_mean(value, filter(None, known))}")
        self.more()
        _check_together(self)

    @property
    def root(self) -> str:
        """The server's address without slash and ``/v1`` at its end."""
        return self.base_url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def objectives(self) -> dict[str, float]:
        """Objectives that were set, in ms, by the names ``ttft``, ``itl``, ``tpot``, ``e2e``."""
        given = {"ttft": self.ttft_ms, "itl": self.itl_ms, "tpot": self.tpot_ms, "e2e": self.e2e_ms}
        return {name: value for name, value in given.items() if value}

    def more(self) -> dict[str, Any]:
        """``extra`` as fields. ``ConfigError`` if it is no object, or sets what the measurement needs."""
        try:
            fields = json.loads(self.extra or "{}")
        except ValueError as error:
            raise ConfigError(f"ServeBenchConfig.extra is no JSON ({error}); give an object in quotes.") from error
        if not isinstance(fields, dict):
            raise ConfigError("ServeBenchConfig.extra is no JSON object; give one such as '{\"top_p\": 0.9}'.")
        taken = [name for name in RESERVED if name in fields]
        if taken:
            raise ConfigError(f"ServeBenchConfig.extra sets {taken[0]!r}, which the bench decides; leave it out.")
        return fields

    def key(self) -> str:
        """The API key out of the environment, or nothing. ``ConfigError`` if a variable was named that is not set."""
        found = os.environ.get(self.api_key_env, "")
        if not found and self.api_key_env not in ("", KEY_VARIABLE):
            raise ConfigError(f"ServeBenchConfig.api_key_env: ${self.api_key_env} is not set; export it first.")
        return found

    def shown(self) -> dict[str, Any]:
        """The settings in JSON types; infinity is written ``"inf"``."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["trace"] = None if self.trace is None else self.trace.name
        return {**values, "rate": [shown_rate(rate) for rate in self.rate], "concurrency": list(self.concurrency)}


def shown_rate(rate: float) -> float | str:
    """A rate as JSON can hold it."""
    return "inf" if math.isinf(rate) else rate


def _check_numbers(config: ServeBenchConfig) -> None:
    def check(name: str, low: float, high: float) -> None:
        check_range("ServeBenchConfig", name, getattr(config, name), low, high)

    for rate in config.rate:
        check_range("ServeBenchConfig", "rate", rate, 1e-6, math.inf)
    for limit in config.concurrency:
        check_range("ServeBenchConfig", "concurrency", limit, 0, 65536)
    check("prompt_tokens", 0, MOST)
    check("time_scale", 1e-6, 1e6)
    check("max_prompt", 0, MOST)
    check("requests", 1, 10_000_000)
    check("max_tokens", 1, MOST)
    check("temperature", 0.0, 100.0)
    check("seed", 0, 2**62)
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        check(name, 0.0, 1e9)
    check("timeout", 1e-3, 1e6)
    check("warmup", 0, 10_000)
    if config.k is not None:
        check("k", 0, 1 << 16)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  it raises where it is no number
    except ValueError as error:
        raise ConfigError(
            f"ServeBenchConfig.base_url is no address ({error}); give one like http://host:8000."
        ) from error
    if parts.username is not None or parts.password is not None:
        raise ConfigError("ServeBenchConfig.base_url holds a password, which would be put on record; remove it.")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"ServeBenchConfig.base_url = {url!r} is no address; give one like http://host:8000.")


def _check_together(config: ServeBenchConfig) -> None:
    if config.trace is None:
        for name, neutral in (("time_scale", 1.0), ("max_prompt", 0)):
            if getattr(config, name) != neutral:
                raise ConfigError(f"ServeBenchConfig.{name} is only for a trace; give one or leave it out.")
        return
    if config.prompt_tokens or config.lengths:
        name = "prompt_tokens" if config.prompt_tokens else "lengths"
        raise ConfigError(f"ServeBenchConfig.{name}: the trace says how long prompts are; leave one of them out.")
    if config.rate and config.time_scale != 1.0:
        raise ConfigError("ServeBenchConfig.time_scale does not go with rate, which stretches time too; leave one out.")
