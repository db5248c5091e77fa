"""The process: load the model, listen, serve until a signal comes, then finish what runs."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from steeple.errors import ConfigError
from steeple.llm import LLM
from steeple.serve.app import create_app
from steeple.serve.auth import Keys
from steeple.serve.config import ServeConfig
from steeple.serve.loop import EngineLoop

log = logging.getLogger(__name__)

GRACE = 2.0  # seconds between the end of the engine's loop and that of the connections: time to send the last answers


class Server(uvicorn.Server):
    """Uvicorn, whose shutdown begins with that of the engine's loop. Args: seconds: what running requests get."""

    def __init__(self, config: uvicorn.Config, loop: EngineLoop, seconds: float) -> None:
        super().__init__(config)
        self._loop, self._seconds = loop, seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new requests, let those that run finish, and end."""
        self._loop.drain(self._seconds)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but an orderly end stays one: the signal is not raised again."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(config: ServeConfig) -> socket.socket:
    """A socket at the address of ``config``. ``ConfigError`` if it is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"ServeConfig: cannot listen on {config.host}:{config.port} ({error}); give another port or host."
        ) from error


def address(config: ServeConfig, bound: socket.socket) -> str:
    """The URL under which a person on this machine finds the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"http{'s' if config.ssl_certfile else ''}://{host}:{bound.getsockname()[1]}"


def serve(config: ServeConfig, tell: Callable[[str, LLM], None] | None = None) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM.

    Args:
        tell: called once with the address when requests are taken.

    Returns:
        What was done: requests by outcome, prompt_tokens, generation_tokens, failures.

    Raises:
        ConfigError: the address, the keys or the settings are wrong.
        ModelError, CapacityError: the model cannot be used.
    """
    Keys.load(config.keys_file)  # a wrong file is told before a model is loaded
    with contextlib.closing(listen(config)) as bound:
        llm = LLM(config.model, config.drafter, k=config.k, config=config.engine)
        loop = EngineLoop(llm.engine, queue_size=config.queue_size, retry_after=config.retry_after)
        settings = uvicorn.Config(
            create_app(loop, config),
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=max(1, round(config.drain_seconds + GRACE)),
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        )
        with loop:
            if tell is not None:
                tell(address(config, bound), llm)
            Server(settings, loop, config.drain_seconds).run(sockets=[bound])
    tally = loop.tally
    return {
        "outcomes": dict(tally.outcomes),
        "prompt_tokens": tally.prompt_tokens,
        "generation_tokens": tally.generation_tokens,
        "failures": tally.failures,
    }
