"""Acceptance of drafts as seen from outside: out of the answers' own statistics, or out of ``/metrics``.

Conventions (vLLM's): acceptance length = 1 + accepted / rounds with a draft, the bonus token included: tau over these
rounds; rates by position count all rounds with a draft, whether or not the walk came so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

PREFIXES = ("steeple_", "vllm:")  # whose counters are read, the first that is there
TOTALS = ("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
BY_POSITION = "spec_decode_num_accepted_tokens_per_pos"
PERCENT = 100.0


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Counts: rounds with a draft, tokens drafted and accepted, and rounds that accepted the draft at each position."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: Sequence[int] = field(default=())

    @property
    def tau(self) -> float | None:
        """Tokens per round with a draft; None without one."""
        return 1 + self.accepted / self.drafts if self.drafts else None

    def __add__(self, other: Acceptance) -> Acceptance:
        places = [a + b for a, b in zip_longest(self.by_position, other.by_position, fillvalue=0)]
        return Acceptance(
            self.drafts + other.drafts, self.drafted + other.drafted, self.accepted + other.accepted, places
        )

    def since(self, before: Acceptance) -> Acceptance | None:
        """What came after ``before``; None if the counters began anew in between."""
        places = [a - b for a, b in zip_longest(self.by_position, before.by_position, fillvalue=0)]
        counts = (self.drafts - before.drafts, self.drafted - before.drafted, self.accepted - before.accepted)
        return None if min(*counts, *places, 0) < 0 else Acceptance(*counts, places)

    def row(self) -> dict[str, Any]:
        """Under vLLM's names; the acceptance rate in percent, as there."""
        drafts = self.drafts
        return {
            "tau": self.tau,
            "spec_decode_acceptance_length": self.tau,
            "spec_decode_acceptance_rate": self.accepted / self.drafted * PERCENT if self.drafted else None,
            "spec_decode_num_drafts": drafts,
            "spec_decode_draft_tokens": self.drafted,
            "spec_decode_accepted_tokens": self.accepted,
            "spec_decode_per_position_acceptance_rates": [n / drafts for n in self.by_position] if drafts else [],
        }


def of_answer(said: Mapping[str, Any]) -> Acceptance | None:
    """``metrics.speculative_decoding`` of one answer; None if it lacks what is needed.

    ``acceptance_histogram[j]``: rounds that accepted exactly j tokens.
    """
    try:
        histogram = [int(count) for count in said["acceptance_histogram"]]
        return Acceptance(
            drafts=int(said["num_spec_steps"]),
            drafted=int(said["num_draft_tokens"]),
            accepted=int(said["num_accepted_draft_tokens"]),
            by_position=[sum(histogram[j:]) for j in range(1, len(histogram))],
        )
    except (KeyError, TypeError, ValueError):
        return None


def pooled(answers: Iterable[Acceptance]) -> Acceptance:
    """All together: long answers weigh more."""
    return sum(answers, Acceptance())


def read_counters(text: str) -> Acceptance | None:
    """The counters in a page of Prometheus metrics, over all their labels; None where there are none."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: dict[str, float] = {}
    places: dict[tuple[str, int], float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removesuffix("_total")
                if name.endswith(BY_POSITION):
                    place = (name, int(sample.labels["position"]))
                    places[place] = places.get(place, 0.0) + sample.value
                elif name.endswith(TOTALS):
                    totals[name] = totals.get(name, 0.0) + sample.value
    except (ValueError, KeyError):
        return None  # no page of metrics
    for prefix in PREFIXES:
        names = [prefix + name for name in TOTALS]
        if all(name in totals for name in names):
            deep = [place for name, place in places if name == prefix + BY_POSITION]
            rows = [places.get((prefix + BY_POSITION, place), 0.0) for place in range(max(deep, default=-1) + 1)]
            drafts, drafted, accepted = (int(totals[name]) for name in names)
            return Acceptance(drafts, drafted, accepted, [int(value) for value in rows])
    return None
