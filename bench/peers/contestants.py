"""Who takes part: every peer with every method it has, and the numbers that are derived from when its tokens came."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTERS = Path(__file__).resolve().parent / "adapters"


@dataclass(frozen=True, slots=True)
class Contestant:
    """A peer with one of its methods.

    Attributes:
        plain: the method of the same peer without speculation; its own if it is that.
        draft: whether it needs a draft model. adapter: the script of its worker.
    """

    peer: str
    method: str
    plain: str
    draft: bool = False
    adapter: Path = ADAPTERS

    @property
    def name(self) -> str:
        return f"{self.peer}/{self.method}"

    @property
    def speculative(self) -> bool:
        return self.method != self.plain

    @property
    def script(self) -> Path:
        """The worker's program."""
        return self.adapter / f"{self.peer}_peer.py" if self.adapter.is_dir() else self.adapter


CATALOG = (
    Contestant("transformers", "generate", "generate"),
    Contestant("transformers", "continuous", "continuous"),
    Contestant("transformers", "assisted", "generate", draft=True),
    Contestant("transformers", "lookup", "generate"),
    Contestant("vllm", "plain", "plain"),
    Contestant("vllm", "draft", "plain", draft=True),
    Contestant("vllm", "ngram", "plain"),
    Contestant("openvino", "bf16", "bf16"),
    Contestant("openvino", "bf16-draft", "bf16", draft=True),
    Contestant("openvino", "bf16-lookup", "bf16"),
    Contestant("openvino", "u8", "u8"),
    Contestant("openvino", "u8-draft", "u8", draft=True),
    Contestant("openvino", "u8-lookup", "u8"),
    Contestant("llama_cpp", "plain", "plain"),
    Contestant("llama_cpp", "lookup", "plain"),
    Contestant("steeple", "none", "none"),
    Contestant("steeple", "ngram", "none"),
    Contestant("steeple", "small_lm", "none", draft=True),
)
REFERENCE = Contestant("transformers", "generate", "generate")


@dataclass(frozen=True, slots=True)
class Figures:
    """What the times of one run say.

    The *steady* part of a run begins when every request has its first token and ends when the first request has its
    last: all requests decode, and no prompt is in the way.

    Attributes:
        prompt_seconds: until every request had its first token. steady: tokens per second of all requests in the
        steady part, None if there is no such part. per_round: tokens per request and round in it. total: tokens per
        second of the whole run, prompts included.
    """

    prompt_seconds: float
    steady: float | None
    per_round: float | None
    total: float


def figures(times: Sequence[Sequence[float]]) -> Figures:
    """From the seconds at which the tokens of every request came. Tokens of one round came at the same time."""
    begin, end = max(of[0] for of in times), min(of[-1] for of in times)
    last, tokens = max(of[-1] for of in times), sum(map(len, times))
    inside = [[moment for moment in of if begin < moment <= end] for of in times]
    count, rounds = sum(map(len, inside)), sum(len(set(of)) for of in inside)
    if not count:
        return Figures(begin, None, None, tokens / last)
    return Figures(begin, count / (end - begin), count / rounds, tokens / last)


def summary(runs: Sequence[Figures], batch: int, speculative: bool) -> dict[str, Any]:
    """Medians over the runs of one contestant in one cell; ``step_ms`` is a plain decoding step of the whole batch."""
    steady = [run.steady for run in runs if run.steady is not None]
    per_round = [run.per_round for run in runs if run.per_round is not None]
    rate = statistics.median(steady) if steady else None
    return {
        "tokens_per_second": rate,
        "tokens_per_second_range": [min(steady), max(steady)] if steady else None,
        "step_ms": None if speculative or rate is None else 1e3 * batch / rate,
        "tokens_per_round": statistics.median(per_round) if per_round else None,
        "prompt_seconds": statistics.median(run.prompt_seconds for run in runs),
        "tokens_per_second_total": statistics.median(run.total for run in runs),
        "repeats": len(runs),
    }


def agreement(outputs: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float | None:
    """The share of places with the same token, over the requests that ``reference`` has."""
    pairs = [pair for ours, theirs in zip(outputs, reference, strict=False) for pair in zip(ours, theirs, strict=False)]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None
