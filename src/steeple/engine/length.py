"""How deep to draft, chosen while running: from past rounds' acceptance and the measured time of rounds, maybe 0.

The depth of a round is decided before anything of it is drawn, so outputs keep the target's law. It depends on the
clock, so two sampled runs with one seed may differ; greedy ones may not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from steeple.request import Request, SpeculationStats

LADDER = (0, 1, 2, 3, 4, 6, 8, 12, 16)
FIRST_TRIED = 4
REMEMBERED = 5  # times kept of each depth; their median counts
SURE = 3  # times of a depth before it is believed: a single one may have met a busy machine
STALE = 48  # rounds until plain decoding, or while it is chosen the best draft, is tried again
CLEAR, RARELY = 1.25, 4 * STALE  # a draft that gains so much leaves plain decoding alone for so many rounds
MARGIN = 1.02  # a change of depth must promise this much
HOPELESS = 0.8  # a draft that promises less than this share of plain decoding is tried half as often each time
FADE = 0.98  # of what is known of acceptance, per round
PRIOR, PRIOR_WEIGHT = 0.7, 4.0
CERTAIN, MUCH_WORSE = 8, 0.6  # a request's own acceptance counts after so many rounds, if it is below this share of all


def _tried(stats: SpeculationStats) -> int:
    """Nodes whose turn came: those of depth 0, and those whose parent was accepted."""
    if not stats.proposed_at:
        return 0
    deeper = zip(stats.accepted_at, stats.proposed_at[1:], strict=False)
    return stats.proposed_at[0] + sum(min(reached, proposed) for reached, proposed in deeper)


@dataclass(slots=True)
class _Times:
    """Seconds of rounds at one size of batch and context, by depth."""

    seconds: dict[int, deque[float]] = field(default_factory=dict)
    tried: dict[int, int] = field(default_factory=dict)  # round of the last try
    wait: int = STALE
    depth: int = 0
    before: int = -1  # depth of the round before
    round: int = 0

    def note(self, seconds: float) -> None:
        # The first round at another depth is slower than those that follow it: other shapes, cold caches.
        if self.depth == self.before:
            self.seconds.setdefault(self.depth, deque(maxlen=REMEMBERED)).append(seconds)
            self.tried[self.depth] = self.round

    def curve(self, depths: Sequence[int]) -> list[float]:
        """Expected seconds at each depth: medians of what was measured, straight lines between and beyond."""
        known = sorted(self.seconds)
        middle = [median(self.seconds[depth]) for depth in known]
        slope = max(0.0, (middle[-1] - middle[0]) / (known[-1] - known[0])) if len(known) > 1 else 0.0
        inside = np.interp(depths, known, middle)
        beyond = np.maximum(0, np.array(depths) - known[-1]) * slope
        return [float(x) for x in inside + beyond]


class GoodputLengths:
    """Chooses the depth with the most expected tokens per second for the whole batch, and cuts it for requests whose
    drafts are accepted too rarely to be worth their rows.

    Source of the objective: goodput (SmartSpec, Liu et al. 2024, arXiv 2406.14066). Args: most: deepest draft.
    """

    def __init__(self, most: int) -> None:
        self._depths = [depth for depth in LADDER if depth <= most]
        if most not in self._depths:
            self._depths.append(most)
        self._reached, self._survived = np.zeros(most), np.zeros(most)
        self._times: dict[tuple[int, int], _Times] = {}
        self._here = _Times()
        self._row_cost = 0.0  # tokens that a row must be expected to bring
        self._typical = PRIOR
        self._survival = self._estimate()

    def begin(self, running: Sequence[Request]) -> None:
        """Choose this round's depth."""
        ready = [r for r in running if r.ready]
        if not ready:
            return
        self._survival = self._estimate()
        mean = sum(map(len, ready)) / len(ready)
        key = (round(2 * math.log2(len(ready))), round(2 * math.log2(mean)))
        self._here = self._times.setdefault(key, _Times())
        here = self._here
        here.round, here.before = here.round + 1, here.depth if here.round else -1
        here.depth = self._choose(len(ready))

    def _choose(self, batch: int) -> int:
        here, first = self._here, min(FIRST_TRIED, self._depths[-1])
        if len(here.seconds.get(0, ())) < SURE:
            return 0
        if first not in here.seconds:
            return first
        times, tokens = here.curve(self._depths), self._expected()
        rates = [e / t for e, t in zip(tokens, times, strict=True)]
        hopeless = rates[self._depths.index(first)] < HOPELESS * rates[0]
        if len(here.seconds[first]) < SURE and not hopeless:
            return first
        best = int(np.argmax(rates))
        if here.depth in self._depths and rates[best] < MARGIN * rates[self._depths.index(here.depth)]:
            best = self._depths.index(here.depth)
        depth = self._depths[best]
        rows = batch * max(depth, 1)
        self._row_cost = max(0.0, times[best] - times[0]) / rows * batch * rates[best]
        return self._try_again(depth, rates)

    def _try_again(self, depth: int, rates: Sequence[float]) -> int:
        """Now and then a round of what is not chosen, so that the choice rests on recent times."""
        here, round = self._here, self._here.round
        if depth:
            gain = rates[self._depths.index(depth)] / rates[0]
            return 0 if round - here.tried[0] > (RARELY if gain > CLEAR else STALE) else depth
        drafted = 1 + int(np.argmax(rates[1:]))
        if round - max(t for d, t in here.tried.items() if d) <= here.wait:
            return 0
        if here.before == self._depths[drafted]:  # the second round of the try, the one that counts
            here.wait = here.wait * 2 if rates[drafted] < HOPELESS * rates[0] else STALE
        return self._depths[drafted]

    def _estimate(self) -> list[float]:
        """Probability that a draft is accepted to each depth: of those that came so far, so many went on."""
        share = (self._survived + PRIOR * PRIOR_WEIGHT) / (self._reached + PRIOR_WEIGHT)
        # A depth seldom reached is taken to be like the one before it.
        for j in range(1, share.shape[0]):
            trust = self._reached[j] / (self._reached[j] + 2 * PRIOR_WEIGHT)
            share[j] = trust * share[j] + (1 - trust) * share[j - 1]
        return [float(x) for x in np.cumprod(share)]

    def _expected(self) -> list[float]:
        sums = np.concatenate(([0.0], np.cumsum(self._survival)))
        return [1.0 + float(sums[depth]) for depth in self._depths]

    def __call__(self, request: Request) -> int:
        """The round's depth, less the nodes that this request is unlikely to reach."""
        depth = self._here.depth
        stats = request.stats
        # A request whose drafts were cut gives no more evidence, so now and then it gets a whole one.
        if not depth or stats.rounds < CERTAIN or stats.rounds % STALE == 0:
            return depth
        tried = _tried(stats) + CERTAIN
        share = (stats.accepted + CERTAIN * self._typical) / tried
        likely = share + math.sqrt(share * (1 - share) / tried)  # at most this, but for bad luck
        ratio = share / self._typical
        if likely > MUCH_WORSE * self._typical:
            return depth
        kept = 0
        while kept < depth and self._survival[kept] * ratio ** (kept + 1) >= self._row_cost:
            kept += 1
        return kept

    def learn(
        self, requests: Sequence[Request], depths: Sequence[int], accepted: Sequence[int], seconds: float | None
    ) -> None:
        """See ``Lengths``. What is learnt is one for all requests."""
        del requests
        if seconds is not None:
            self._here.note(seconds)
        drafted = np.array(depths)
        if not drafted.any():
            return
        kept, most = np.minimum(accepted, drafted), self._reached.shape[0]
        self._reached *= FADE
        self._survived *= FADE
        level = np.arange(most)[:, None]
        self._survived += (kept > level).sum(axis=1)
        self._reached += ((drafted > level) & (kept >= level)).sum(axis=1)
        tokens, rounds = float(self._survived.sum()), float(self._reached[0])
        self._typical = (tokens + PRIOR) / (tokens + rounds + 1)
