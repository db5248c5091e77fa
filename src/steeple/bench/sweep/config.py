"""Settings of a sweep. Light: importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from steeple.bench.config import BENCH_DTYPES, PLAIN, settle_lists
from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean

BATCHES, MIXED_BATCHES = (1, 8, 32, 64), (8, 32, 64)
LEAST_TOKENS = 24  # of a request in a run, however long that takes
TRACE_NAMES = ("code", "conversation")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What is compared: every drafter at every k in every cell (batch x context x temperature), and plain decoding.

    With ``mixed`` a cell is a batch whose prompts are as different in length as those of a published trace.
    """

    model: str = field(default="demo", metadata={"help": "target: folder, hub name or demo"})
    drafters: tuple[str, ...] = field(
        default=("none", "small_lm", "sparse_self", "spire"), metadata={"help": "drafters, comma-separated"}
    )
    ks: tuple[int, ...] = field(
        default=(1, 2, 4, 6), metadata={"help": "draft nodes per round; an adaptive drafter chooses its own"}
    )
    batch: tuple[int, ...] = field(
        default=(), metadata={"help": "requests decoded together; with --mixed 8,32,64, else 1,8,32,64"}
    )
    context: tuple[int, ...] = field(
        default=(256, 512, 1024, 2048, 3968), metadata={"help": "prompt lengths in tokens; not with --mixed"}
    )
    temperature: tuple[float, ...] = field(default=(0.0, 1.0), metadata={"help": "sampling temperatures, 0 = greedy"})
    max_tokens: int = field(default=48, metadata={"help": "tokens that the requests of a run write, on average"})
    seconds_per_run: float = field(
        default=2.0, metadata={"help": "time for plain decoding in a cell: decides tokens and repeats"}
    )
    repeat: int = field(default=1, metadata={"help": "least runs of each drafter and k per cell"})
    mixed: bool = field(default=False, metadata={"help": "context lengths that vary as in a trace of requests"})
    trace: str = field(default="code", metadata={"help": "whose lengths --mixed takes: code or conversation"})
    prompts: str = field(
        default="", metadata={"help": ".jsonl or .txt file to cut prompts from; empty: held-out standard library"}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "float32, bfloat16 or float16 (GPU)"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto"})
    threads: int = field(default=0, metadata={"help": "torch threads, 0 = leave as they are"})
    native: bool = field(default=True, metadata={"help": "use the native kernels where they build"})
    seed: int = field(default=0, metadata={"help": "decides prompts, lengths and draws"})
    plots: str = field(default="", metadata={"help": "folder to draw heatmaps into; empty: none"})
    identity_requests: int = field(
        default=4, metadata={"help": "requests whose tokens every drafter writes once in float32, to be compared"}
    )
    resume: bool = field(
        default=False, metadata={"help": "keep the cells that a killed sweep with these settings left beside --json"}
    )

    def __post_init__(self) -> None:
        if not self.batch:
            object.__setattr__(self, "batch", MIXED_BATCHES if self.mixed else BATCHES)
        settle_lists(self, ("drafters", "ks", "batch", "context", "temperature"))
        for k in self.ks:
            check_range("SweepConfig", "ks", k, 1, 63)
        for batch in self.batch:
            check_range("SweepConfig", "batch", batch, 1, 65536)
        for context in self.context:
            check_range("SweepConfig", "context", context, 1, 1 << 24)
        for temperature in self.temperature:
            check_range("SweepConfig", "temperature", temperature, 0.0, 100.0)
        for name, value, known in (("dtype", self.dtype, BENCH_DTYPES), ("trace", self.trace, TRACE_NAMES)):
            if value not in known:
                raise ConfigError(f"SweepConfig.{name} = {value!r}. {did_you_mean(value, known)}")
        # The prompt's step gives a token, the first round does not count, and another must follow.
        check_range("SweepConfig", "max_tokens", self.max_tokens, 2 * max(self.ks) + 4, 1 << 20)
        check_range("SweepConfig", "seconds_per_run", self.seconds_per_run, 0.0, 3600.0)
        check_range("SweepConfig", "repeat", self.repeat, 1, 1000)
        check_range("SweepConfig", "threads", self.threads, 0, 4096)
        check_range("SweepConfig", "seed", self.seed, 0, 2**63 - 1)
        check_range("SweepConfig", "identity_requests", self.identity_requests, 1, 4096)

    @property
    def speculative(self) -> tuple[str, ...]:
        """The drafters without plain decoding, which is always measured."""
        return tuple(d for d in self.drafters if d != PLAIN)

    @property
    def least_tokens(self) -> int:
        """Tokens that the requests of a run write at least, however slow the cell is."""
        return min(self.max_tokens, max(LEAST_TOKENS, 2 * max(self.ks) + 4))
