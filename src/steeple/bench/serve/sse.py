"""Server-sent events out of the bytes of a response, however they were cut into pieces.

Lines end with CR, LF or both, and with nothing else: a JSON string may hold U+2028 or U+0085 as it is, where Python's
``splitlines`` (and so ``httpx.Response.aiter_lines``) would break it in two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LINE_END = re.compile(rb"\r\n|\n|\r")


class EventReader:
    """Keeps what is not yet a whole event."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of every event that ``piece`` completes. ``UnicodeDecodeError`` if it is no text."""
        self._rest += piece
        start = 0
        while found := LINE_END.search(self._rest, start):
            if found[0] == b"\r" and found.end() == len(self._rest):
                break  # the line feed that belongs to it may be under way
            line, start = self._rest[start : found.start()], found.end()
            yield from self._line(line)
        self._rest = self._rest[start:]

    def end(self) -> Iterator[str]:
        """What an orderly end of the response completes: not every server writes the last empty line."""
        line, self._rest = self._rest.rstrip(b"\r"), b""
        yield from self._line(line)
        yield from self._line(b"")

    def _line(self, line: bytes) -> Iterator[str]:
        if not line:
            if self._data:
                data, self._data = b"\n".join(self._data), []
                yield data.decode()
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
