"""Settings of a bench of choices among drafters. Light: importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from steeple.bench.config import BENCH_DTYPES, settle_lists
from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """A stream of requests, and what drafts for it: nothing, each drafter alone, ``spin`` over all, an oracle."""

    model: str = field(default="demo", metadata={"help": "target: folder, hub name or demo"})
    stream: str = field(default="mixed_difficulty", metadata={"help": "requests: a named stream"})
    drafters: tuple[str, ...] = field(
        default=("ngram", "small_lm", "spire", "sparse_self"), metadata={"help": "specs, comma-separated"}
    )
    k: tuple[int, ...] = field(default=(2, 4, 6), metadata={"help": "depths of the drafters alone"})
    deepest: int = field(default=8, metadata={"help": "greatest depth where it is chosen while running"})
    rule: str = field(default="thompson", metadata={"help": "of spin: thompson, ucb or greedy"})
    adaptive: bool = field(default=True, metadata={"help": "measure each drafter with auto-k as well"})
    batch: int = field(default=16, metadata={"help": "requests decoded together"})
    count: int = field(default=48, metadata={"help": "requests of the stream"})
    max_tokens: int = field(default=128, metadata={"help": "tokens that every request writes"})
    longest: int = field(default=512, metadata={"help": "most tokens of a prompt"})
    temperature: float = field(default=0.0, metadata={"help": "sampling temperature, 0 = greedy"})
    repeat: int = field(default=3, metadata={"help": "measured runs of each; medians are reported"})
    data: str = field(default="", metadata={"help": "folder of the outside data, where the stream reads any"})
    dtype: str = field(default="bfloat16", metadata={"help": "float32, bfloat16 or float16 (GPU)"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto"})
    threads: int = field(default=0, metadata={"help": "torch threads, 0 = leave as they are"})
    seed: int = field(default=0, metadata={"help": "decides texts, their order, draws and trials"})
    plots: str = field(default="", metadata={"help": "folder to draw charts into; empty: none"})

    def __post_init__(self) -> None:
        settle_lists(self, ("drafters", "k"))
        owner = type(self).__name__
        for k in (*self.k, self.deepest):
            check_range(owner, "k", k, 1, 63)
        check_range(owner, "batch", self.batch, 1, 65536)
        check_range(owner, "count", self.count, 1, 1 << 20)
        check_range(owner, "max_tokens", self.max_tokens, 2, 1 << 20)
        check_range(owner, "longest", self.longest, 16, 1 << 24)
        check_range(owner, "temperature", self.temperature, 0.0, 100.0)
        check_range(owner, "repeat", self.repeat, 1, 1000)
        check_range(owner, "threads", self.threads, 0, 4096)
        check_range(owner, "seed", self.seed, 0, 2**63 - 1)
        if self.dtype not in BENCH_DTYPES:
            raise ConfigError(f"{owner}.dtype = {self.dtype!r}. {did_you_mean(self.dtype, BENCH_DTYPES)}")
