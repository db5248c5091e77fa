"""What the engine counts. One definition of accepted, committed and time."""

from __future__ import annotations

from dataclasses import dataclass, field

from steeple.request import SpeculationStats


@dataclass(slots=True)
class EngineStats:
    """Sums over the engine's life; replace the object to start again. Seconds are wall time.

    Steps without prompt rows are *decode steps*; their time is split into drafting, the target's forward, and the
    rest (scheduling, sampling, bookkeeping). Steps with prompt rows count as ``prompt_seconds`` as a whole.
    """

    steps: int = 0
    decode_steps: int = 0
    committed: int = 0
    prompt_tokens: int = 0
    preemptions: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0
    prompt_seconds: float = 0.0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)

    def time(self, decode: bool, total: float, drafting: float, forward: float) -> None:
        """Book the seconds of one step."""
        self.steps += 1
        if decode:
            self.decode_steps += 1
            self.draft_seconds += drafting
            self.verify_seconds += forward
            self.other_seconds += total - drafting - forward
        else:
            self.prompt_seconds += total
