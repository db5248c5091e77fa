"""Writes a random Llama of 100 M parameters, for what depends on the shape of a model and not on what it says.

python bench/peers/random_model.py FOLDER [--tokenizer models/target]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_random_model(folder: Path, tokenizer: Path, *, layers: int = 12, vocab: int = 32000, seed: int = 0) -> None:
    """A bfloat16 checkpoint with the tokenizer of another folder, whose ids are the first of the vocabulary."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)


def main() -> None:
    """Write it where the command says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=Path("models/target"))
    given = parser.parse_args()
    write_random_model(given.folder, given.tokenizer)


if __name__ == "__main__":
    main()
