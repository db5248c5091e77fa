"""Settings of padded generation: which schedule, how many rows, how deep a draft."""

from __future__ import annotations

from dataclasses import dataclass, field

from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean

SCHEDULE_NAMES = ("align", "pool", "holes")


@dataclass(frozen=True, kw_only=True)
class PaddedConfig:
    """How a padded batch is kept and drafted for. What is drawn depends on ``k`` only, never on the rest."""

    schedule: str = field(default="align", metadata={"help": "align, pool or holes"})
    batch_size: int = field(default=8, metadata={"help": "most rows of one call of a model"})
    k: int = field(default=4, metadata={"help": "tokens drafted per round"})
    window: int = field(default=32, metadata={"help": "pool: requests whose keys are held at once"})
    waste: float = field(default=0.5, metadata={"help": "holes: share of slots that may be lost before compaction"})
    refill: bool = field(default=True, metadata={"help": "a finished row goes to the next prompt at once"})
    probe: bool = field(default=True, metadata={"help": "test at the start whether the models bear the schedule"})

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULE_NAMES:
            raise ConfigError(
                f"PaddedConfig.schedule = {self.schedule!r}. {did_you_mean(str(self.schedule), SCHEDULE_NAMES)}"
            )
        check_range("PaddedConfig", "batch_size", self.batch_size, 1, 65536)
        check_range("PaddedConfig", "k", self.k, 1, 63)
        check_range("PaddedConfig", "window", self.window, 1, 1 << 20)
        check_range("PaddedConfig", "waste", self.waste, 0.0, 0.99)
