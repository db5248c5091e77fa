"""Settings of the generate job."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steeple.draft import drafter_config
from steeple.engine.config import EngineConfig
from steeple.errors import ConfigError
from steeple.types import SamplingParams

FORMATS = {".txt": "text", ".jsonl": "json", ".ndjson": "json"}
"""How each kind of prompts file is read, by the end of its name."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to complete, with what, and where to put it.

    ``sampling`` holds the defaults of every request; a line's own fields win over them.
    """

    prompts: Path = field(metadata={"help": "one prompt a line (.txt), or one JSON object a line (.jsonl)"})
    output: Path = field(metadata={"help": "the .jsonl file to write; an unfinished one is continued"})
    model: str = field(default="demo", metadata={"help": "folder, hub name, or demo"})
    drafter: str = field(
        default="ngram", metadata={"help": "none, ngram, small_lm[:DIR], sparse_self, spire[:DIR] or auto-k"}
    )
    k: int | None = field(default=None, metadata={"help": "tokens drafted per round; default: the drafter's own"})
    overwrite: bool = field(default=False, metadata={"help": "start again, whatever the output holds"})
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.prompts.suffix not in FORMATS:
            raise ConfigError(
                f"GenerateConfig.prompts = {str(self.prompts)!r}: the name must end in {', '.join(FORMATS)}, "
                "so that it is clear how to read it."
            )
        if self.prompts.absolute() == self.output.absolute():
            raise ConfigError(f"GenerateConfig.output = {str(self.output)!r} is the prompts file; give another.")
        drafter_config(self.drafter, k=self.k)  # a wrong drafter is told before a model is loaded

    def settings(self) -> dict[str, Any]:
        """What decides the output, drafters being lossless: a job is only continued with the same."""
        model = Path(self.model).resolve() if Path(self.model).is_dir() else self.model
        sampling = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.sampling).items()}
        return {
            "model": str(model),
            "dtype": self.engine.dtype,
            "weights": self.engine.weights,
            "max_context": self.engine.max_context,
            **sampling,
        }
