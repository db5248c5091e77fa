"""What a calibration measures: random models of several depths and widths, and drafts made of nothing for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from steeple.bench.calibrate.config import CalibrateConfig
from steeple.bench.step.steady import FilledCache
from steeple.cache.paged import PagedCache
from steeple.config import ModelConfig
from steeple.draft.base import Drafter, Surroundings
from steeple.draft.small_lm import SmallLM, SmallLMConfig
from steeple.draft.sparse_self import SparseSelfConfig
from steeple.draft.spire import SpireDraftConfig, SpireParts, spire_drafter
from steeple.draft.spire_model import SpireShape
from steeple.engine import EngineConfig, LoadedModel
from steeple.engine.build import equipped, prepare_device
from steeple.evidence.random_model import THETA, load_any, random_decoder
from steeple.model.accelerate import accelerate
from steeple.model.run import Runner
from steeple.plan.loaded import shape_of_config
from steeple.plan.rounds import DraftForm
from steeple.plan.shapes import ModelShape

VOCAB = 8192
CONTEXT = 8192
SINK, SELF_WINDOW, LAYER_WINDOW = 16, 128, 64
LAYER_SHARE = 0.25  # of the target's layers that a draft of its last layers has


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_context=CONTEXT,
        rope_inv_freq=tuple(THETA ** (-2 * pair / head_dim) for pair in range(head_dim // 2)),
    )


MODELS: Mapping[str, ModelConfig] = {
    "random-33m": _shape(640, 6, 5, 5, 128, 1792),
    "random-19m": _shape(384, 10, 6, 2, 64, 1024),
    "random-4m": _shape(256, 3, 4, 4, 64, 704),
}
"""Three depths and widths, with and without grouped queries, two beyond the caches of most processors and one within:
so that launches, weights, keys and caches can be told apart. Names count the weights of the blocks and the head."""


@dataclass(frozen=True, slots=True)
class DraftKind:
    """A way to draft that is measured.

    ``layers``: of a draft of the target's width; 0 = all of them, with the target's weights. ``small``: a model of its
    own, with keys of its own.
    """

    name: str
    window: int = 0
    layers: int = 0
    small: ModelConfig | None = None

    def form(self, target: ModelShape) -> DraftForm:
        """What the planner makes of it."""
        if self.small is not None:
            return DraftForm(
                name=self.name, shape=shape_of_config(self.small, self.name), own_weights=True, own_keys=True
            )
        shape = target.last_layers(self.layers) if self.layers else target
        return DraftForm(name=self.name, shape=shape, window=self.window, sink=SINK, own_weights=bool(self.layers))

    def settings(self, k: int, seed: int) -> _Settings:
        """For the engine; ``k`` is the most it drafts."""
        return _Settings(self, k, seed)


@dataclass(frozen=True, slots=True)
class _Settings:
    """A ``DrafterConfig`` whose weights are random."""

    kind: DraftKind
    k: int
    seed: int

    def build(self, around: Surroundings) -> Drafter:
        kind = self.kind
        if kind.small is not None:
            decoder = random_decoder(kind.small, around.dtype, around.device, self.seed)
            decoder.use(around.kernels)
            return _FilledSmallLM(SmallLMConfig(k=self.k), decoder, around)
        if not kind.layers:
            return SparseSelfConfig(sink=SINK, window=kind.window, k=self.k).build(around)
        config = replace(around.decoder.config, num_layers=kind.layers, windows=())
        decoder = random_decoder(config, around.dtype, around.device, self.seed)
        decoder.use(around.kernels)
        total = around.decoder.config.num_layers
        shape = SpireShape(target_layers=tuple(range(total - kind.layers, total)), sink=SINK, window=kind.window)
        return spire_drafter(SpireDraftConfig(k=self.k), shape, SpireParts(decoder), around)


class _FilledSmallLM(SmallLM):
    """Finds all of a text but its newest token in its own cache: reading the text is not what is measured."""

    def prepare(self, cache: PagedCache) -> None:
        around = self._around
        super().prepare(cache)
        self.cache = FilledCache(
            self._decoder.config,
            blocks=cache.pool.count,
            block_size=around.block_size,
            dtype=around.dtype,
            device=around.device,
            attention=around.attention,
            seed=0,
        )
        self._runner = Runner(self._decoder, self.cache, around.attention)
        accelerate(self._runner, graphs=around.graphs)


def names_of(config: CalibrateConfig) -> tuple[str, ...]:
    """The models that ``config`` measures."""
    return config.model or tuple(MODELS)


def load(name: str, config: CalibrateConfig, settings: EngineConfig) -> LoadedModel:
    """One of ``MODELS``, or whatever ``evidence.random_model.load_any`` knows."""
    if name not in MODELS:
        return load_any(name, settings, config.seed)
    device = prepare_device(settings)
    decoder = random_decoder(MODELS[name], getattr(torch, settings.dtype), device, config.seed)
    return equipped(decoder, settings, Path(), None)


def drafts_of(target: ModelConfig) -> tuple[DraftKind, ...]:
    """The drafts that are measured with ``target``: itself through a window, its last layers, a small model."""
    small = replace(MODELS["random-4m"], vocab_size=target.vocab_size, max_context=target.max_context)
    layers = max(1, round(target.num_layers * LAYER_SHARE))
    return (
        DraftKind("self", window=SELF_WINDOW),
        DraftKind("layers", window=LAYER_WINDOW, layers=layers),
        DraftKind("small", small=small),
    )
