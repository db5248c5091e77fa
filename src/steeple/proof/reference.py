"""What greedy decoding must give: plain decoding of each request alone in a fresh engine, and ``transformers``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from steeple.engine import EngineConfig, LoadedModel, build_engine
from steeple.evidence.measure import run_requests
from steeple.request import Request
from steeple.types import SamplingParams

Told = Callable[[int], None]
Texts = Sequence[Sequence[int]]


def plain_alone(target: LoadedModel, settings: EngineConfig, prompts: Texts, max_tokens: int, told: Told) -> Texts:
    """Greedy outputs without drafter, batch or neighbours: an engine per request. ``told(n)`` after the n-th."""
    outputs = []
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts, 1):
        engine = build_engine(target, settings)
        outputs.extend(run_requests(engine, [Request("alone", prompt, params)]).outputs)
        told(number)
    return outputs


def transformers_greedy(target: LoadedModel, prompts: Texts, max_tokens: int, told: Told) -> Texts:
    """Greedy outputs of ``transformers``' own model and ``generate``, in the target's dtype, a prompt at a time."""
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(target.folder, dtype=target.decoder.dtype, local_files_only=True)
    model = model.to(target.device).eval()
    # The model's own generation settings may hold penalties or an end-of-text token; here nothing but argmax counts.
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
    outputs = []
    for number, prompt in enumerate(prompts, 1):
        ids = torch.tensor([list(prompt)], device=target.device)
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        outputs.append(written[0, len(prompt) :].tolist())
        told(number)
    return outputs


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of ``transformers`` in the middle of ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
