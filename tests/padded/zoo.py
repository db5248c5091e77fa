"""Tiny random models of many architectures, their noisy copies as assistants, and the slow truth about both."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

VOCAB, CONTEXT = 61, 128
COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
MANY_HEADED = {**LLAMA, "num_key_value_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}

# Architecture, options. The first is of the family that Steeple's own decoder serves.
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2_short": ("GPT2LMHeadModel", {**GPT2, "n_positions": 24}),
    "gpt_neox": ("GPTNeoXForCausalLM", MANY_HEADED),
    "opt": (
        "OPTForCausalLM",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "word_embed_proj_dim": 32,
        },
    ),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "phi": ("PhiForCausalLM", MANY_HEADED),
    "stablelm": ("StableLmForCausalLM", LLAMA),
    "gptj": ("GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "falcon": ("FalconForCausalLM", {**MANY_HEADED, "alibi": False, "max_position_embeddings": CONTEXT}),
    "falcon_alibi": ("FalconForCausalLM", {**MANY_HEADED, "alibi": True, "max_position_embeddings": CONTEXT}),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT}),
    "mistral": ("MistralForCausalLM", {**LLAMA, "sliding_window": 6}),
    "bart": (
        "BartForCausalLM",
        {
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": CONTEXT,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 100,
        },
    ),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}
# Where a mask and positions say all; the others tell positions by the slots of the cache.
HOLES = ("llama", "gpt2", "gpt_neox", "opt", "phi", "stablelm", "gptj", "falcon")
SLOTS_COUNT = ("bloom", "falcon_alibi", "mpt", "mistral", "gpt_neo")

transformers.utils.logging.disable_progress_bar()


@functools.cache
def zoo(name: str, vocab: int = VOCAB, implementation: str = "sdpa") -> Any:
    """A random model of one architecture, whose choices are neither certain nor always the same."""
    kind, options = ZOO[name]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**{**COMMON, **options, "vocab_size": vocab})
    if implementation != "sdpa":
        config._attn_implementation = implementation
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for label, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.2 / weight.shape[-1] ** 0.5)
            elif "norm" not in label and "ln" not in label:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
        head = model.get_output_embeddings().weight
        head.mul_(3.0)
    return model.requires_grad_(False)


@functools.cache
def noisy(name: str, noise: float = 0.25, vocab: int = VOCAB) -> Any:
    """The model with noise on its head: an assistant that is often right, and often not."""
    model = copy.deepcopy(zoo(name, vocab))
    generator = torch.Generator().manual_seed(9)
    head = model.get_output_embeddings().weight
    head.add_(torch.randn(head.shape, generator=generator) * noise * head.std())
    return model


@functools.cache
def unrelated(vocab: int = VOCAB) -> Any:
    """An assistant of another architecture that knows nothing of the target."""
    return zoo("gpt2", vocab)


def texts(lengths: Sequence[int], vocab: int = VOCAB, seed: int = 3) -> list[list[int]]:
    numbers = np.random.default_rng(seed)
    return [numbers.integers(2, vocab, size=length).tolist() for length in lengths]


@torch.no_grad()
def last_logits(model: Any, text: Sequence[int]) -> torch.Tensor:
    """After a text, with no cache, no mask and no batch."""
    return model(input_ids=torch.tensor([list(text)]), use_cache=False).logits[0, -1].float()


def alone(model: Any, prompt: Sequence[int], length: int, ends: Sequence[int] = ()) -> list[int]:
    """The truth: the model's own greedy text, one token at a time."""
    text, first = list(prompt), len(prompt)
    while len(text) < first + length and not (len(text) > first and text[-1] in ends):
        text.append(int(last_logits(model, text).argmax()))
    return text[first:]
