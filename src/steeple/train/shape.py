"""The shapes that can be trained from scratch, and the weights that training begins with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from steeple.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama-family model with untied embeddings and one key/value head per query head."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    vocab: int = 4096
    context: int = 4096
    rope_theta: float = 10000.0


SHAPES = {
    "target": Shape(layers=8, hidden=512, heads=8, head_dim=128, intermediate=1408),
    # an eighth of the target's body
    "small": Shape(layers=4, hidden=256, heads=8, head_dim=64, intermediate=704),
    # a tenth of the small one's body: cheap enough to draft for whatever is easy
    "little": Shape(layers=2, hidden=128, heads=2, head_dim=64, intermediate=352),
    # trains in seconds: to try a recipe
    "tiny": Shape(layers=2, hidden=32, heads=2, head_dim=16, intermediate=64, vocab=512, context=256),
}


def llama_config(shape: Shape, eos: int) -> LlamaConfig:
    """The Hugging Face configuration of ``shape``; ``eos`` also begins a text."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=eos,
        eos_token_id=eos,
    )


@torch.no_grad()
def init_weights(model: Decoder, seed: int) -> None:
    """Normal weights of fan-in scale; what writes to the residual stream, logits and biases start at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
        elif name.startswith("head.") or name.endswith((".o.weight", ".down.weight")):
            parameter.zero_()
        else:
            std = 0.5 if name.startswith("embed.") else parameter.shape[1] ** -0.5
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
