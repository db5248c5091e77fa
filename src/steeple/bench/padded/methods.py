"""What a padded bench compares: transformers' own ways, plain decoding with and without refill, and the schedules."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from steeple.bench.padded.config import PaddedBenchConfig
from steeple.bench.padded.pairs import Pair
from steeple.padded import generate


@dataclass(frozen=True, slots=True)
class Run:
    """One run over all prompts: seconds, what was written, and the statistics of ours (None for transformers' own)."""

    seconds: float
    tokens: list[list[int]]
    stats: dict[str, Any] | None

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


@dataclass(frozen=True, slots=True)
class Method:
    """One way to serve the prompts. ``settings`` of ours; None: one of transformers' own ways. ``drafts``: with the
    assistant. ``one_row``: it exists for batch 1 only. ``holes``: it needs a model that bears holes."""

    drafts: bool
    settings: Mapping[str, Any] | None = None
    one_row: bool = False
    holes: bool = False


METHODS: Mapping[str, Method] = {
    "transformers": Method(drafts=False),
    "transformers assisted": Method(drafts=True, one_row=True),
    "plain, no refill": Method(drafts=False, settings={"schedule": "align", "refill": False}),
    "plain": Method(drafts=False, settings={"schedule": "align"}),
    "align, no refill": Method(drafts=True, settings={"schedule": "align", "refill": False}),
    "align": Method(drafts=True, settings={"schedule": "align"}),
    "pool": Method(drafts=True, settings={"schedule": "pool"}),
    "holes": Method(drafts=True, settings={"schedule": "holes"}, holes=True),
}


def run_method(method: Method, pair: Pair, batch: int, config: PaddedBenchConfig) -> Run:
    """Serve all prompts once. Prompts are read within the time, models are not loaded in it."""
    serve: Callable[[Method, Pair, int, PaddedBenchConfig], tuple[list[list[int]], dict[str, Any] | None]]
    serve = _theirs if method.settings is None else _ours
    start = time.perf_counter()
    tokens, stats = serve(method, pair, batch, config)
    return Run(time.perf_counter() - start, tokens, stats)


def _ours(
    method: Method, pair: Pair, batch: int, config: PaddedBenchConfig
) -> tuple[list[list[int]], dict[str, Any] | None]:
    out = generate(
        pair.target,
        pair.assistant if method.drafts else None,
        pair.prompts,
        batch_size=batch,
        max_tokens=pair.counts,
        k=config.k,
        window=config.window,
        waste=config.waste,
        temperature=config.temperature,
        seed=config.seed,
        ignore_eos=True,
        probe=False,  # models are probed once, before anything is measured
        **(method.settings or {}),
    )
    stats = out.stats
    derived = {name: getattr(stats, name) for name in ("mean_rows", "grouping_rate", "waste")}
    return [result.token_ids for result in out], {**asdict(stats), **derived, "tau": stats.speculation.tau}


def _theirs(
    method: Method, pair: Pair, batch: int, config: PaddedBenchConfig
) -> tuple[list[list[int]], dict[str, Any] | None]:
    """Batches in order, each until its longest output is written. Only the tokens that were asked for count."""
    device, written = pair.target.device, []
    extra = {"assistant_model": pair.assistant} if method.drafts else {}
    for first in range(0, len(pair.prompts), batch):
        prompts, counts = pair.prompts[first : first + batch], pair.counts[first : first + batch]
        width = max(map(len, prompts))
        table = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        settings = GenerationConfig(
            max_new_tokens=max(counts),
            do_sample=config.temperature > 0,
            temperature=config.temperature or 1.0,
            top_k=0 if config.temperature else 50,
            num_assistant_tokens=config.k,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
            pad_token_id=0,
            eos_token_id=None,
        )
        whole = pair.target.generate(table, attention_mask=mask, generation_config=settings, **extra)
        written += [own[width : width + count].tolist() for own, count in zip(whole, counts, strict=True)]
    return written, None
