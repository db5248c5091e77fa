"""From names and settings to a running engine: load, plan the memory, build the drafter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from steeple import hf
from steeple.cache.paged import PagedCache
from steeple.draft.base import Drafter, DrafterConfig, Surroundings
from steeple.engine.config import EngineConfig
from steeple.engine.engine import Engine, EngineParts
from steeple.engine.memory import (
    MOST_REQUESTS,
    TOLERANCE,
    MemoryPlan,
    budgeted,
    declared,
    lay_of,
    measured,
    most_prompt_rows,
    require_room,
    within,
)
from steeple.engine.pipeline import PipelinedEngine
from steeple.errors import ConfigError
from steeple.hardware import available_memory, pick_device
from steeple.model.decoder import Decoder
from steeple.model.families import model_config
from steeple.model.load import load_decoder
from steeple.model.quantize import quantize_weights
from steeple.ops.attention import PagedAttention
from steeple.ops.kernels import Kernels, kernels
from steeple.ops.memory import give_back
from steeple.ops.native_attention import attention_backend
from steeple.ops.triton_attention import TritonAttention
from steeple.plan.memory import plan_cache
from steeple.plan.memory_fit import Load, Setting
from steeple.plan.memory_parts import DraftMemory

log = logging.getLogger(__name__)

# EngineConfig.weights -> what is done to the decoder as loaded
PREPARE: dict[str, Callable[[Decoder], None]] = {"stored": lambda _decoder: None, "int8": quantize_weights}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A target, loaded once; engines with different drafters may share it."""

    folder: Path
    decoder: Decoder
    tokenizer: Any
    attention: PagedAttention
    kernels: Kernels
    device: torch.device


def load_model(model: str, config: EngineConfig) -> LoadedModel:
    """The target ``model`` (folder, hub name, or ``demo``) in the engine's dtype, on its device."""
    device = prepare_device(config)
    folder = hf.resolve(model)
    if config.budget:
        shape = model_config(hf.load_hf_config(folder), config.max_context or None)
        require_room(shape, config, kernels(device, None if config.native else False), device)
    decoder = load_decoder(
        folder, dtype=getattr(torch, config.dtype), device=device, max_context=config.max_context or None
    )
    return equipped(decoder, config, folder, hf.load_tokenizer(folder))


