"""OpenVINO GenAI's continuous batching: plain, with a draft model and with prompt lookup; bfloat16 or u8 keys."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import Load, Timeline, kv_bytes_per_token, serve

GIB = 1 << 30
BLOCK = 64  # no fewer positions than a block of OpenVINO's cache has


def converted(model: str, out: Path) -> Path:
    """The checkpoint as OpenVINO reads it, in float32, which holds bfloat16 weights as they are; made once."""
    if not (out / "openvino_model.bin").exists():
        tool = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "-m", model]
        options = ["--task", "text-generation-with-past", "--weight-format", "fp32", str(out)]
        subprocess.run([*tool, *options], check=True, stdout=sys.stderr)
    return out


class OpenVINO:
    """Methods: bf16 and u8 (of keys; OpenVINO's default is u8), alone or with ``-draft`` or ``-lookup`` after it."""

    max_batch = 0

    def __init__(self, load: Load) -> None:
        self._load = load
        keys, _, self._drafter = load.method.partition("-")
        precision = {"bfloat16": "bf16", "float32": "f32"}[load.dtype]
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": "u8" if keys == "u8" else precision,
            "INFERENCE_NUM_THREADS": load.threads,
        }
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = load.step_tokens
        scheduler.max_num_seqs = load.batch
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = self._cache_gib(load)
        model = converted(load.model, Path(load.folder) / "openvino" / "target")
        if self._drafter == "draft":
            small = converted(load.draft, Path(load.folder) / "openvino" / "draft")
            draft = genai.draft_model(str(small), "CPU", scheduler_config=scheduler, **properties)
            properties["draft_model"] = draft
        elif self._drafter == "lookup":
            properties["prompt_lookup"] = True
        self._pipe = genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)

    @staticmethod
    def _cache_gib(load: Load) -> int:
        width = 2 if load.dtype == "float32" else 1
        return math.ceil(1.1 * width * kv_bytes_per_token(load.model) * (load.kv_tokens + BLOCK * load.batch) / GIB)

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Complete all prompts."""
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = max_tokens, True, False
        if self._drafter:
            config.num_assistant_tokens = self._load.k
        if self._drafter == "lookup":
            config.max_ngram_size = 3
        timeline = Timeline(len(prompts))
        outputs: list[list[int]] = [[] for _ in prompts]
        tensors = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        handles = [self._pipe.add_request(number, tensor, config) for number, tensor in enumerate(tensors)]
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
            for request, handle in enumerate(handles):
                while handle.can_read():
                    for part in handle.read().values():
                        outputs[request].extend(part.generated_ids)
                        timeline.add(request, len(part.generated_ids))
        return timeline.answer(outputs)


if __name__ == "__main__":
    serve(OpenVINO, "openvino-genai", "openvino", "optimum-intel")
