"""transformers: ``generate`` on a static batch, ``generate_batch``, and at batch 1 assisted generation."""

from __future__ import annotations

import math
from typing import Any

import torch
from protocol import Load, Timeline, serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, StoppingCriteria

PAGE = 256
MOST_ROWS = 2048  # of its mask with all keys there are; more only make its prompts slower


class _Clock(StoppingCriteria):
    """Books the tokens of every step; it never stops anything."""

    def __init__(self, timeline: Timeline, length: int, most: int) -> None:
        self._timeline, self._length, self._end = timeline, length, length + most

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        length = min(input_ids.shape[1], self._end)
        for request in range(input_ids.shape[0]):
            self._timeline.add(request, length - self._length)
        self._length = length
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Transformers:
    """Methods: generate, continuous, assisted, lookup."""

    def __init__(self, load: Load) -> None:
        torch.set_num_threads(load.threads)
        self._load = load
        self._model = self._pretrained(load.model)
        self.max_batch = 1 if load.method in ("assisted", "lookup") else 0
        self._options: dict[str, Any] = {}
        if load.method == "assisted":
            assistant = self._pretrained(load.draft)
            assistant.generation_config.num_assistant_tokens = load.k
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assistant.generation_config.assistant_confidence_threshold = 0.0
            self._options = {"assistant_model": assistant}
        elif load.method == "lookup":
            self._options = {"prompt_lookup_num_tokens": load.k}
        self.run = self._continuous if load.method == "continuous" else self._static

    def _pretrained(self, folder: str) -> Any:
        dtype = getattr(torch, self._load.dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
        model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
        return model

    @torch.inference_mode()
    def _static(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        timeline = Timeline(len(prompts))
        ids = torch.tensor(prompts)
        clock = _Clock(timeline, ids.shape[1], max_tokens)
        mask = torch.ones_like(ids)
        out = self._model.generate(
            ids, attention_mask=mask, max_new_tokens=max_tokens, stopping_criteria=[clock], **self._options
        )
        return timeline.answer(out[:, ids.shape[1] :].tolist())

    def _continuous(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        pages = math.ceil((len(prompts[0]) + max_tokens) / PAGE) + 1
        settings = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=len(prompts) * pages,
            max_batch_tokens=max(min(self._load.step_tokens, MOST_ROWS), len(prompts)),
            allow_block_sharing=False,
        )
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max_tokens)
        timeline = Timeline(len(prompts))
        results = self._model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=settings, record_timestamps=True
        )
        for request, result in enumerate(results.values()):
            for moment in result.timestamps:
                timeline.add(request, 1, moment)
        return timeline.answer([list(result.generated_tokens) for result in results.values()])


if __name__ == "__main__":
    serve(Transformers, "transformers", "torch", "accelerate")
