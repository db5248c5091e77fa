"""What micro-batches are worth: a round's time where drafting and verification share a device, and where they do not.

Sources: SPIN (2025, arXiv 2503.15921) and Minions (Wang et al. 2024, arXiv 2402.15678) for pipelined rounds. On one
device that either side fills nothing overlaps, and every micro-batch reads the weights again; on two, the slower side
decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from steeple.errors import ConfigError
from steeple.plan.rounds import Deployment, DraftForm, round_of

MOST = 8  # micro-batches that are looked at


@dataclass(frozen=True, slots=True)
class PipelinedRound:
    """Seconds in which each of the batch's requests has one round, in ``micro_batches`` of equal size.

    ``draft`` and ``verify`` are those of one micro-batch.
    """

    micro_batches: int
    draft: float
    verify: float

    @property
    def shared(self) -> float:
        """On one device: all of it, one after the other."""
        return self.micro_batches * (self.draft + self.verify)

    @property
    def separate(self) -> float:
        """On a device each, in the long run: one micro-batch is drafted while another is verified."""
        if self.micro_batches == 1:
            return self.shared
        return self.micro_batches * max(self.draft, self.verify)


def pipelined_round(
    where: Deployment, form: DraftForm, batch: int, context: int, k: int, micro_batches: int
) -> PipelinedRound:
    """The round of ``batch`` requests in ``micro_batches``. A device of the drafter's own is one like the target's.

    Raises ``ConfigError`` for more micro-batches than requests, or fewer than one.
    """
    if not 1 <= micro_batches <= batch:
        raise ConfigError(f"micro_batches = {micro_batches} of a batch of {batch}; give 1 to {batch}.")
    found = round_of(where, form, batch / micro_batches, context, k)
    return PipelinedRound(micro_batches, float(found.draft), float(found.verify))


def best_separate(where: Deployment, form: DraftForm, batch: int, context: int, k: int) -> PipelinedRound:
    """The number of micro-batches with the shortest round where the drafter has a device of its own, fewest first."""
    tried = [pipelined_round(where, form, batch, context, k, m) for m in range(1, min(batch, MOST) + 1)]
    return min(tried, key=lambda each: each.separate)


def advice(where: Deployment, form: DraftForm, batch: int, context: int, k: int) -> str:
    """One sentence for a person: whether ``micro_batches`` should be more than 1, here and on two devices."""
    if form.shape is None or batch < 2 or not k:
        return "Pipelining: there is no drafting to hide; micro_batches = 1."
    whole, halves = (pipelined_round(where, form, batch, context, k, m) for m in (1, 2))
    here = (
        f"Pipelining {form.name} at batch {batch}, context {context}: on one device that either side fills nothing "
        f"overlaps, and two micro-batches take {_percent(halves.shared / whole.shared)} of the time of one"
    )
    if not form.own_keys:
        return f"{here}; it reads the target's keys, so it cannot have another device: micro_batches = 1."
    apart = best_separate(where, form, batch, context, k)
    if apart.micro_batches == 1:
        return f"{here}; with a device of its own it would not pay either: micro_batches = 1."
    return (
        f"{here}; with a device of its own {apart.micro_batches} would take {_percent(apart.separate / whole.shared)}: "
        "micro_batches = 1 here, more there."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
