"""Between text and token ids, for the server's own thread: a copy of the tokenizer that the engine does not touch."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from steeple.serve.errors import ApiError, wrong
from steeple.serve.schemas import Message

LONG = 4096  # characters from which on encoding would hold up the other requests
BYTES = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
LOST = "\ufffd"


class Texts:
    """Args: tokenizer of transformers; vocab: rows of the model's head."""

    def __init__(self, tokenizer: Any, vocab: int) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.vocab = vocab
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="steeple-encode")
        self.token_bytes = lru_cache(maxsize=1 << 16)(self._token_bytes)

    async def encode(self, text: str, *, special: bool = True, param: str = "prompt") -> list[int]:
        """Token ids of a text. ``ApiError`` 400 if it is no Unicode text."""
        loop = asyncio.get_running_loop()
        try:
            if len(text) < LONG:
                return self._encode(text, special)
            return await loop.run_in_executor(self._worker, self._encode, text, special)
        except (TypeError, UnicodeError) as error:
            raise wrong(param, f"{param} holds half a surrogate pair, which is no text; remove it.") from error

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    async def chat(self, messages: Sequence[Message], *, prompt: bool = True) -> list[int]:
        """Token ids of a conversation, by the tokenizer's own chat template or else by ``plain``.

        Args: prompt: end with what calls for the assistant's turn.
        """
        turns = [{"role": message.role, "content": message.text} for message in messages]
        if not getattr(self.tokenizer, "chat_template", None):
            return await self.encode(plain(turns, prompt), param="messages")
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise wrong("messages", f"the model's chat template refuses these messages: {str(error)[:200]}") from error
        return await self.encode(text, special=False, param="messages")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special ones included. ``ApiError`` 400 for ids that are none."""
        self.check(tokens, "tokens")
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def check(self, tokens: Sequence[int], param: str) -> None:
        """``ApiError`` 400 unless all are token ids of the model."""
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab:
            raise wrong(param, f"{param} holds token ids outside 0..{self.vocab - 1}.")

    def _token_bytes(self, token: int) -> bytes:
        """What a token adds to a text; of byte-level vocabularies exactly that, though it may be half a character."""
        text = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if LOST not in text:
            return text.encode()
        symbols = self.tokenizer.convert_ids_to_tokens(token) or ""
        return bytes(BYTES[s] for s in symbols) if all(s in BYTES for s in symbols) else text.encode()

    def token_text(self, token: int) -> str:
        """A token as log-probabilities name it; bytes that are no text by themselves are spelled out."""
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def plain(turns: Sequence[dict[str, str]], prompt: bool) -> str:
    """The template of models that have none: ``role: content`` a line each, then ``assistant:``."""
    lines = "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns)
    return lines + ("assistant:" if prompt else "")


def not_found(name: str, served: str) -> ApiError:
    """The answer to a model that is not here."""
    shown = name if len(name) <= 80 else name[:80] + "..."
    message = f"the model {shown!r} is not served here; this server has {served!r}."
    return ApiError(404, message, param="model", code="model_not_found")
