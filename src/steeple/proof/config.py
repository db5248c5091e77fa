"""Settings of the proof. Light: importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean

PROOF_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ProofConfig:
    """What is proven: that each drafter leaves the target's output as it is.

    ``alpha`` is the probability that the sampling test of a drafter that *is* exact fails nonetheless. ``tie_gap`` is
    in units of the logits: where the target's two best logits are closer than that, a greedy difference is rounding.
    """

    model: str = field(default="demo", metadata={"help": "target: folder, hub name or demo"})
    drafter: tuple[str, ...] = field(
        default=("ngram", "small_lm"),
        metadata={"help": "ngram, small_lm[:DIR], sparse_self, spire[:DIR], comma-separated"},
    )
    k: int = field(default=4, metadata={"help": "draft nodes per round"})
    requests: int = field(default=16, metadata={"help": "requests of the greedy proof"})
    max_tokens: int = field(default=32, metadata={"help": "tokens per request of the greedy proof"})
    context: int = field(default=192, metadata={"help": "longest prompt of the greedy proof in tokens"})
    samples: int = field(default=4000, metadata={"help": "sampled requests per drafter, shared by the sampling cases"})
    alpha: float = field(default=1e-5, metadata={"help": "false-alarm probability of the sampling test"})
    tie_gap: float = field(default=1e-4, metadata={"help": "top-2 gap below which a greedy difference is rounding"})
    prompts: str = field(
        default="", metadata={"help": ".jsonl or .txt file to cut prompts from; empty: held-out standard library"}
    )
    oracle: bool = field(default=True, metadata={"help": "compare with transformers' generate as well"})
    padded: str = field(
        default="", metadata={"help": "also prove padded batches of transformers, with this assistant: demo/small"}
    )
    micro_batches: int = field(default=1, metadata={"help": "of the engine: drafting beside verifying, 1 = off"})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16 (GPU)"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto"})
    threads: int = field(default=0, metadata={"help": "torch threads, 0 = leave as they are"})
    native: bool = field(default=True, metadata={"help": "use the native attention kernel where it builds"})
    seed: int = field(default=0, metadata={"help": "decides prompts and draws"})

    def __post_init__(self) -> None:
        drafters = (self.drafter,) if isinstance(self.drafter, str) else tuple(self.drafter)
        object.__setattr__(self, "drafter", drafters)
        if not drafters or len(set(drafters)) != len(drafters):
            raise ConfigError(f"ProofConfig.drafter = {drafters!r}; name each drafter once, and at least one.")
        if "none" in drafters:
            raise ConfigError("ProofConfig.drafter = 'none' is what the others are compared with; name a drafter.")
        if self.dtype not in PROOF_DTYPES:
            raise ConfigError(f"ProofConfig.dtype = {self.dtype!r}. {did_you_mean(self.dtype, PROOF_DTYPES)}")
        check_range("ProofConfig", "k", self.k, 1, 63)
        check_range("ProofConfig", "requests", self.requests, 4, 4096)
        check_range("ProofConfig", "max_tokens", self.max_tokens, 8, 4096)
        check_range("ProofConfig", "context", self.context, 32, 1 << 20)
        check_range("ProofConfig", "samples", self.samples, 200, 10_000_000)
        check_range("ProofConfig", "alpha", self.alpha, 1e-12, 0.1)
        check_range("ProofConfig", "tie_gap", self.tie_gap, 0.0, 10.0)
        check_range("ProofConfig", "micro_batches", self.micro_batches, 0, 8)
        check_range("ProofConfig", "threads", self.threads, 0, 4096)
        check_range("ProofConfig", "seed", self.seed, 0, 2**63 - 1)
