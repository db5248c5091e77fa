"""llama.cpp through llama-cpp-python: its batch interface, and at batch 1 its prompt lookup."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
from protocol import Load, Timeline, serve

PAD = 256  # llama.cpp rounds the room of a sequence up to this

# The converter refuses tokenizers that it does not know. Only token ids go in and out here, so any name will do.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.path.insert(1, sys.argv[1] + "/gguf-py")
from conversion.base import TextModel
known = TextModel.get_vocab_base_pre
def name(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"
TextModel.get_vocab_base_pre = name
sys.argv = ["convert", *sys.argv[2:]]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def converted(load: Load) -> str:
    """The checkpoint as a GGUF file in the run's dtype; made once."""
    kind = {"bfloat16": "bf16", "float32": "f32"}[load.dtype]
    out = Path(load.folder) / "llama_cpp" / f"target-{kind}.gguf"
    if not out.exists():
        (vendor,) = Path(sys.prefix).glob("sources/*/vendor/llama.cpp")
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(".part")
        command = [sys.executable, "-c", CONVERT, str(vendor), load.model, "--outtype", kind, "--outfile", str(part)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        part.rename(out)
    return str(out)


class LlamaCpp:
    """Methods: plain, lookup."""

    def __init__(self, load: Load) -> None:
        self._load = load
        path = converted(load)
        self.max_batch = 1 if load.method == "lookup" else 0
        if load.method == "lookup":
            from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

            draft = LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=load.k)
            threads = {"n_threads": load.threads, "n_threads_batch": load.threads}
            # logits_all: without it there is room for the logits of one batch only, and longer prompts fail.
            self._llama = api.Llama(
                path, n_ctx=load.length, draft_model=draft, logits_all=True, verbose=False, **threads
            )
            self._evaluate, self._rounds = self._llama.eval, 0
            self._llama.eval = self._counted
            self.run = self._lookup
            return
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._shape, self._context = (0, 0), None
        self.run = self._plain

    def _fresh(self, requests: int, length: int) -> Any:
        """A context with just the room that this run needs, since every position of it costs attention."""
        if (requests, length) != self._shape:
            if self._context is not None:
                api.llama_free(self._context)
            params = api.llama_context_default_params()
            params.n_ctx = requests * (-(-length // PAD) * PAD)
            params.n_batch = self._load.step_tokens
            params.n_seq_max = requests
            params.n_threads = params.n_threads_batch = self._load.threads
            self._context = api.llama_init_from_model(self._model, params)
            if self._context is None:
                raise MemoryError(f"llama.cpp made no context for {requests} requests of {length} tokens")
            self._shape = (requests, length)
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        return self._context

    def _plain(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        context = self._fresh(len(prompts), len(prompts[0]) + max_tokens)
        batch = api.llama_batch_init(self._load.step_tokens, 0, 1)
        outputs: list[list[int]] = [[] for _ in prompts]
        timeline = Timeline(len(prompts))
        rows = [(request, place) for request, prompt in enumerate(prompts) for place in range(len(prompt))]
        last = len(prompts[0]) - 1
        for start in range(0, len(rows), self._load.step_tokens):
            part = rows[start : start + self._load.step_tokens]
            entries = [(prompts[request][place], place, request, place == last) for request, place in part]
            self._step(context, batch, entries, outputs, timeline)
        for step in range(1, max_tokens):
            entries = [(output[-1], last + step, request, True) for request, output in enumerate(outputs)]
            self._step(context, batch, entries, outputs, timeline)
        api.llama_batch_free(batch)
        return timeline.answer(outputs)

    def _step(self, context: Any, batch: Any, entries: list[Any], outputs: list[list[int]], timeline: Timeline) -> None:
        """Decode ``entries`` (token, position, request, wanted) and take the best token of every wanted one."""
        batch.n_tokens = len(entries)
        for row, (token, position, request, wanted) in enumerate(entries):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, request
        code = api.llama_decode(context, batch)
        if code:
            raise RuntimeError(f"llama_decode answered {code}")
        wanted = [request for _, _, request, asked in entries if asked]
        if wanted:
            logits = np.ctypeslib.as_array(api.llama_get_logits(context), (len(wanted), self._vocab))
            for request, token in zip(wanted, logits.argmax(1).tolist(), strict=True):
                outputs[request].append(token)
                timeline.add(request, 1)

    def _counted(self, tokens: Any) -> None:
        self._rounds += 1
        self._evaluate(tokens)

    def _lookup(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        self._llama.reset()
        output: list[int] = []
        timeline = Timeline(1)
        rounds, moment = self._rounds, 0.0
        for token in self._llama.generate(prompts[0], temp=0.0, top_k=1):
            if self._rounds != rounds:  # else this token came out of the same round as the one before
                rounds, moment = self._rounds, time.perf_counter()
            output.append(int(token))
            timeline.add(0, 1, moment)
            if len(output) == max_tokens:
                return timeline.answer([output])
        raise RuntimeError("llama.cpp stopped by itself")


if __name__ == "__main__":
    serve(LlamaCpp, "llama-cpp-python", "numpy")
