"""How many replicas a load needs under its objectives: doubling until they are met, then bisection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from steeple.errors import CapacityError
from steeple.plan.fleet.drafting import Drafting
from steeple.plan.fleet.load import Load
from steeple.plan.fleet.report import Latencies, Objectives
from steeple.plan.fleet.simulate import Fleet, Outcome, simulate, tabulate
from steeple.plan.fleet.steps import StepTime

MOST_RATE, LEAST_RATE = 1e9, 1e-6
Told = Callable[[int, bool], None]


class Attempt(NamedTuple):
    """A fleet that was tried, and whether it was enough."""

    enough: bool
    fleet: Fleet
    outcome: Outcome


def fewest_replicas(
    load: Load,
    fleet: Fleet,
    step: StepTime,
    drafting: Drafting,
    objectives: Objectives,
    *,
    most: int = 4096,
    warmup: float = 0.1,
    told: Told | None = None,
) -> tuple[Fleet, Outcome]:
    """The smallest fleet that meets the objectives, and what it did.

    It is taken that a larger fleet meets what a smaller one does. A load must last much longer than its requests do:
    a queue that grows without end may still be short when a short load ends.

    Args:
        fleet: its number of replicas is where the search begins.
        most: replicas at which it gives up.
        told: called with every number that was tried and whether it was enough.

    Raises:
        CapacityError: not even ``most`` replicas do; says which objective binds.
    """

    table = tabulate(fleet, step, drafting)

    def attempt(count: int) -> Attempt:
        sized = replace(fleet, replicas=count)
        outcome = simulate(load, sized, step, drafting, table=table)
        enough = Latencies.of(outcome, warmup).within(objectives)["both"] >= objectives.share
        if told is not None:
            told(count, enough)
        return Attempt(enough, sized, outcome)

    low, high = 0, min(fleet.replicas, most)
    found = attempt(high)
    while not found.enough:
        if high >= most:
            raise CapacityError(_what_binds(found.outcome, objectives, most, warmup))
        low, high = high, min(2 * high, most)
        found = attempt(high)
    while high - low > 1:
        middle = (low + high) // 2
        tried = attempt(middle)
        if tried.enough:
            high, found = middle, tried
        else:
            low = middle
    return found.fleet, found.outcome


def highest_rate(
    load: Load,
    fleet: Fleet,
    step: StepTime,
    drafting: Drafting,
    objectives: Objectives,
    *,
    warmup: float = 0.1,
    tolerance: float = 0.02,
) -> float:
    """Requests per second up to which ``fleet`` meets the objectives, within a share of ``tolerance`` below it.

    The requests of ``load`` are kept and their time is stretched. 0 where they fail even one at a time.
    """

    table = tabulate(fleet, step, drafting)

    def enough(rate: float) -> bool:
        outcome = simulate(load.at_rate(rate), fleet, step, drafting, table=table)
        return Latencies.of(outcome, warmup).within(objectives)["both"] >= objectives.share

    low, high = 0.0, load.rate
    while enough(high):
        low, high = high, 2 * high
        if high > MOST_RATE:
            return low  # nothing binds: all at once is answered in time
    if not low:
        low = high / 2
        while not enough(low):
            low, high = low / 2, low
            if low < LEAST_RATE:
                return 0.0
    while high - low > tolerance * low:
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def _what_binds(outcome: Outcome, objectives: Objectives, most: int, warmup: float) -> str:
    within = Latencies.of(outcome, warmup).within(objectives)
    name = min(("ttft", "tpot"), key=lambda name: within[name])
    return (
        f"Even {most} replicas answer only {within[name]:.1%} of the requests within {name} = "
        f"{getattr(objectives, name):g} s, and {objectives.share:.1%} are asked for; raise {name}, lower the load, or "
        "give faster replicas (tp, hardware)."
    )
