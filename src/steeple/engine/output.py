"""Token ids to text while a request runs: increments for streaming, and the place where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one request's output, token by token. Args: tokenizer of transformers; stop strings.

    Bytes of an unfinished character are held back until the token that completes it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max((len(s) for s in stop), default=0)
        self._stream = DecodeStream(skip_special_tokens=True)
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> bool:
        """Add a token; True if a stop string is now complete (the text ends before it)."""
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token)
        if not piece:
            return False
        before = len(self.text)
        self.text += piece
        starts = [self.text.find(s, max(0, before - self._longest + 1)) for s in self._stop]
        found = [start for start in starts if start >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True
        return self.stopped

    def safe_length(self) -> int:
        """Characters that no stop string can take back any more."""
        if self.stopped:
            return len(self.text)
        for held in range(min(self._longest - 1, len(self.text)), 0, -1):
            if any(s.startswith(self.text[-held:]) for s in self._stop):
                return len(self.text) - held
        return len(self.text)
