"""Settings of a step bench. Light: importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from steeple.bench.config import BENCH_DTYPES, settle_lists
from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean

MOST_ROWS = 64  # the newest token and as many nodes as a draft can have


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Which steps are timed: every combination of model, batch, context and rows."""

    model: tuple[str, ...] = field(
        default=("demo", "random-100m"), metadata={"help": "folders, hub names, demo, random-100m"}
    )
    batch: tuple[int, ...] = field(default=(1, 8, 32, 64), metadata={"help": "requests in a step"})
    context: tuple[int, ...] = field(default=(256, 1024, 4096), metadata={"help": "tokens of each request's text"})
    rows: tuple[int, ...] = field(
        default=(1, 2, 5, 9), metadata={"help": "rows of each request: 1 = plain step, r = verify r - 1 nodes"}
    )
    temperature: float = field(default=0.0, metadata={"help": "sampling temperature, 0 = greedy"})
    seconds: float = field(default=1.0, metadata={"help": "time spent on each row of the result"})
    dtype: str = field(default="bfloat16", metadata={"help": "float32, bfloat16 or float16 (GPU)"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto"})
    threads: int = field(default=0, metadata={"help": "torch threads, 0 = leave as they are"})
    native: bool = field(default=True, metadata={"help": "use the native kernels where they build"})
    seed: int = field(default=0, metadata={"help": "decides texts, keys, values and random weights"})
    plots: str = field(default="", metadata={"help": "folder to draw charts into; empty: none"})

    def __post_init__(self) -> None:
        settle_lists(self, ("model", "batch", "context", "rows"))
        for batch in self.batch:
            check_range("StepConfig", "batch", batch, 1, 65536)
        for context in self.context:
            check_range("StepConfig", "context", context, 1, 1 << 24)
        for rows in self.rows:
            check_range("StepConfig", "rows", rows, 1, MOST_ROWS)
        check_range("StepConfig", "temperature", self.temperature, 0.0, 100.0)
        check_range("StepConfig", "seconds", self.seconds, 0.0, 3600.0)
        if self.dtype not in BENCH_DTYPES:
            raise ConfigError(f"StepConfig.dtype = {self.dtype!r}. {did_you_mean(self.dtype, BENCH_DTYPES)}")
        check_range("StepConfig", "threads", self.threads, 0, 4096)
        check_range("StepConfig", "seed", self.seed, 0, 2**63 - 1)
