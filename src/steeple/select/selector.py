"""Who drafts for whom, round by round: learnt acceptance and prices, the best round, and what is tried beside it.

Sources: drafters as arms, goodput as the reward and capacities, SPIN (Chen et al. 2025, arXiv 2503.15921). Where SPIN
takes turns between epochs of trying and of using, trying has an account here: a share of the time spent is earned, a
trial costs the seconds by which it is expected to be worse than the best round, and what cannot be paid is not tried.
So the price of trying is bounded whatever the drafters are worth, and a drafter that was found to be bad is tried at
longer and longer intervals. Everything rests on past rounds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steeple.select.acceptance import Acceptance
from steeple.select.costs import Costs, Drafted, Prior
from steeple.select.foresight import Bools, Foresight
from steeple.select.goodput import Goodput, Plan, Standing
from steeple.select.matching import NOBODY
from steeple.select.options import Options

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Held = dict[str, tuple[int, int]]  # drafter and depth of each request

PLAIN_FIRST = 2  # plain rounds before anything is drafted, for a price to compare with
TRIAL_ROUNDS = 2  # of a trial: the first one meets cold caches
TRIAL_DEPTH = 4
TRIAL_READING = 4.0  # plain steps that a first trial may spend on reading texts up
HYSTERESIS = 1.02  # a change must promise this much
EVERY, SELDOM = 4, 32  # rounds for which a choice holds: at first, and once it has proved to stay
WAIT, LONGEST_WAIT = 64, 4096  # rounds until a drafter that nobody uses is tried again
WORTH_DRAWING = 0.02  # of a plain step: with less on the account no other round is looked for
FRESH, LEAST_SHARE = 256, 0.25  # rounds after which less is earned for trying, and the part that is earned for ever
CHOOSING, LONGEST_PAUSE = 0.005, 128  # share of the time that choosing may take, and rounds that this may make it wait
SAVED = 8.0  # plain steps that the account may hold


@dataclass(frozen=True, slots=True)
class Outcome:
    """A round's end. Arrays ``[B]``: drafter (``NOBODY``), depth asked for, depth of what was proposed, nodes kept.

    draft: of each drafter that was asked what it did, and its seconds. rest: seconds of the step without them; None
    if it read prompts as well. positions: of all requests together.
    """

    ids: Sequence[str]
    drafter: Ints
    asked: Ints
    proposed: Ints
    accepted: Ints
    draft: Mapping[int, tuple[Drafted, float]]
    rest: float | None
    positions: float


class Selector:
    """Args: priors: of each drafter's times. clock: by which the choosing itself is timed. foreseen: drafters that say
    before a round whether they have anything to propose (``revise``).
    """

    def __init__(
        self,
        priors: Sequence[Prior],
        options: Options,
        clock: Callable[[], float] = time.perf_counter,
        foreseen: Sequence[int] = (),
    ) -> None:
        self._options, self._D, self._clock = options, len(priors), clock
        self._foreseen = tuple(foreseen)
        self._foresight: Foresight | None = None
        self.acceptance = Acceptance(len(priors), options.most, foreseen)
        self.costs = Costs(priors)
        self._rng = np.random.default_rng(options.seed)
        self._round, self._holds_until = 0, 0
        self._held: Held = {}
        self._resume: Held | None = None  # what goes on when a trial has ended
        self._usual = (NOBODY, 0)
        self._stays = EVERY
        self._pace, self._thinking = 0.0, 0.0  # seconds of a round, and of a choice
        self._account = 0.0
        self._wait = np.full(self._D, WAIT)
        self._used = np.zeros(self._D, dtype=np.int64)  # round of the last use

    def choose(self, ids: Sequence[str], standing: Callable[[], Standing]) -> Plan:
        """The next round for requests ``ids``. ``standing`` is asked only where a choice is made anew; else the plan in
        hand goes on, newcomers get what is usual in it, and nothing is expected of it."""
        self._round += 1
        if self._round >= self._holds_until and self._resume is not None:
            self._held, self._resume = self._resume, None
            self._holds_until = self._round + self._pause()
        if self._held and self._round < self._holds_until and self._complete(ids):
            return Plan(*self._in_hand(ids), float("nan"), float("nan"))
        started = self._clock()
        plan = self._decide(ids, standing())
        self._thinking += (self._clock() - started - self._thinking) / 2
        return plan

    def revise(self, ids: Sequence[str], plan: Plan, offered: Mapping[int, Bools]) -> Plan:
        """The round's plan, now that each foreseen drafter has said for which of ``ids`` it has something, ``[B]``.

        What is tried is done as it stands; and where places are few they stay as they were given.
        """
        for d, found in offered.items():
            self.acceptance.note_offers(ids, d, found)
        if self._foresight is None or self._resume is not None or self._options.capacity:
            return plan
        return self._foresight.revise(ids, plan, offered)

    def _complete(self, ids: Sequence[str]) -> bool:
        """Whether the plan in hand says something of all ``ids``; newcomers join it where there is room for any."""
        new = [id for id in ids if id not in self._held]
        if new and self._options.capacity:
            return False
        self._held.update(dict.fromkeys(new, self._usual))
        return True

    def _pause(self) -> int:
        """Rounds for which a choice holds: so many at least that choosing takes little of their time."""
        return max(self._stays, min(LONGEST_PAUSE, int(self._thinking / max(CHOOSING * self._pace, 1e-9))))

    def learn(self, outcome: Outcome) -> None:
        """A round ended."""
        asked = np.flatnonzero(outcome.asked > 0)
        names = [outcome.ids[b] for b in asked.tolist()]
        self.acceptance.note(names, outcome.drafter[asked], outcome.proposed[asked], outcome.accepted[asked])
        for d in outcome.draft:
            self._used[d] = self._round
        if outcome.rest is None:
            for d, (done, seconds) in outcome.draft.items():
                self.costs.note_draft(d, done, seconds, settled=False)
            return
        batch = len(outcome.ids)
        rows = batch + int(outcome.proposed.sum())
        self.costs.note(outcome.rest, rows, batch, outcome.positions, dict(outcome.draft))
        seconds = outcome.rest + sum(seconds for _, seconds in outcome.draft.values())
        share = self._options.explore * max(LEAST_SHARE, (1.0 + self._round / FRESH) ** -0.5)
        self._pace += (seconds - self._pace) / 8
        self._account = min(self._account + share * seconds, SAVED * outcome.rest)

    def forget(self, id: str) -> None:
        """The request ended."""
        self.acceptance.forget(id)
        self._held.pop(id, None)
        if self._resume is not None:
            self._resume.pop(id, None)

    @property
    def remembered(self) -> frozenset[str]:
        """Requests of which something is known."""
        return self.acceptance.remembered | frozenset(self._held) | frozenset(self._resume or ())

    def _in_hand(self, ids: Sequence[str]) -> tuple[Ints, Ints]:
        """Drafter and depth that the plan in hand says."""
        pairs = np.array([self._held.get(id, self._usual) for id in ids], dtype=np.int64)
        return pairs[:, 0], pairs[:, 1]

    def _decide(self, ids: Sequence[str], standing: Standing) -> Plan:
        rates = self.costs.rates(len(ids), float(standing.lengths.sum()))
        goodput = Goodput(self.acceptance.curves(ids), rates, standing, self._options.capacity, self._foreseen)
        if self.costs.steps < PLAIN_FIRST:
            return self._hold(ids, goodput.plain(), 1)
        first = self._first_trial(goodput, standing)
        if first is not None:
            return self._hold(ids, first, 1)
        best = self._stay_or_go(ids, goodput)
        self._hold(ids, best, self._pause())
        self._foresight = Foresight(ids, goodput, best, self._foreseen)
        other = self._other(ids, goodput, standing, best)
        if other is None:
            return best
        resume = self._held
        self._hold(ids, other, TRIAL_ROUNDS)
        self._resume = resume
        return other

    def _hold(self, ids: Sequence[str], plan: Plan, rounds: int) -> Plan:
        pairs = list(zip(plan.drafter.tolist(), plan.depth.tolist(), strict=True))
        self._held, self._resume = dict(zip(ids, pairs, strict=True)), None
        self._usual = Counter(pairs).most_common(1)[0][0]
        self._holds_until = self._round + rounds
        return plan

    def _first_trial(self, goodput: Goodput, standing: Standing) -> Plan | None:
        """A round of a drafter whose times or whose acceptance nobody knows yet."""
        seen = np.minimum(self.costs.measured, self.acceptance.rounds)
        for d in np.argsort(seen, kind="stable").tolist():
            if seen[d] < TRIAL_ROUNDS:
                return self._trial(d, goodput, standing)
        return None

    def _trial(self, d: int, goodput: Goodput, standing: Standing) -> Plan:
        """A round of drafter ``d`` for as many requests as it can read up in a few steps' time, one at least."""
        order = np.argsort(standing.behind[:, d], kind="stable")
        reading = np.cumsum(standing.behind[order, d]) * goodput.catch_up_price(d)
        room = self._options.capacity[d] if self._options.capacity else order.shape[0]
        count = max(1, int((reading <= TRIAL_READING * goodput.plain().seconds).sum()))
        chosen = order[: min(count, room)]
        drafter = np.full(order.shape[0], NOBODY)
        drafter[chosen] = d
        return goodput.of(drafter, np.where(drafter >= 0, min(TRIAL_DEPTH, self._options.most), 0))

    def _stay_or_go(self, ids: Sequence[str], goodput: Goodput) -> Plan:
        """The best round, unless what is done now is about as good. New requests get the best one's choice."""
        drafter, depth = self._in_hand(ids)
        best = goodput.best(start=goodput.of(drafter, depth).rate)
        known = np.array([id in self._held for id in ids])
        stay = goodput.of(np.where(known, drafter, best.drafter), np.where(known, depth, best.depth))
        if self._fits(stay) and best.rate < HYSTERESIS * stay.rate:
            self._stays = min(2 * self._stays, SELDOM)
            return stay
        self._stays = EVERY
        return best

    def _fits(self, plan: Plan) -> bool:
        room = self._options.capacity
        return all(int((plan.drafter == d).sum()) <= most for d, most in enumerate(room))

    def _other(self, ids: Sequence[str], goodput: Goodput, standing: Standing, best: Plan) -> Plan | None:
        """A round that is tried instead of the best one, if its expected loss can be paid."""
        for d in np.argsort(self._used, kind="stable").tolist():
            if self._round - self._used[d] <= self._wait[d]:
                continue
            trial = self._trial(d, goodput, standing)
            if self._pay(goodput, trial, best):
                self._wait[d] = min(2 * self._wait[d], LONGEST_WAIT)
                return trial
        in_use = np.unique(best.drafter[best.drafter >= 0])
        self._wait[in_use] = WAIT
        if self._options.rule == "greedy" or self._account < WORTH_DRAWING * goodput.plain().seconds:
            return None
        B, D = standing.behind.shape
        drawn = self._options.rule == "thompson"
        shift = self._rng.standard_normal((B, D)) if drawn else np.ones((B, D))
        shift_all: Floats = self._rng.standard_normal((D,)) if drawn else np.ones(D)
        hopes = goodput.with_curves(self.acceptance.curves(ids, shift, shift_all))
        hoped = hopes.best(start=hopes.of(best.drafter, best.depth).rate)
        if (hoped.drafter == best.drafter).all():
            return None
        other = goodput.of(hoped.drafter, hoped.depth)
        return other if self._pay(goodput, other, best) else None

    def _pay(self, goodput: Goodput, plan: Plan, best: Plan) -> bool:
        """Book the seconds by which ``plan`` is expected to be worse than ``best``, if the account has them."""
        seconds = plan.seconds + goodput.catch_up_seconds(plan) / TRIAL_ROUNDS
        loss = TRIAL_ROUNDS * max(0.0, seconds - plan.tokens / best.rate)
        if loss > self._account:
            return False
        self._account -= loss
        return True
