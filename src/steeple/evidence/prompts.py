"""Real prompts: windows of exactly so many tokens, cut from real text, different from each other, fixed by a seed.

Without a file the text is what the embedded models were never trained on: the held-out files of the running
interpreter's standard library.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steeple.errors import ConfigError, StorageError
from steeple.train.data import held_out_texts

HELD_OUT = "held-out files of the Python standard library"


@dataclass(frozen=True, slots=True)
class Source:
    """Texts and where they come from."""

    name: str
    texts: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 of all texts: two runs with the same digest, tokenizer and seed have the same prompts."""
        whole = hashlib.sha256()
        for text in self.texts:
            whole.update(text.encode() + b"\0")
        return whole.hexdigest()


def read_source(path: str = "") -> Source:
    """The texts of a ``.txt`` file (one text) or a ``.jsonl`` file (one a line), or the held-out ones.

    Raises:
        StorageError: the file cannot be read, or there is no standard library to read.
        ConfigError: the file is of another kind or a line of it holds no text.
    """
    if not path:
        return Source(HELD_OUT, tuple(text for _, text in held_out_texts()))
    file = Path(path)
    if file.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"prompts = {path!r} is neither .jsonl nor .txt; give one of these.")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"prompts = {path!r} cannot be read: {error}") from error
    if file.suffix == ".txt":
        return Source(file.name, (text,))
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return Source(file.name, tuple(_line_text(path, number, line) for number, line in lines))


def _line_text(path: str, number: int, line: str) -> str:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: no JSON ({error}); correct or remove the line.") from error
    if isinstance(value, dict):
        value = value.get("prompt", value.get("text"))
    if not isinstance(value, str):
        raise ConfigError(f"{path}, line {number}: no string under 'prompt' or 'text'; correct or remove the line.")
    return value


class PromptCutter:
    """Cuts prompts out of a source.

    Args:
        source: the texts. tokenizer: of the target. seed: decides order and places.
    """

    def __init__(self, source: Source, tokenizer: Any, seed: int) -> None:
        self.source, self._tokenizer, self._seed = source, tokenizer, seed
        self._start: list[int] = list(tokenizer.encode(""))  # what the tokenizer puts before every text
        order = np.random.default_rng((seed, 0)).permutation(len(source.texts))
        self._order = [int(i) for i in order]
        self._tokens: dict[int, list[int]] = {}

    def _text(self, index: int) -> list[int]:
        if index not in self._tokens:
            text = self.source.texts[index]
            self._tokens[index] = list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))
        return self._tokens[index]

    def cut(self, length: int, count: int) -> list[list[int]]:
        """``count`` different prompts of exactly ``length`` tokens; more of them begin with the same ones.

        One window from every text before a second from any; windows of a text do not overlap.

        Raises:
            ConfigError: there is not enough text; says how much there is.
        """
        body = length - len(self._start)
        if body < 1:
            raise ConfigError(f"prompts of {length} tokens leave no room for text; lengthen them.")
        found: list[list[int]] = []
        seen: set[tuple[int, ...]] = set()
        queue = [(index, 0) for index in self._order]
        for index, turn in queue:
            tokens = self._text(index)
            windows = len(tokens) // body
            if turn >= windows:
                continue
            queue.append((index, turn + 1))
            place = int(np.random.default_rng((self._seed, length, index)).permutation(windows)[turn])
            prompt = (*self._start, *tokens[place * body : (place + 1) * body])
            if prompt not in seen:
                seen.add(prompt)
                found.append(list(prompt))
            if len(found) == count:
                return found
        longest = max((len(tokens) for tokens in self._tokens.values()), default=0)
        raise ConfigError(
            f"{count} different prompts of {length} tokens are needed, but the text ({self.source.name}: "
            f"{len(self.source.texts)} texts, {sum(map(len, self._tokens.values()))} tokens, the longest {longest}) "
            f"gives {len(found)}; shorten the context, lower the batch, or give more text with prompts."
        )
