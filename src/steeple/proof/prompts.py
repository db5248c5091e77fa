"""The prompts of a proof: real text where there is any, of every length; and one after which sampling says most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from steeple.engine import EngineConfig, LoadedModel, build_engine
from steeple.errors import ConfigError, StorageError
from steeple.evidence.logits import last_logits
from steeple.evidence.measure import run_requests
from steeple.evidence.prompts import PromptCutter, read_source
from steeple.proof.config import ProofConfig
from steeple.proof.law import processed_law
from steeple.request import Request
from steeple.types import SamplingParams

RANDOM = "random token ids, because there is too little text"
SHORTEST = 4
WINDOWS = 4  # texts that a sampling prompt is looked for in, and as many that the model wrote itself
WINDOW = 97
SHORTEST_SAMPLED = 17
OWN_START = 16


@dataclass(frozen=True, slots=True)
class PromptPool:
    """Prompts of ``context`` tokens, and where they come from."""

    prompts: list[list[int]]
    source: str
    sha256: str | None


def prompt_pool(config: ProofConfig, target: LoadedModel) -> PromptPool:
    """One prompt per request, of the configured length or what the model's context allows.

    Without a file of the user's, random token ids stand in where there is too little text.
    """
    shape = target.decoder.config
    length = min(config.context, shape.max_context - config.max_tokens)
    if length < SHORTEST:
        raise ConfigError(
            f"max_tokens = {config.max_tokens} leaves {length} positions of the model's context of {shape.max_context} "
            f"for the prompt; lower max_tokens to {shape.max_context - SHORTEST} or less."
        )
    try:
        source = read_source(config.prompts)
        cutter = PromptCutter(source, target.tokenizer, config.seed)
        return PromptPool(cutter.cut(length, config.requests), source.name, source.digest)
    except (StorageError, ConfigError):
        if config.prompts:
            raise
    ids = np.random.default_rng(config.seed).integers(shape.vocab_size, size=(config.requests, length))
    return PromptPool(ids.tolist(), RANDOM, None)


def ragged(prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
    """The prompts cut to lengths from a few tokens to all, in mixed order; one is the beginning of another."""
    lengths = np.geomspace(SHORTEST, len(prompts[0]), len(prompts)).round().astype(int)
    cut = [list(prompt[:length]) for prompt, length in zip(prompts, lengths.tolist(), strict=True)]
    cut[-2] = cut[-1][: len(cut[-2])]  # so that blocks of keys are shared
    order = np.random.default_rng(seed).permutation(len(cut))
    return [cut[place] for place in order]


def sampling_prompts(target: LoadedModel, pool: PromptPool, params: SamplingParams, block_size: int) -> list[list[int]]:
    """Prompts for a sampling case, the best first.

    A good prompt leaves the next token open, and ends so that whatever comes next repeats a pair of tokens of the
    prompt: then drafters that look things up have something to propose. Only lengths one above a multiple of
    ``block_size`` come into question: with a shared prefix they cost one row per sample.
    """
    windows = [prompt[:WINDOW] for prompt in pool.prompts[:WINDOWS]]
    scored: list[tuple[float, list[int]]] = []
    for text in [*windows, *_continued(target, [w[:OWN_START] for w in windows])]:
        logits_SV = last_logits(target, [text], last=len(text))[0].double().cpu().numpy()
        first = min(SHORTEST_SAMPLED, 1 + (len(text) - 1) // block_size * block_size)
        for length in range(first, len(text) + 1, block_size):
            prompt = text[:length]
            law = processed_law(logits_SV[length - 1], params, prompt, ())
            pairs = set(pairwise(prompt))
            repeated = sum(float(law[token]) for token in np.flatnonzero(law) if (prompt[-1], int(token)) in pairs)
            scored.append((repeated * (1.0 - float((law**2).sum())), prompt))
    scored.sort(key=lambda item: -item[0])
    return [prompt for _, prompt in scored]


def _continued(target: LoadedModel, starts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What the target writes by itself after ``starts``: models left alone repeat themselves."""
    room = target.decoder.config.max_context - OWN_START - 1
    params = SamplingParams(max_tokens=min(WINDOW - OWN_START, room), ignore_eos=True)
    requests = [Request(f"own-{i}", start, params) for i, start in enumerate(starts)]
    settings = EngineConfig(
        dtype=str(target.decoder.dtype).removeprefix("torch."),
        device=str(target.device),
        kv_tokens=len(starts) * (WINDOW + 32),
    )
    run = run_requests(build_engine(target, settings), requests)
    return [[*start, *output] for start, output in zip(starts, run.outputs, strict=True)]
