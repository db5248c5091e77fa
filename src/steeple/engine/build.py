"""From names and settings to a running engine: load, plan the memory, build the drafter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steeple import hf
from steeple.cache.paged import PagedCache
from steeple.draft.base import Drafter, DrafterConfig, Surroundings
from steeple.engine.config import EngineConfig
from steeple.engine.engine import Engine, EngineParts
from steeple.errors import ConfigError
from steeple.hardware import available_memory, pick_device
from steeple.model.decoder import Decoder
from steeple.model.load import load_decoder
from steeple.ops.attention import PagedAttention
from steeple.ops.kernels import Kernels, kernels
from steeple.ops.native_attention import attention_backend
from steeple.plan.memory import plan_cache

MOST_REQUESTS = 256


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
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    folder = hf.resolve(model)
    decoder = load_decoder(
        folder, dtype=getattr(torch, config.dtype), device=device, max_context=config.max_context or None
    )
    native = None if config.native else False
    operations = kernels(device, native)
    decoder.use(operations)
    attention = attention_backend(device, native)
    return LoadedModel(folder, decoder, hf.load_tokenizer(folder), attention, operations, device)


def build_engine(target: LoadedModel, config: EngineConfig, drafter: DrafterConfig | None = None) -> Engine:
    """An engine for ``target``, with caches of its own."""
    shape = target.decoder.config
    dtype = getattr(torch, config.dtype)
    if target.decoder.dtype != dtype:
        loaded = str(target.decoder.dtype).removeprefix("torch.")
        raise ConfigError(f"EngineConfig.dtype = {config.dtype!r}, but the model was loaded in {loaded}; give that.")
    max_context = min(config.max_context or shape.max_context, shape.max_context)
    built: Drafter | None = None
    if drafter is not None:
        built = drafter.build(
            Surroundings(
                decoder=target.decoder,
                tokenizer=target.tokenizer,
                attention=target.attention,
                kernels=target.kernels,
                device=target.device,
                dtype=dtype,
                block_size=config.block_size,
                step_tokens=config.step_tokens,
                model_folder=target.folder,
                share_prefixes=config.share_prefixes,
            )
        )
    per_token = shape.kv_elements_per_token * dtype.itemsize
    sizes = plan_cache(
        available=available_memory(target.device),
        bytes_per_token=per_token + (built.needs.own_cache_bytes_per_token if built is not None else 0),
        block_size=config.block_size,
        max_context=max_context,
        wanted_tokens=config.kv_tokens,
    )
    if built is not None:
        built.prepare(sizes.blocks)
    cache = PagedCache(
        shape,
        blocks=sizes.blocks,
        block_size=config.block_size,
        dtype=dtype,
        device=target.device,
        share_prefixes=config.share_prefixes,
        write=target.attention.write_kv,
    )
    batch_size = min(config.batch_size or MOST_REQUESTS, sizes.blocks)
    return Engine(
        EngineParts(
            decoder=target.decoder,
            cache=cache,
            attention=target.attention,
            drafter=built,
            tokenizer=target.tokenizer,
            batch_size=batch_size,
            step_tokens=config.step_tokens,
            max_context=max_context,
        )
    )
