"""The server: OpenAI's endpoints over an engine that runs in a thread of its own."""

from steeple.serve.config import ServeConfig
from steeple.serve.loop import EngineLoop

__all__ = ["EngineLoop", "ServeConfig"]
