"""What all routes share: the engine's loop, the texts, the grammars, and what the model has room for."""

from __future__ import annotations

import time

from steeple.draft import NO_DRAFTER
from steeple.serve.config import ServeConfig
from steeple.serve.errors import ApiError
from steeple.serve.grammar import Grammars
from steeple.serve.loop import EngineLoop
from steeple.serve.texts import Texts, not_found


class Service:
    """Args: loop: the engine's; config: of the server."""

    no_drafter = NO_DRAFTER

    def __init__(self, loop: EngineLoop, config: ServeConfig) -> None:
        parts = loop.engine.parts
        shape = parts.decoder.config
        self.loop, self.config = loop, config
        self.texts = Texts(parts.tokenizer, shape.vocab_size)
        self.grammars = Grammars(parts.tokenizer, shape.vocab_size, frozenset(shape.eos_token_ids))
        self.context = min(parts.max_context, parts.cache.pool.count * parts.cache.block_size)
        self.created = int(time.time())

    def check_model(self, name: str | None) -> None:
        """``ApiError`` 404 if a request is for another model; one that names none is for this."""
        if name is not None and name != self.config.name:
            raise not_found(name, self.config.name)

    def check_ready(self) -> None:
        """``ApiError`` 503 if no requests are taken."""
        if not self.loop.ready:
            why = self.loop.trouble or "the server is shutting down"
            raise ApiError(503, f"not ready: {why}.", code="unavailable")
