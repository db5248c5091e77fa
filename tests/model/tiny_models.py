"""Tiny models of every family, built by transformers, and plain causal attention over ragged sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from steeple.config import ModelConfig
from steeple.model import Attend, Decoder

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
LENGTHS = (23, 1, 40, 7)

transformers.utils.logging.disable_progress_bar()


def tiny(family: str, **changes: object) -> transformers.PreTrainedModel:
    """A float32 model of ``family`` (the prefix of transformers' classes) whose every weight matters."""
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            # norms around their neutral value, biases and matrices large enough that softmax is neither flat nor hard
            spread = 0.3 if value.dim() == 1 else 0.15
            value.copy_(torch.randn_like(value) * spread + (value if "norm" in name else 0.0))
    return model


def attend_ragged(config: ModelConfig, lengths: Sequence[int]) -> Attend:
    """Causal attention of each sequence with itself; ``config`` says window, scale and softcap."""

    def attend(layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        outs = []
        for q, k, v in zip(*(x.split(list(lengths)) for x in (q_TNH, k_TKH, v_TKH)), strict=True):
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            scores = torch.einsum("tnh,snh->nts", q, k).float() * config.scale
            if config.attention_softcap:
                scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
            age = torch.arange(len(q)).unsqueeze(1) - torch.arange(len(q))
            window = config.window(layer) or len(q)
            scores = scores.masked_fill((age < 0) | (age >= window), -torch.inf)
            outs.append(torch.einsum("nts,snh->tnh", scores.softmax(-1).to(v.dtype), v))
        return torch.cat(outs)

    return attend


def sequences(vocab: int, lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def ragged_logits(decoder: Decoder, texts: Sequence[Tensor]) -> Tensor:
    """``[T, V]`` float32: one flat pass over all texts."""
    lengths = [len(text) for text in texts]
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = decoder(torch.cat(list(texts)), positions, attend_ragged(decoder.config, lengths))
    return decoder.logits(hidden.final_TD).float()


@torch.no_grad()
def published_logits(model: transformers.PreTrainedModel, texts: Sequence[Tensor]) -> Tensor:
    """``[T, V]`` float32: transformers, one text at a time, the longest first."""
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    found = {index: model(texts[index].unsqueeze(0), use_cache=False).logits[0].float() for index in order}
    return torch.cat([found[index] for index in range(len(texts))])
