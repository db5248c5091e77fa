"""The engine and how it is built."""

from __future__ import annotations

from steeple.engine.build import LoadedModel, build_engine, load_model
from steeple.engine.config import EngineConfig
from steeple.engine.engine import Committed, Engine

__all__ = ["Committed", "Engine", "EngineConfig", "LoadedModel", "build_engine", "load_model"]
