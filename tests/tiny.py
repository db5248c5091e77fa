"""Tiny random Llama models with a tokenizer of their own, on disk, for tests that need an engine but no sense."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from steeple.train.tokenizer import train_tokenizer

TEXT = (
    "def area(width, height):\n    return width * height\n",
    "class Box:\n    def __init__(self, side):\n        self.side = side\n",
    "for index in range(10):\n    print(index, 'of', 10)\n",
)
VOCAB = 320

transformers.utils.logging.disable_progress_bar()


def tiny_tokenizer(vocab: int = VOCAB, context: int = 256) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocab`` entries with an end-of-text token (id 0) and a chat template."""
    return train_tokenizer(TEXT, vocab, context)


def tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 256,
    vocab: int = VOCAB,
    spread: float = 0.3,
) -> Path:
    """Write a random Llama with a tokenizer to ``folder`` and return it.

    ``spread`` is the standard deviation of its weights: with 0.3 the laws are sharp enough to differ from token to
    token, and flat enough that sampling matters. Models of one ``vocab`` share their tokenizer.
    """
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        initializer_range=spread,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).float()
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    tiny_tokenizer(vocab, context).save_pretrained(folder)
    return folder
