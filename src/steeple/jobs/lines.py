"""The prompts file: one request a line. A bad line becomes a line with an error, never an exception."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steeple.errors import RequestError, StorageError, did_you_mean
from steeple.jobs.batch_api import from_batch, is_batch_line
from steeple.jobs.config import FORMATS
from steeple.types import SamplingParams

TEXT = ("prompt", "messages")
MOST_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Line:
    """A request as the file has it. Lines count from 1; ``digest`` changes with the line's bytes.

    Exactly one of ``prompt`` (text or token ids), ``messages`` and ``error`` is set. A line without an ``id`` is called
    after its number.
    """

    number: int
    id: str | int
    digest: str
    params: SamplingParams = field(default_factory=SamplingParams)
    prompt: str | list[int] | None = None
    messages: list[dict[str, str]] | None = None
    error: str | None = None

    @property
    def key(self) -> str:
        """The id as text: 7 and "7" are one id."""
        return str(self.id)


def read_lines(path: Path, defaults: SamplingParams) -> Iterator[Line]:
    """The requests of ``path``; blank lines are none. Args: defaults of the sampling fields a line does not give.

    Raises ``StorageError`` if the file cannot be read.
    """
    kind = FORMATS[path.suffix]
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if text.strip():
                    yield _line(number, text.rstrip(b"\r\n"), kind, defaults)
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}); give a file of prompts.") from error


def _line(number: int, raw: bytes, kind: str, defaults: SamplingParams) -> Line:
    digest = hashlib.blake2b(raw.strip(), digest_size=8).hexdigest()
    own_id: str | int = f"line-{number}"
    try:
        if kind == "text":
            return Line(number, own_id, digest, defaults, prompt=_text(raw))
        fields = _parse(_text(raw))
        own_id = _own_id(fields, own_id)
        if is_batch_line(fields):
            fields = from_batch(fields)
        return _request(number, own_id, digest, fields, defaults)
    except RequestError as error:
        return Line(number, own_id, digest, error=str(error))


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the line is no UTF-8 at byte {error.start}; save the file as UTF-8.") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the line is no JSON ({error}); write one object on one line.") from error
    if not isinstance(fields, dict):
        raise RequestError(f'the line is {type(fields).__name__}, not a JSON object; give {{"prompt": ...}}.')
    return fields


def _own_id(fields: Mapping[str, Any], fallback: str | int) -> str | int:
    name = "custom_id" if is_batch_line(fields) else "id"
    value = fields.get(name)
    if value is None:
        if name == "custom_id":
            raise RequestError("custom_id is missing; a batch line needs one.")
        return fallback
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RequestError(f"{name} = {value!r} is no id; give a non-empty string or an integer.")
    return value


def _request(number: int, own_id: str | int, digest: str, fields: Mapping[str, Any], defaults: SamplingParams) -> Line:
    sampling = SamplingParams.__dataclass_fields__
    for key in fields:
        if key not in sampling and key not in ("id", *TEXT):
            raise RequestError(f"{key!r} is no field of a request. {did_you_mean(key, ['id', *TEXT, *sampling])}")
    given = [name for name in TEXT if fields.get(name) is not None]
    if len(given) != 1:
        raise RequestError(f"the line has {' and '.join(given) or 'neither prompt nor messages'}; give one of them.")
    own = {key: value for key, value in fields.items() if key in sampling and value is not None}
    params = SamplingParams.from_mapping({**asdict(defaults), **own})
    if given == ["prompt"]:
        return Line(number, own_id, digest, params, prompt=_prompt(fields["prompt"]))
    return Line(number, own_id, digest, params, messages=_messages(fields["messages"]))


def _prompt(value: object) -> str | list[int]:
    if isinstance(value, str):
        return _encodable("prompt", value)
    if not isinstance(value, list):
        raise RequestError(f"prompt is {type(value).__name__}; give a string or a list of token ids.")
    if any(isinstance(t, bool) or not isinstance(t, int) for t in value):
        raise RequestError("prompt is a list with something that is no token id; give several prompts a line each.")
    if any(not 0 <= t <= MOST_TOKEN_ID for t in value):
        raise RequestError(f"prompt holds token ids outside 0..{MOST_TOKEN_ID}.")
    if not value:
        raise RequestError("prompt is empty; give at least one token.")
    return value


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise RequestError("messages is no list of messages, or an empty one; give at least one.")
    return [_message(place, message) for place, message in enumerate(value)]


def _message(place: int, message: object) -> dict[str, str]:
    name = f"messages[{place}]"
    if not isinstance(message, dict):
        raise RequestError(f"{name} = {message!r} is no object; give role and content.")
    for key, value in message.items():
        if key not in ("role", "content") and value is not None:
            raise RequestError(f"{name}.{key} is not supported; a message has role and content.")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{name}.role = {role!r} is no role; give 'system', 'user' or 'assistant'.")
    return {"role": role, "content": _content(f"{name}.content", message.get("content"))}


def _content(name: str, value: object) -> str:
    if isinstance(value, str):
        return _encodable(name, value, empty=True)
    if not isinstance(value, list):
        raise RequestError(f"{name} = {value!r} is no text; give a string.")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f'{name} holds a part that is not {{"type": "text"}}; only text is supported.')
        texts.append(part["text"])
    return _encodable(name, "".join(texts), empty=True)


def _encodable(name: str, text: str, *, empty: bool = False) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    if not text and not empty:
        raise RequestError(f"{name} is empty; give at least one character.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} holds half of a surrogate pair at character {error.start}; correct it.") from error
    return text
