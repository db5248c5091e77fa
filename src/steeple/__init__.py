"""Steeple: lossless speculative decoding at large batch and long context.

The public names load when they are first used, so that ``steeple --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steeple.engine.config import EngineConfig as EngineConfig
    from steeple.errors import CapacityError as CapacityError
    from steeple.errors import ConfigError as ConfigError
    from steeple.errors import InternalError as InternalError
    from steeple.errors import ModelError as ModelError
    from steeple.errors import RequestError as RequestError
    from steeple.errors import SteepleError as SteepleError
    from steeple.errors import StorageError as StorageError
    from steeple.errors import TokenizerMismatch as TokenizerMismatch
    from steeple.errors import UnsupportedModel as UnsupportedModel
    from steeple.errors import WeightError as WeightError
    from steeple.llm import LLM as LLM
    from steeple.llm import Completion as Completion
    from steeple.llm import RequestOutput as RequestOutput
    from steeple.llm import StreamEvent as StreamEvent
    from steeple.llm import Task as Task
    from steeple.types import SamplingParams as SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "steeple.engine.config": ("EngineConfig",),
    "steeple.errors": (
        "CapacityError",
        "ConfigError",
        "InternalError",
        "ModelError",
        "RequestError",
        "SteepleError",
        "StorageError",
        "TokenizerMismatch",
        "UnsupportedModel",
        "WeightError",
    ),
    "steeple.llm": ("LLM", "Completion", "RequestOutput", "StreamEvent", "Task"),
    "steeple.types": ("SamplingParams",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'steeple' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
