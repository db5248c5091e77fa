"""The fleet: requests are routed to replicas, the replicas run, and every request is answered or refused once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean
from steeple.plan.fleet.drafting import Drafting
from steeple.plan.fleet.load import Floats, Load
from steeple.plan.fleet.replica import IDLE, Limits, Replica, Work
from steeple.plan.fleet.steps import StepTable, StepTime
from steeple.plan.fleet.twin import SlowReplica

ROUND_ROBIN, LEAST_LOADED, SHORTEST_QUEUE = "round_robin", "least_loaded", "shortest_queue"
ROUTES = {
    ROUND_ROBIN: "every replica in turn",
    LEAST_LOADED: "the fewest requests in flight",
    SHORTEST_QUEUE: "the fewest tokens in flight, prompts and outputs, as if lengths were known",
}
DRAW_STREAM = 11  # keeps the draws of rounds apart from those of the load


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The replicas and what they are made of.

    Attributes:
        replicas: how many there are.
        gpus: of each replica (its tensor-parallel group).
        route: a name in ``ROUTES``.
        limits: of each replica.
        drawn: whether tokens per round are drawn from the drafter's law; otherwise every round gives the mean.
        seed: of what is drawn.
    """

    replicas: int = 1
    gpus: int = 1
    route: str = LEAST_LOADED
    limits: Limits = field(default_factory=Limits)
    drawn: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("Fleet", "replicas", self.replicas, 1, 10**6)
        check_range("Fleet", "gpus", self.gpus, 1, 10**4)
        if self.route not in ROUTES:
            raise ConfigError(f"Fleet.route = {self.route!r} is unknown. {did_you_mean(self.route, ROUTES)}")


@dataclass(frozen=True)
class Outcome:
    """What happened to every request, and what the replicas did.

    Attributes:
        load: the requests, in order of arrival.
        first, done: seconds at which the first and the last token were there ``[N]``; NaN for the refused.
        refused: requests that no replica can hold ``[N]``.
        busy: seconds in steps of each replica ``[R]``.
        decode_seconds: sum over steps of their seconds times their decoding requests.
        token_steps: sum over steps of their decoding requests.
        steps: of all replicas together.
        preempted: how often a request gave up its cache.
        gaps: steps by their time, each counted once per decoding request, in bins of ``replica.BINS`` per factor e.
        makespan: seconds from the first arrival to the last token.
    """

    load: Load
    first: Floats
    done: Floats
    refused: np.ndarray
    busy: Floats
    decode_seconds: float
    token_steps: float
    steps: int
    preempted: int
    gaps: np.ndarray
    makespan: float


def tabulate(fleet: Fleet, step: StepTime, drafting: Drafting) -> StepTable:
    """The times of the steps of a replica; the same for any number of replicas and any load."""
    most = fleet.limits.kv_tokens + fleet.limits.chunk
    return StepTable(step, drafting.time, rows=drafting.rows, most_context=most, chunk=fleet.limits.chunk)


def simulate(
    load: Load,
    fleet: Fleet,
    step: StepTime,
    drafting: Drafting,
    *,
    table: StepTable | None = None,
    kind: type[Replica] | type[SlowReplica] = Replica,
) -> Outcome:
    """Run ``load`` on ``fleet``.

    A request that a replica could not hold even alone (prompt, output and the rows of a draft exceed ``kv_tokens``)
    is refused when it comes.

    Args:
        step: seconds of a step of one replica, tensor parallelism included.
        table: what ``tabulate`` made of the same fleet, step and drafting, to make it once for many simulations.
        kind: the replica or its slow twin.
    """
    limits = fleet.limits
    rows = drafting.rows
    table = table or tabulate(fleet, step, drafting)
    work = Work(load, drafting, np.random.default_rng((fleet.seed, DRAW_STREAM)) if fleet.drawn else None)
    refused = load.prompt + load.output - 1 + rows > limits.kv_tokens
    served = np.flatnonzero(~refused)
    replicas = [kind(work, table, limits) for _ in range(fleet.replicas)]
    if fleet.route == ROUND_ROBIN:
        _by_turns(replicas, load, served)
    else:
        weights = np.ones(len(load), dtype=np.int64) if fleet.route == LEAST_LOADED else load.prompt + load.output
        _by_load(replicas, load, served, weights.tolist())
    done = np.array(work.done)
    return Outcome(
        load=load,
        first=np.array(work.first),
        done=done,
        refused=refused,
        busy=np.array([r.busy for r in replicas]),
        decode_seconds=sum(r.decode_seconds for r in replicas),
        token_steps=sum(r.token_steps for r in replicas),
        steps=sum(r.steps for r in replicas),
        preempted=sum(r.preempted for r in replicas),
        gaps=np.sum([r.gaps for r in replicas], axis=0),
        makespan=float(np.nanmax(done) - load.arrival[0]) if len(served) else 0.0,
    )


def _by_turns(replicas: Sequence[Replica | SlowReplica], load: Load, served: np.ndarray) -> None:
    """Every replica alone, since who gets a request depends on nothing that happens."""
    for turn, replica in enumerate(replicas):
        mine = served[turn :: len(replicas)]
        for request, now in zip(mine.tolist(), load.arrival[mine].tolist(), strict=True):
            while replica.end <= now:
                replica.commit()
                replica.plan()
            replica.arrive(request, now)
        while replica.end < IDLE:
            replica.commit()
            replica.plan()


def _by_load(replicas: Sequence[Replica | SlowReplica], load: Load, served: np.ndarray, weights: list[int]) -> None:
    """All replicas in the order of their changes, so that what a router sees is what is in flight at that time."""
    in_flight = np.zeros(len(replicas), dtype=np.int64)
    changes: list[tuple[float, int]] = []

    def run_until(now: float) -> None:
        while changes and changes[0][0] <= now:
            end, number = heappop(changes)
            replica = replicas[number]
            if replica.end != end:
                continue  # an arrival has changed it since
            for request in replica.commit():
                in_flight[number] -= weights[request]
            replica.plan()
            if replica.end < IDLE:
                heappush(changes, (replica.end, number))

    for request, now in zip(served.tolist(), load.arrival[served].tolist(), strict=True):
        if changes and changes[0][0] <= now:
            run_until(now)
        number = int(in_flight.argmin())
        in_flight[number] += weights[request]
        if replicas[number].arrive(request, now):
            heappush(changes, (replicas[number].end, number))
    run_until(IDLE)