def prepare_device(config: EngineConfig) -> torch.device:
    """The device to load to, with the process set up for it."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels are launched on the current device
    return device


def equipped(decoder: Decoder, config: EngineConfig, folder: Path, tokenizer: Any) -> LoadedModel:
    """``decoder`` as the engine wants it: quantised if asked for, its weights packed, with an attention."""
    PREPARE[config.weights](decoder)
    native = None if config.native else False
    operations = kernels(decoder.device, native)
    decoder.use(operations)
    attention = attention_backend(decoder.device, native)
    return LoadedModel(folder, decoder, tokenizer, attention, operations, decoder.device)


def build_engine(
    target: LoadedModel, config: EngineConfig, drafter: DrafterConfig | None = None, cache: PagedCache | None = None
) -> Engine:
    """An engine for ``target``, with caches of its own.

    Args:
        cache: the target's cache to run on instead of a new one. Engines may share one if no two of them ever have
            requests at the same time; what one has computed, the others then find. ``memory_budget`` then does nothing.

    Raises ``CapacityError`` if memory, or the budget for it, does not suffice whatever is given up.
    """
    shape = target.decoder.config
    pipelined = config.micro_batches != 1 and drafter is not None
    if pipelined and target.device.type == "cuda" and config.graphs:
        log.info("micro_batches = %d: no CUDA graphs, two threads would record them", config.micro_batches)
        config = replace(config, graphs=False)
    dtype = getattr(torch, config.dtype)
    if target.decoder.dtype != dtype:
        loaded = str(target.decoder.dtype).removeprefix("torch.")
        raise ConfigError(f"EngineConfig.dtype = {config.dtype!r}, but the model was loaded in {loaded}; give that.")
    around = _surroundings(target, config, dtype)
    if config.budget and cache is None:
        plan, built = _within_budget(target, config, drafter, around)
    else:
        plan, built = _unlimited(target, config, drafter, around, cache)
    cache = cache or PagedCache(
        shape,
        blocks=plan.load.blocks,
        block_size=config.block_size,
        dtype=dtype,
        device=target.device,
        share_prefixes=config.share_prefixes and not (built is not None and built.needs.every_row),
        attention=target.attention,
        scratch=target.device.type == "cuda",
    )
    if built is not None:
        built.prepare(cache)
        give_back()  # what reading a drafter's weights left behind
    parts = EngineParts(
        decoder=target.decoder,
        cache=cache,
        attention=target.attention,
        drafter=built,
        tokenizer=target.tokenizer,
        batch_size=plan.load.requests,
        step_tokens=plan.load.chunk,
        max_context=plan.setting.context,
        graphs=config.graphs,
        plan=plan,
    )
    engine = PipelinedEngine(parts, config.micro_batches) if pipelined else Engine(parts)
    if config.deterministic and not engine.batch_invariant:
        raise ConfigError(
            "EngineConfig.deterministic = True, but this model runs on operations whose rounding depends on the batch. "
            "The native kernels do not: they need the CPU, a C++ compiler, native = True, float32 or bfloat16 and even "
            "widths. Give those, or leave deterministic off."
        )
    return engine


def _setting(target: LoadedModel, config: EngineConfig, draft: DraftMemory | None = None) -> Setting:
    shape = target.decoder.config
    lay = lay_of(config, shape, target.kernels, target.device)
    context = min(config.max_context or shape.max_context, shape.max_context)
    return Setting(target=shape, lay=lay, draft=draft, block_size=config.block_size, max_context=context)


def _unlimited(
    target: LoadedModel,
    config: EngineConfig,
    drafter: DrafterConfig | None,
    around: Surroundings,
    cache: PagedCache | None,
) -> tuple[MemoryPlan, Drafter | None]:
    """Without a budget: everything that was asked for, and a cache that pays."""
    setting = _setting(target, config)
    built = None if drafter is None else drafter.build(around)
    own = built.needs.own_cache_bytes_per_token if built is not None else 0
    sizes = plan_cache(
        available=available_memory(target.device),
        bytes_per_token=(setting.key_bytes_per_token if cache is None else 0) + own,
        block_size=config.block_size,
        max_context=setting.context,
        wanted_tokens=config.kv_tokens if cache is None else cache.pool.count * cache.block_size,
    )
    requests = min(config.batch_size or MOST_REQUESTS, sizes.blocks)
    load = Load(requests=requests, blocks=sizes.blocks, chunk=most_prompt_rows(config, requests, setting.context))
    if drafter is not None and built is not None:
        draft = declared(drafter, around, setting.lay) or measured(built, target.decoder)
        k = max(1, min(drafter.k, built.needs.nodes))
        setting, load = replace(setting, draft=draft), replace(load, k=k, width=-(-built.needs.nodes // k))
    return MemoryPlan(setting, load), built


def _within_budget(
    target: LoadedModel, config: EngineConfig, drafter: DrafterConfig | None, around: Surroundings
) -> tuple[MemoryPlan, Drafter | None]:
    """What fits into ``config.memory_budget``; a drafter that declares what it takes is built only if it does."""
    available = available_memory(target.device)
    if drafter is None:
        return budgeted(_setting(target, config), config, 0, 1, available), None
    lay = _setting(target, config).lay
    draft = declared(drafter, around, lay) or measured(drafter.build(around), target.decoder)
    while True:
        setting = _setting(target, config, draft)
        plan = budgeted(setting, config, drafter.k, getattr(drafter, "width", 1), available)
        fitting = within(drafter, plan.load)
        if fitting is None:
            return plan, None
        built = fitting.build(replace(around, step_tokens=plan.load.chunk))
        held = measured(built, target.decoder).held
        if held <= draft.held * (1 + TOLERANCE):
            return plan, built
        draft = replace(draft, held=held)  # it holds more than it said


def _surroundings(target: LoadedModel, config: EngineConfig, dtype: torch.dtype) -> Surroundings:
    attention = target.attention
    if config.micro_batches != 1 and isinstance(attention, TritonAttention):
        attention = TritonAttention(target.device)  # partial sums of its own: it runs beside the target's
    return Surroundings(
        decoder=target.decoder,
        tokenizer=target.tokenizer,
        attention=attention,
        kernels=target.kernels,
        device=target.device,
        dtype=dtype,
        block_size=config.block_size,
        step_tokens=config.step_tokens,
        model_folder=target.folder,
        share_prefixes=config.share_prefixes,
        graphs=config.graphs,
        batch_size=config.batch_size,
    )
