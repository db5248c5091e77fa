"""Random models by name, for measurements that no trained weights are needed for: time does not depend on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from steeple import hf
from steeple.config import ModelConfig
from steeple.engine import EngineConfig, LoadedModel, load_model
from steeple.engine.build import equipped, prepare_device
from steeple.errors import ConfigError, ModelError, did_you_mean
from steeple.hf import EMBEDDED
from steeple.model import Decoder, model_config

SPREAD = 0.02  # standard deviation of every weight, as in published Llamas before training
THETA = 10000.0


def llama_100m() -> ModelConfig:
    """A Llama of 125 million weights, 100 of them outside the embedding, with grouped queries (3 to a key head)."""
    head_dim = 64
    return ModelConfig(
        vocab_size=32000,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        head_dim=head_dim,
        intermediate_size=2048,
        max_context=8192,
        rope_inv_freq=tuple(THETA ** (-2 * pair / head_dim) for pair in range(head_dim // 2)),
    )


RANDOM: Mapping[str, ModelConfig] = {"random-100m": llama_100m()}


def shape_of(model: str) -> ModelConfig:
    """The shape of ``model``, from its configuration alone: a random one's name, or what ``hf.resolve`` takes.

    Raises:
        ModelError, UnsupportedModel: there is no such model or its family is unknown; a note names the closest.
    """
    if model in RANDOM:
        return RANDOM[model]
    if model.startswith("random"):
        raise ConfigError(f"There is no random model {model!r}. {did_you_mean(model, RANDOM)}")
    try:
        return model_config(hf.load_hf_config(hf.resolve(model)))
    except ModelError as error:
        if "/" not in model or model in EMBEDDED:
            error.add_note(did_you_mean(model, (*EMBEDDED, *RANDOM)))
        raise


def load_any(model: str, config: EngineConfig, seed: int = 0) -> LoadedModel:
    """``load_model``, which knows the random models as well. Those have no tokenizer and no folder."""
    if model not in RANDOM:
        return load_model(model, config)
    device = prepare_device(config)
    decoder = random_decoder(RANDOM[model], getattr(torch, config.dtype), device, seed)
    return equipped(decoder, config, Path(), None)


def random_decoder(shape: ModelConfig, dtype: torch.dtype, device: torch.device | str, seed: int) -> Decoder:
    """A decoder of ``shape`` for inference: matrices are normal, norms are 1, biases are 0."""
    with torch.device("meta"):
        decoder = Decoder(shape)
    decoder.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, SPREAD, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    decoder.reset_rope()
    return decoder.eval().requires_grad_(False)
