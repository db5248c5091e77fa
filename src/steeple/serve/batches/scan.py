"""A batch's input, line by line: where each request lies, and what is wrong with the file.

What stands around a request (its name, path and method) must be right in every line before any is run. What is in it
is judged when its turn comes, by the endpoint; so one bad request does not stop the others.
"""

from __future__ import annotations

import json
from typing import Any

from steeple.errors import SteepleError, did_you_mean
from steeple.jobs.batch_api import ENVELOPE
from steeple.serve.batches.ledger import Task

MOST_ERRORS = 100
MOST_NAME = 512
BOM = b"\xef\xbb\xbf"


class LineError(SteepleError):
    """What is wrong with a line. ``code`` is for programs, ``param`` names the field."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param

    def as_json(self, line: int | None) -> dict[str, Any]:
        """OpenAI's batch error."""
        return {"code": self.code, "message": self.message, "param": self.param, "line": line}


class Scan:
    """Feed it the file's bytes in order, then ``end`` it. ``errors`` holds the first hundred, in OpenAI's shape.

    Args: endpoint: where all requests must go; most_lines: requests that a batch may have; most_bytes: of a line.
    """

    def __init__(self, endpoint: str, most_lines: int, most_bytes: int) -> None:
        self.errors: list[dict[str, Any]] = []
        self.total = 0
        self.over = False
        self._endpoint, self._most_lines, self._most_bytes = endpoint, most_lines, most_bytes
        self._names: dict[str, int] = {}
        self._rest = b""
        self._start = 0  # byte of the file at which the rest begins
        self._line = 0

    def feed(self, data: bytes) -> list[Task]:
        """The requests that end in ``data``."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        found = [self._take(line) for line in whole]
        if len(self._rest) > self._most_bytes:
            self._take(self._rest)
            self.over = True  # the line may have no end
        return [task for task in found if task is not None]

    def end(self) -> list[Task]:
        """The last request, if no newline follows it."""
        last = None if self.over else self._take(self._rest)
        if not self.total and not self.errors:
            self.errors.append(LineError("empty_file", "the file holds no requests.").as_json(None))
        return [] if last is None else [last]

    def _take(self, raw: bytes) -> Task | None:
        start, self._start = self._start, self._start + len(raw) + 1
        self._line += 1
        if self.over or not raw.strip():
            return None
        try:
            name = self._check(raw)
        except LineError as error:
            self.errors.append(error.as_json(self._line))
            self.over = len(self.errors) >= MOST_ERRORS or error.code == "too_many_requests"
            return None
        return Task(self._line, name, start, len(raw))

    def _check(self, raw: bytes) -> str:
        self.total += 1
        if self.total > self._most_lines:
            raise LineError("too_many_requests", f"a batch has at most {self._most_lines} requests; split the file.")
        if len(raw) > self._most_bytes:
            raise LineError("line_too_long", f"the line is longer than {self._most_bytes} bytes; shorten it.")
        name = check_envelope(parse(raw), self._endpoint)
        earlier = self._names.setdefault(name, self._line)
        if earlier != self._line:
            shown = ascii(name[:60])
            raise LineError(
                "duplicate_custom_id", f"custom_id {shown} was given in line {earlier} already.", "custom_id"
            )
        return name


def parse(raw: bytes) -> dict[str, Any]:
    """A line as an object. ``LineError`` if it is none."""
    try:
        line = json.loads(raw.removeprefix(BOM).decode())
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json_line", "the line is no JSON in UTF-8.") from error
    if not isinstance(line, dict):
        raise LineError("invalid_json_line", "the line is no JSON object.")
    return line


def check_envelope(line: dict[str, Any], endpoint: str) -> str:
    """The name of a request. ``LineError`` if what stands around its body is wrong."""
    for key in line:
        if key not in ENVELOPE:
            shown = ascii(key[:60])
            raise LineError(
                "unknown_parameter", f"{shown} is no field of a batch line. {did_you_mean(key[:60], ENVELOPE)}"
            )
    name = line.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME:
        message = f"custom_id is missing or is no text of 1 to {MOST_NAME} characters."
        raise LineError("invalid_custom_id", message, "custom_id")
    if line.get("method", "POST") != "POST":
        raise LineError("invalid_method", "method must be 'POST'.", "method")
    if line.get("url", endpoint) != endpoint:
        raise LineError("invalid_url", f"url must be the batch's endpoint, {endpoint!r}.", "url")
    if not isinstance(line.get("body"), dict):
        raise LineError("missing_required_parameter", "body is missing or is no object.", "body")
    return name
