"""The bodies of requests. A field that is accepted is honoured; any other is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from steeple.errors import did_you_mean
from steeple.types import MAX_NODES

MOST_STOPS, MOST_BIASES, MOST_LOGPROBS = 16, 1024, 20
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier")
"""They say nothing about the answer, and are taken as they are."""
# What is not supported may be there with a value that asks for nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "echo": (False,),
    "store": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}


class Strict(BaseModel):
    """No guessing: JSON types as they are, no unknown fields, no infinities. ``null`` means that nothing was said."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    labels: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {}
        for key, value in body.items():
            if value is None or key in cls.labels:
                continue
            if key in known:
                kept[key] = value
            elif key not in cls.neutral:
                raise _refusal(key, f"{key[:60]!r} is no field of this request. {did_you_mean(key[:60], known)}")
            elif value not in cls.neutral[key]:
                raise _refusal(key, f"{key!r} is not supported by this server with this value; leave it out.")
        return kept


def _refusal(param: str, message: str) -> PydanticCustomError:
    # The message goes into a template, where braces would be fields; pydantic takes no half surrogate pairs.
    context = {"param": param[:60], "message": message}
    return PydanticCustomError("refused", "{message}", {key: _clean(text) for key, text in context.items()})


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _prompt(value: Any, handler: Any) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        raise ValueError("is neither text, token ids, a list of texts nor a list of lists of token ids") from error


class StreamOptions(Strict):
    """What a stream says beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class Speculative(Strict):
    """Speculation of one request. ``k``: most tokens drafted per round, 0 = none; ``origins``: say how each came."""

    drafter: str | None = None
    k: int | None = Field(default=None, ge=0, le=MAX_NODES)
    origins: bool = False


class JsonSchema(Strict):
    """OpenAI's wrapping of a JSON schema."""

    name: str = Field(default="schema", max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class ResponseFormat(Strict):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _refusal("response_format", "response_format: json_schema goes with type 'json_schema'; give both.")
        return self


class Generation(Strict):
    """What completions and chats have in common."""

    labels = LABELS
    neutral = NEUTRAL

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    min_tokens: int = Field(default=0, ge=0, le=2**31 - 1)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, ge=1e-6, le=1.0)
    top_k: int = Field(default=0, ge=-1, le=2**31 - 1)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=MOST_BIASES)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int = Field(default=1, ge=1, le=1024)
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MOST_STOPS)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    speculative: Speculative = Field(default_factory=Speculative)
    metrics: bool | Literal["detailed"] = False
    timeout: float | None = Field(default=None, gt=0.0, le=1e6)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def top(self) -> int | None:
        """Likeliest tokens to report for each token; None = no log-probabilities."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """Tokens that were asked for, None = not said."""
        return self.max_tokens

    @model_validator(mode="after")
    def _agree(self) -> Generation:
        stops = self.stops
        if len(stops) > MOST_STOPS or any(not 0 < len(s) <= 256 or _clean(s) != s for s in stops):
            raise _refusal("stop", f"stop: give at most {MOST_STOPS} strings of 1 to 256 characters.")
        if self.stream_options is not None and not self.stream:
            raise _refusal("stream_options", "stream_options is only for stream = true; leave it out.")
        if self.min_tokens and stops:
            raise _refusal("min_tokens", "min_tokens does not go with stop strings; leave one of them out.")
        if self.ignore_eos and self.constrained:
            raise _refusal("ignore_eos", "ignore_eos does not go with response_format; leave one of them out.")
        if self.min_tokens and self.constrained:
            raise _refusal("min_tokens", "min_tokens does not go with response_format; leave one of them out.")
        if self.speculative.origins and not self.stream:
            raise _refusal("speculative.origins", "speculative.origins is only for stream = true; leave it out.")
        return self

    @property
    def constrained(self) -> bool:
        """Whether a grammar rules the text."""
        return self.response_format is not None and self.response_format.type != "text"


class CompletionRequest(Generation):
    """Body of ``/v1/completions``."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], WrapValidator(_prompt)]
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)

    @property
    def top(self) -> int | None:
        return self.logprobs


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a conversation."""

    neutral = {"tool_calls": ([],), "name": (), "refusal": (), "function_call": (), "audio": ()}

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatRequest(Generation):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _agree_in_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _refusal("top_logprobs", "top_logprobs needs logprobs = true.")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise _refusal("max_tokens", "max_tokens and max_completion_tokens differ; give one of them.")
        return self


class TokenizeRequest(Strict):
    """Body of ``/tokenize``: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=4096)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise _refusal("prompt", "give either prompt or messages.")
        return self


class DetokenizeRequest(Strict):
    """Body of ``/detokenize``."""

    model: str | None = None
    tokens: list[int] = Field(max_length=1 << 20)
