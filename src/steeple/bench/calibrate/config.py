"""Settings of a calibration. Light: importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from steeple.bench.config import BENCH_DTYPES, settle_lists
from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What is measured, and for how long: every combination of model, batch, context and k that is small enough."""

    seconds: float = field(
        default=60.0, metadata={"help": "time for measuring; everything is measured once, however long that takes"}
    )
    model: tuple[str, ...] = field(
        default=(), metadata={"help": "models to measure; empty: three random ones that are made for the purpose"}
    )
    batch: tuple[int, ...] = field(default=(1, 8, 32, 64), metadata={"help": "requests in a round"})
    context: tuple[int, ...] = field(default=(256, 1024, 4096), metadata={"help": "tokens of each request's text"})
    ks: tuple[int, ...] = field(default=(0, 2, 4, 8), metadata={"help": "drafted tokens that a step verifies"})
    draft_ks: tuple[int, ...] = field(default=(2, 6), metadata={"help": "tokens that the measured drafts have"})
    temperature: tuple[float, ...] = field(default=(0.0, 1.0), metadata={"help": "sampling temperatures, 0 = greedy"})
    positions: int = field(default=131072, metadata={"help": "most positions of all requests together"})
    dtype: str = field(default="bfloat16", metadata={"help": "float32, bfloat16 or float16 (GPU)"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto"})
    threads: int = field(default=0, metadata={"help": "torch threads, 0 = leave as they are"})
    native: bool = field(default=True, metadata={"help": "use the native kernels where they build"})
    seed: int = field(default=0, metadata={"help": "decides texts, keys, values, weights and the order of measuring"})

    def __post_init__(self) -> None:
        names = ["batch", "context", "ks", "draft_ks", "temperature", *(["model"] if self.model else [])]
        settle_lists(self, names)
        check_range("CalibrateConfig", "seconds", self.seconds, 0.0, 86400.0)
        for batch in self.batch:
            check_range("CalibrateConfig", "batch", batch, 1, 65536)
        for context in self.context:
            check_range("CalibrateConfig", "context", context, 32, 1 << 24)
        for k in self.ks:
            check_range("CalibrateConfig", "ks", k, 0, 63)
        for k in self.draft_ks:
            check_range("CalibrateConfig", "draft_ks", k, 1, 63)
        for temperature in self.temperature:
            check_range("CalibrateConfig", "temperature", temperature, 0.0, 100.0)
        check_range("CalibrateConfig", "positions", self.positions, min(self.batch) * min(self.context), 1 << 40)
        check_range("CalibrateConfig", "threads", self.threads, 0, 4096)
        check_range("CalibrateConfig", "seed", self.seed, 0, 2**63 - 1)
        if self.dtype not in BENCH_DTYPES:
            raise ConfigError(f"CalibrateConfig.dtype = {self.dtype!r}. {did_you_mean(self.dtype, BENCH_DTYPES)}")
