"""Settings of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean
from steeple.plan.memory_units import parse_bytes

DTYPES = ("float32", "bfloat16", "float16")

WEIGHTS = ("stored", "int8")
MOST_MICRO_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine runs; what it runs is given beside it.

    ``kv_tokens`` is the number of positions the paged cache holds; 0 asks the memory planner. ``threads`` sets
    torch's thread count for the whole process (torch has no other); 0 leaves it alone. ``memory_budget`` bounds all
    that the engine allocates: weights, caches, and what a step takes; see ``docs/memory.md``.
    """

    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16 (GPU)"})
    weights: str = field(
        default="stored", metadata={"help": "stored, or int8: quantise the target's linear layers (another target)"}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto"})
    batch_size: int = field(default=0, metadata={"help": "most requests at once, 0 = what memory allows"})
    step_tokens: int = field(default=2048, metadata={"help": "most rows of one forward; long prompts go in chunks"})
    max_context: int = field(default=0, metadata={"help": "most tokens of one request, 0 = the model's own"})
    kv_tokens: int = field(default=0, metadata={"help": "positions the cache holds, 0 = planned"})
    block_size: int = field(default=16, metadata={"help": "positions per cache block"})
    share_prefixes: bool = field(default=True, metadata={"help": "share full blocks of equal prefixes"})
    native: bool = field(default=True, metadata={"help": "use the native kernels where they build"})
    graphs: bool = field(default=True, metadata={"help": "CUDA graphs for steps of up to 512 rows; no use on a CPU"})
    micro_batches: int = field(
        default=1,
        metadata={"help": "draft one micro-batch while another is verified: how many, 0 = as many as pay, 1 = none"},
    )
    deterministic: bool = field(
        default=False, metadata={"help": "refuse to run where a row's rounding depends on batch or k"}
    )
    threads: int = field(default=0, metadata={"help": "torch threads, 0 = leave as they are"})
    memory_budget: str = field(
        default="",
        metadata={"help": "most memory, like 512MiB or 4GiB; drafting gives way to the batch. Empty = no limit"},
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"EngineConfig.dtype = {self.dtype!r}. {did_you_mean(self.dtype, DTYPES)}")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"EngineConfig.weights = {self.weights!r}. {did_you_mean(self.weights, WEIGHTS)}")
        if self.device != "auto" and self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ConfigError(f"EngineConfig.device = {self.device!r} is unknown; give cpu, cuda, cuda:N or auto.")
        if self.dtype == "float16" and self.device == "cpu":
            raise ConfigError("EngineConfig.dtype = 'float16' needs a GPU; on a CPU give float32 or bfloat16.")
        check_range("EngineConfig", "batch_size", self.batch_size, 0, 65536)
        check_range("EngineConfig", "step_tokens", self.step_tokens, 1, 1 << 20)
        check_range("EngineConfig", "max_context", self.max_context, 0, 1 << 24)
        check_range("EngineConfig", "kv_tokens", self.kv_tokens, 0, 1 << 40)
        check_range("EngineConfig", "block_size", self.block_size, 1, 1024)
        check_range("EngineConfig", "micro_batches", self.micro_batches, 0, MOST_MICRO_BATCHES)
        check_range("EngineConfig", "threads", self.threads, 0, 4096)
        if not isinstance(self.memory_budget, str):
            raise ConfigError(
                f"EngineConfig.memory_budget = {self.memory_budget!r} is no text; write it like '512MiB' or '1000000'."
            )
        _ = self.budget  # said now rather than when memory is planned

    @property
    def budget(self) -> int:
        """``memory_budget`` in bytes; 0 = none."""
        return parse_bytes(self.memory_budget, "EngineConfig.memory_budget") if self.memory_budget else 0
