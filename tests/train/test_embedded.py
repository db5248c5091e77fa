"""The committed models: complete, small, of one vocabulary, and with cards that say what the records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steeple.hf import check_same_tokenizer, load_tokenizer
from steeple.model.load import load_decoder
from steeple.train.card import card
from steeple.train.loss import next_token_loss

MODELS = Path(__file__).resolve().parents[2] / "models"
NAMES = ("target", "small", "little")
TEXT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self."


def record(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "training.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_the_record(name: str) -> None:
    assert (MODELS / name / "README.md").read_text(encoding="utf-8") == card(record(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_the_recorded_ones_and_have_learned(name: str) -> None:
    model = load_decoder(MODELS / name, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == record(name)["parameters"]
    tokens = torch.tensor([load_tokenizer(MODELS / name).encode(TEXT)])
    assert next_token_loss(model, tokens).item() < 4.0  # a uniform law has 8.3


def test_the_schedule_was_finished() -> None:
    for name in NAMES:
        made = record(name)
        settings = made["settings"]
        assert made["steps"] == settings["tokens"] // settings["batch_tokens"] == made["curve"][-1]["step"]
        assert made["curve"][-1]["lr"] < 0.02 * settings["matrix_lr"]


def test_one_vocabulary_and_few_bytes() -> None:
    for name in NAMES[1:]:
        check_same_tokenizer(load_tokenizer(MODELS / "target"), load_tokenizer(MODELS / name))
    assert sum(path.stat().st_size for name in NAMES for path in (MODELS / name).glob("*.safetensors")) < 95e6


def test_the_tokenizer_gives_every_text_back() -> None:
    tokenizer = load_tokenizer(MODELS / "target")
    for text in (TEXT, "a .b\r\n\t é\u0301 \U0001f600 it 's 12,345  \n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
