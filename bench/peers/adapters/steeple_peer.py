"""Steeple itself: plain, with n-grams and with the small model."""

from __future__ import annotations

from typing import Any

from protocol import Load, Timeline, serve

from steeple.draft import drafter_config
from steeple.engine import EngineConfig, build_engine, load_model
from steeple.request import Request
from steeple.types import SamplingParams


class Steeple:
    """Methods: none, ngram, small_lm."""

    max_batch = 0

    def __init__(self, load: Load) -> None:
        block = EngineConfig.block_size
        config = EngineConfig(
            dtype=load.dtype,
            threads=load.threads,
            batch_size=load.batch,
            step_tokens=load.step_tokens,
            kv_tokens=load.kv_tokens + 2 * block * load.batch,
            share_prefixes=False,
        )
        method = f"small_lm:{load.draft}" if load.method == "small_lm" else load.method
        self._engine = build_engine(load_model(load.model, config), config, drafter_config(method, k=load.k))

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Complete all prompts."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        requests = [Request(str(number), prompt, params) for number, prompt in enumerate(prompts)]
        timeline = Timeline(len(prompts))
        for request in requests:
            self._engine.add(request)
        while not self._engine.idle:
            for committed in self._engine.step():
                timeline.add(int(committed.request.id), len(committed.tokens))
        failed = [request.error for request in requests if request.error]
        if failed:
            raise RuntimeError(failed[0])
        return timeline.answer([request.output.tolist() for request in requests])


if __name__ == "__main__":
    serve(Steeple, "steeple", "torch", "transformers")
