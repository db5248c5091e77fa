"""Settings of a bench. Light: importing this loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean

BENCH_DTYPES = ("float32", "bfloat16", "float16")
PLAIN = "none"


def settle_lists(config: object, names: Sequence[str]) -> None:
    """Make the fields ``names`` of a frozen dataclass tuples; ``ConfigError`` if one is empty or repeats a value."""
    owner = type(config).__name__
    for name in names:
        values = getattr(config, name)
        values = (values,) if isinstance(values, (str, int, float)) else tuple(values)
        if not values:
            raise ConfigError(f"{owner}.{name} is empty; give at least one value.")
        if len(set(values)) != len(values):
            raise ConfigError(f"{owner}.{name} = {values!r} names a value twice; remove one.")
        object.__setattr__(config, name, values)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is compared: every drafter in every cell (batch x context x temperature), against plain decoding.

    Plain decoding (``none``) is always measured, first in the list of rows, whether it is named or not.
    """

    model: str = field(default="demo", metadata={"help": "target: folder, hub name or demo"})
    drafters: tuple[str, ...] = field(
        default=("none", "ngram", "small_lm"), metadata={"help": "none, ngram, small_lm[:DIR], comma-separated"}
    )
    batch: tuple[int, ...] = field(default=(1, 8, 32), metadata={"help": "requests decoded together"})
    context: tuple[int, ...] = field(default=(128, 1024), metadata={"help": "prompt lengths in tokens"})
    temperature: tuple[float, ...] = field(default=(0.0,), metadata={"help": "sampling temperatures, 0 = greedy"})
    k: int = field(default=4, metadata={"help": "draft nodes per round"})
    max_tokens: int = field(default=64, metadata={"help": "tokens that every request writes"})
    repeat: int = field(default=3, metadata={"help": "runs of each drafter per cell; medians are reported"})
    prompts: str = field(
        default="", metadata={"help": ".jsonl or .txt file to cut prompts from; empty: held-out standard library"}
    )
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16 (GPU)"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto"})
    threads: int = field(default=0, metadata={"help": "torch threads, 0 = leave as they are"})
    native: bool = field(default=True, metadata={"help": "use the native attention kernel where it builds"})
    seed: int = field(default=0, metadata={"help": "decides prompts and draws"})
    step_tokens: int = field(
        default=0, metadata={"help": "most rows of one forward, 0 = all prompts of a cell, so that all decode together"}
    )
    plots: str = field(default="", metadata={"help": "folder to draw charts into; empty: none"})
    identity_requests: int = field(
        default=8, metadata={"help": "requests per cell checked in float32 where the bench runs in another dtype"}
    )

    def __post_init__(self) -> None:
        settle_lists(self, ("drafters", "batch", "context", "temperature"))
        for batch in self.batch:
            check_range("BenchConfig", "batch", batch, 1, 65536)
        for context in self.context:
            check_range("BenchConfig", "context", context, 1, 1 << 24)
        for temperature in self.temperature:
            check_range("BenchConfig", "temperature", temperature, 0.0, 100.0)
        if self.dtype not in BENCH_DTYPES:
            raise ConfigError(f"BenchConfig.dtype = {self.dtype!r}. {did_you_mean(self.dtype, BENCH_DTYPES)}")
        check_range("BenchConfig", "k", self.k, 1, 63)
        # A counted round needs a token from the prompt's step, a first round, and room for one more.
        check_range("BenchConfig", "max_tokens", self.max_tokens, 2 * self.k + 4, 1 << 20)
        check_range("BenchConfig", "repeat", self.repeat, 1, 1000)
        check_range("BenchConfig", "threads", self.threads, 0, 4096)
        check_range("BenchConfig", "seed", self.seed, 0, 2**63 - 1)
        check_range("BenchConfig", "step_tokens", self.step_tokens, 0, 1 << 20)
        check_range("BenchConfig", "identity_requests", self.identity_requests, 1, 4096)

    @property
    def methods(self) -> tuple[str, ...]:
        """The drafters with plain decoding in front."""
        return (PLAIN, *(d for d in self.drafters if d != PLAIN))
