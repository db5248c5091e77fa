"""Settings of a bench of padded generation. Light: importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from steeple.bench.config import BENCH_DTYPES, settle_lists
from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean

ARCHITECTURES = ("gpt2", "gpt_neox", "opt", "bloom", "phi")


@dataclass(frozen=True, kw_only=True)
class PaddedBenchConfig:
    """Which pairs are measured, at which batch sizes, and on what work: prompts and outputs of many lengths."""

    model: str = field(default="demo", metadata={"help": "target: folder, hub name or demo"})
    assistant: str = field(default="demo/small", metadata={"help": "assistant: folder, hub name or demo/small"})
    random: bool = field(default=False, metadata={"help": "random pairs of five architectures as well"})
    batch: tuple[int, ...] = field(default=(1, 2, 4, 8, 16, 32), metadata={"help": "most rows of a call"})
    requests: int = field(default=64, metadata={"help": "prompts of every run"})
    shortest: int = field(default=16, metadata={"help": "tokens of the shortest prompt"})
    longest: int = field(default=256, metadata={"help": "tokens of the longest prompt"})
    least_tokens: int = field(default=16, metadata={"help": "tokens of the shortest output"})
    max_tokens: int = field(default=96, metadata={"help": "tokens of the longest output"})
    k: int = field(default=4, metadata={"help": "tokens drafted per round"})
    window: int = field(default=32, metadata={"help": "requests that the pool holds"})
    waste: float = field(default=0.5, metadata={"help": "share of slots that holes may take before compaction"})
    temperature: float = field(default=0.0, metadata={"help": "sampling temperature, 0 = greedy"})
    repeat: int = field(default=3, metadata={"help": "runs of each method; medians are reported"})
    prompts: str = field(
        default="", metadata={"help": ".jsonl or .txt file to cut prompts from; empty: held-out standard library"}
    )
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16 (GPU)"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto"})
    threads: int = field(default=0, metadata={"help": "torch threads, 0 = leave as they are"})
    seed: int = field(default=0, metadata={"help": "decides prompts, lengths, draws and random weights"})
    plots: str = field(default="", metadata={"help": "folder to draw charts into; empty: none"})

    def __post_init__(self) -> None:
        settle_lists(self, ("batch",))
        for batch in self.batch:
            check_range("PaddedBenchConfig", "batch", batch, 1, 4096)
        check_range("PaddedBenchConfig", "requests", self.requests, 1, 1 << 16)
        check_range("PaddedBenchConfig", "shortest", self.shortest, 1, 1 << 20)
        check_range("PaddedBenchConfig", "longest", self.longest, self.shortest, 1 << 20)
        check_range("PaddedBenchConfig", "least_tokens", self.least_tokens, 2, 1 << 20)
        check_range("PaddedBenchConfig", "max_tokens", self.max_tokens, self.least_tokens, 1 << 20)
        check_range("PaddedBenchConfig", "k", self.k, 1, 63)
        check_range("PaddedBenchConfig", "window", self.window, 1, 1 << 20)
        check_range("PaddedBenchConfig", "waste", self.waste, 0.0, 0.99)
        check_range("PaddedBenchConfig", "temperature", self.temperature, 0.0, 100.0)
        check_range("PaddedBenchConfig", "repeat", self.repeat, 1, 1000)
        check_range("PaddedBenchConfig", "threads", self.threads, 0, 4096)
        check_range("PaddedBenchConfig", "seed", self.seed, 0, 2**63 - 1)
        if self.dtype not in BENCH_DTYPES:
            raise ConfigError(f"PaddedBenchConfig.dtype = {self.dtype!r}. {did_you_mean(self.dtype, BENCH_DTYPES)}")
