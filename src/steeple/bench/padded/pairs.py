"""Targets and assistants of a padded bench: published ones, and random ones of architectures that Steeple has no
decoder for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from steeple import hf
from steeple.bench.padded.config import ARCHITECTURES, PaddedBenchConfig
from steeple.evidence.prompts import PromptCutter, read_source
from steeple.hardware import pick_device

WIDTH, LAYERS, HEADS = 256, 6, 4
ASSISTANT_LAYERS = 1  # of a random target's layers, the first: near enough to it to be right now and then

EMBEDDING = 50.0  # times their usual size


@dataclass(frozen=True, slots=True)
class Pair:
    """A target, its assistant and the work: prompts, and how many tokens each of them is answered with."""

    name: str
    target: Any
    assistant: Any
    prompts: list[list[int]]
    counts: list[int]


def pairs(config: PaddedBenchConfig) -> Iterator[Pair]:
    """The pairs of a bench, one after the other, each with the same prompts."""
    device = pick_device(config.device)
    tokenizer = hf.load_tokenizer(hf.resolve(config.model))
    prompts, counts = work(config, tokenizer)
    dtype = getattr(torch, config.dtype)

    def load(name: str) -> Any:
        folder = hf.resolve(name)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device).eval()

    yield Pair(config.model, load(config.model), load(config.assistant), prompts, counts)
    if config.random:
        context = config.longest + config.max_tokens + config.k + 2
        for name in ARCHITECTURES:
            target, assistant = random_pair(name, len(tokenizer), context, config.seed)
            yield Pair(name, target.to(device, dtype), assistant.to(device, dtype), prompts, counts)


def work(config: PaddedBenchConfig, tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    """Prompts of real text and lengths of outputs, both spread evenly over their ranges, in random order."""
    cutter = PromptCutter(read_source(config.prompts), tokenizer, config.seed)
    numbers = torch.Generator().manual_seed(config.seed)
    lengths = torch.linspace(config.shortest, config.longest, config.requests).round().int().tolist()
    counts = torch.linspace(config.least_tokens, config.max_tokens, config.requests).round().int()
    prompts, taken = [], dict.fromkeys(lengths, 0)
    cut = {length: cutter.cut(length, lengths.count(length)) for length in taken}
    for length in lengths:
        prompts.append(cut[length][taken[length]])
        taken[length] += 1
    order = torch.randperm(config.requests, generator=numbers).tolist()
    shuffled = counts[torch.randperm(config.requests, generator=numbers)].tolist()
    return [prompts[i] for i in order], shuffled


def random_pair(name: str, vocab: int, context: int, seed: int) -> tuple[Any, Any]:
    """A random target and an assistant made of its first layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target = AutoModelForCausalLM.from_config(_shape(name, vocab, context, LAYERS)).eval()
        assistant = AutoModelForCausalLM.from_config(_shape(name, vocab, context, ASSISTANT_LAYERS)).eval()
    # Large embeddings: what the layers add to them is small, so that fewer layers are often right.
    target.get_input_embeddings().weight.data.mul_(EMBEDDING)
    own = assistant.state_dict()
    assistant.load_state_dict({key: value for key, value in target.state_dict().items() if key in own})
    return target, assistant


def _shape(name: str, vocab: int, context: int, layers: int) -> Any:
    """A configuration of one architecture, by the names that all of them understand."""
    config = transformers.AutoConfig.for_model(
        name,
        vocab_size=vocab,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    own = {"intermediate_size": 4 * WIDTH, "ffn_dim": 4 * WIDTH, "word_embed_proj_dim": WIDTH}
    for key, value in {**own, "max_position_embeddings": context}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return config
