"""Steeple: lossless speculative decoding at large batch and long context."""

from __future__ import annotations

from steeple.engine.config import EngineConfig
from steeple.errors import (
    CapacityError,
    ConfigError,
    InternalError,
    ModelError,
    RequestError,
    SteepleError,
    StorageError,
    TokenizerMismatch,
    UnsupportedModel,
    WeightError,
)
from steeple.llm import LLM, Completion, RequestOutput, StreamEvent, Task
from steeple.types import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CapacityError",
    "Completion",
    "ConfigError",
    "EngineConfig",
    "InternalError",
    "ModelError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SteepleError",
    "StorageError",
    "StreamEvent",
    "Task",
    "TokenizerMismatch",
    "UnsupportedModel",
    "WeightError",
]
