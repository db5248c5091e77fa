"""The engines of a sweep: one for each drafter, all on one target cache, so that a prompt is computed once."""

from __future__ import annotations

from dataclasses import dataclass

from steeple.bench.config import PLAIN
from steeple.bench.sweep.config import SweepConfig
from steeple.draft import drafter_config
from steeple.draft.base import DrafterConfig
from steeple.engine import Engine, EngineConfig, LoadedModel, build_engine
from steeple.errors import CapacityError
from steeple.evidence.measure import Run, run_requests
from steeple.hardware import available_memory
from steeple.request import Request

STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Method:
    """A drafter at one k on its engine.

    nodes: of a full draft. adaptive: the engine itself decides how many nodes there are, at most so many.
    """

    drafter: str
    k: int
    nodes: int
    adaptive: bool
    engine: Engine

    @property
    def label(self) -> str:
        return self.drafter if self.adaptive or not self.k else f"{self.drafter} k={self.k}"

    def run(self, requests: list[Request], tokens: int = 0) -> Run:
        """Run ``requests`` until they have written ``tokens`` on average; 0: to their end."""
        if not self.adaptive:
            self.engine.budget = lambda _request: self.nodes
        return run_requests(self.engine, requests, nodes=self.nodes, tokens=tokens)


def settings(config: SweepConfig, *, dtype: str, kv_tokens: int, batch_size: int) -> EngineConfig:
    """Prefixes are shared. A step holds all prompts of a batch if at most two blocks of each are still unknown."""
    plain = EngineConfig(dtype=dtype, device=config.device, threads=config.threads, native=config.native)
    return EngineConfig(
        dtype=dtype,
        device=config.device,
        threads=config.threads,
        native=config.native,
        kv_tokens=kv_tokens,
        batch_size=batch_size,
        step_tokens=max(STEP_TOKENS, batch_size * (2 * plain.block_size + 1)),
    )


class Engines:
    """Plain decoding and all methods over one target.

    Raises:
        ConfigError: a drafter is unknown or cannot be built. CapacityError: the caches do not fit together.
    """

    def __init__(self, config: SweepConfig, target: LoadedModel, engine_config: EngineConfig) -> None:
        self._target, self._settings = target, engine_config
        engine = build_engine(target, engine_config)
        self._cache = engine.cache
        self.plain = Method(PLAIN, 0, 0, False, engine)
        self.methods = [method for spec in config.speculative for method in self._methods(spec, config.ks)]
        self._check_memory()

    def _methods(self, spec: str, ks: tuple[int, ...]) -> list[Method]:
        """All k of a drafter on one engine where its drafts are chains; a tree of another depth needs another one."""
        own = drafter_config(spec)
        if getattr(own, "adaptive", False):
            engine, nodes = self._engine(own)
            return [Method(spec, nodes, nodes, True, engine)]
        largest = max(ks)
        engine, nodes = self._engine(drafter_config(spec, k=largest))
        if nodes == largest:
            return [Method(spec, k, k, False, engine) for k in ks]
        others = {k: self._engine(drafter_config(spec, k=k)) for k in ks if k != largest}
        engines = others | {largest: (engine, nodes)}
        return [Method(spec, k, engines[k][1], False, engines[k][0]) for k in ks]

    def _engine(self, drafter: DrafterConfig | None) -> tuple[Engine, int]:
        """The engine of a drafter, and the most nodes that it drafts."""
        engine = build_engine(self._target, self._settings, drafter, self._cache)
        return engine, engine.drafter.needs.nodes if engine.drafter is not None else 0

    def _check_memory(self) -> None:
        drafters = {id(method.engine): method.engine.drafter for method in self.methods}.values()
        own = sum(drafter.needs.own_cache_bytes_per_token for drafter in drafters if drafter is not None)
        tokens = self._cache.pool.count * self._cache.block_size
        needed, available = tokens * (self._cache.spec.bytes_per_token + own), available_memory(self._target.device)
        if self._target.device.type == "cpu" and needed > available:  # elsewhere all of it is taken already
            raise CapacityError(
                f"the caches of the target and of {len(drafters)} drafters for {tokens} positions take "
                f"{needed / 2**20:.0f} MiB, {(needed - available) / 2**20:.0f} MiB more than there is; "
                "lower batch or context, or compare fewer drafters at once."
            )
