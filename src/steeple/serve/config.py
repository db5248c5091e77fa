"""Settings of the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from steeple.config import check_range
from steeple.draft import drafter_config
from steeple.engine.config import EngineConfig
from steeple.errors import ConfigError, did_you_mean
from steeple.serve.batches.config import BatchStoreConfig

LOG_FORMATS = ("text", "json")
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What to serve, where, to whom, and how much of it one client may take. Times in seconds."""

    model: str = field(default="demo", metadata={"help": "folder, hub name, or demo"})
    drafter: str = field(
        default="ngram", metadata={"help": "none, ngram, small_lm[:DIR], sparse_self, spire[:DIR] or auto-k"}
    )
    k: int | None = field(default=None, metadata={"help": "tokens drafted per round; default: the drafter's own"})
    served_name: str = field(default="", metadata={"help": "the model's name in requests; default: its own"})
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 = all"})
    port: int = field(default=8000, metadata={"help": "port to listen on, 0 = any free one"})
    keys_file: Path | None = field(
        default=None, metadata={"help": "API keys, a line each: name:sha256; STEEPLE_API_KEYS adds keys as they are"}
    )
    queue_size: int = field(default=1024, metadata={"help": "sequences that may wait; beyond it requests get 429"})
    retry_after: int = field(default=5, metadata={"help": "seconds that a refused client is told to wait"})
    max_body: int = field(default=8 * MIB, metadata={"help": "most bytes of a request's body"})
    max_sequences: int = field(default=128, metadata={"help": "most sequences of one request: prompts times n"})
    max_new_tokens: int = field(default=0, metadata={"help": "most tokens a request may ask for, 0 = the context"})
    timeout: float = field(default=600.0, metadata={"help": "seconds until a request is given up; 0 = never"})
    write_timeout: float = field(default=60.0, metadata={"help": "seconds a client may take to read a chunk"})
    drain_seconds: float = field(default=30.0, metadata={"help": "seconds that running requests get at shutdown"})
    cors_origins: tuple[str, ...] = field(default=(), metadata={"help": "origins that browsers may call from"})
    vllm_metrics: bool = field(default=False, metadata={"help": "export vLLM's metric names as well"})
    log_format: str = field(default="text", metadata={"help": "text or json"})
    report_every: float = field(default=60.0, metadata={"help": "seconds between lines about the load; 0 = none"})
    ssl_certfile: Path | None = field(default=None, metadata={"help": "certificate chain; makes it HTTPS"})
    ssl_keyfile: Path | None = field(default=None, metadata={"help": "private key of the certificate"})
    batches: BatchStoreConfig = field(default_factory=BatchStoreConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        drafter_config(self.drafter, k=self.k)  # a wrong drafter is told before a model is loaded
        check_range("ServeConfig", "port", self.port, 0, 65535)
        check_range("ServeConfig", "queue_size", self.queue_size, 1, 1 << 20)
        check_range("ServeConfig", "retry_after", self.retry_after, 0, 86400)
        check_range("ServeConfig", "max_body", self.max_body, 1, 1 << 34)
        check_range("ServeConfig", "max_sequences", self.max_sequences, 1, 65536)
        check_range("ServeConfig", "max_new_tokens", self.max_new_tokens, 0, 1 << 24)
        for name in ("timeout", "drain_seconds", "report_every"):
            check_range("ServeConfig", name, getattr(self, name), 0.0, 1e6)
        check_range("ServeConfig", "write_timeout", self.write_timeout, 0.001, 1e6)
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(
                f"ServeConfig.log_format = {self.log_format!r}. {did_you_mean(self.log_format, LOG_FORMATS)}"
            )
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("ServeConfig.ssl_keyfile is given without ssl_certfile; give both.")
        for path in (self.ssl_certfile, self.ssl_keyfile):
            if path is not None and not path.is_file():
                raise ConfigError(f"ServeConfig: {path} does not exist; give the file of the certificate or its key.")

    @property
    def name(self) -> str:
        """The model's name in requests. Of a folder only the last part, so that no path is told."""
        return self.served_name or (Path(self.model).resolve().name if Path(self.model).is_dir() else self.model)

    @property
    def drafter_name(self) -> str:
        """The drafter's name in requests, without what follows its colon."""
        return self.drafter.partition(":")[0]
