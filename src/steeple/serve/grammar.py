"""Compiles JSON grammars: once for each schema, one at a time, outside of the engine's and the server's threads."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from steeple.serve.constraint import JsonGrammar
from steeple.serve.errors import wrong

FIELD = "response_format"
MOST_BYTES, MOST_DEPTH, MOST_KEYS = 1 << 16, 32, 256  # of a schema, and of each object in it
PATIENCE = 15.0  # seconds until a schema counts as too intricate
CACHE = 1 << 28
ANY_OBJECT: dict[str, Any] = {"type": "object"}
PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")  # xgrammar's messages begin with a time and a line of its own source


class Grammars:
    """Args: tokenizer of the model; vocab: rows of its head; stops: the model's own tokens that end a text."""

    def __init__(self, tokenizer: Any, vocab: int, stops: frozenset[int]) -> None:
        self._tokenizer, self._vocab, self._stops = tokenizer, vocab, stops
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="steeple-grammar")

    async def grammars(self, schema: dict[str, Any], count: int, *, strict: bool = False) -> list[JsonGrammar]:
        """``count`` constraints, one per sequence. ``strict``: only properties that the schema names.

        Raises ``ApiError`` 400 if the schema cannot be compiled.
        """
        if not self._stops:
            raise wrong(FIELD, f"{FIELD} needs a model with an end-of-text token, and this one has none.")
        text = "" if _too_wide(schema, MOST_DEPTH) else json.dumps(schema)
        if not 0 < len(text) <= MOST_BYTES:
            bounds = f"{MOST_BYTES} bytes, {MOST_DEPTH} levels and {MOST_KEYS} keys in an object"
            raise wrong(FIELD, f"{FIELD}: the schema is too large; at most {bounds} are read.")
        work = asyncio.get_running_loop().run_in_executor(self._worker, self._compiled, text, count, strict)
        try:
            return await asyncio.wait_for(work, PATIENCE)
        except TimeoutError as error:
            raise wrong(
                FIELD, f"{FIELD}: the schema could not be compiled in {PATIENCE:.0f} s; simplify it."
            ) from error

    @cached_property
    def _compiler(self) -> Any:
        import xgrammar  # takes a second, and most servers never need it

        info = xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer, vocab_size=self._vocab, stop_token_ids=sorted(self._stops)
        )
        return xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE)

    def _compiled(self, schema: str, count: int, strict: bool) -> list[JsonGrammar]:
        import xgrammar

        try:
            # Without free white space a model cannot write blanks until its tokens are used up.
            grammar = self._compiler.compile_json_schema(schema, any_whitespace=False, strict_mode=strict)
        except Exception as error:  # it raises RuntimeError for most, others for some
            reason = PLACE.sub("", (str(error).strip() or type(error).__name__).splitlines()[-1])[:200]
            raise wrong(f"{FIELD}.json_schema.schema", f"{FIELD}: the JSON schema cannot be used: {reason}") from error
        return [JsonGrammar(xgrammar.GrammarMatcher(grammar), self._vocab) for _ in range(count)]


def _too_wide(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than ``levels`` deep, or an object has too many keys."""
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    wide = isinstance(value, dict) and len(value) > MOST_KEYS  # compiling takes the square of it
    return wide or levels == 0 or any(_too_wide(item, levels - 1) for item in inside)
