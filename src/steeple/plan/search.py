"""Searches drafters, k, windows and batches for what pays: the best under limits, what binds, the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from steeple.errors import CapacityError, ConfigError
from steeple.plan.acceptance import Acceptance
from steeple.plan.costs import cost_per_million_tokens
from steeple.plan.rounds import Deployment, DraftForm, memory_bytes, round_of

PLAIN = "none"


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """A drafter that is tried, and how much of what it drafts stays."""

    form: DraftForm
    acceptance: Acceptance


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One place of the search.

    Args:
        drafter: its name; ``none`` is plain decoding.
        k: drafted tokens per round.
        window: latest positions that the draft reads; 0 = all.
        batch: requests decoded together.
        context: positions of each.
        tau: tokens per round.
        tau_source: where tau is from.
        dt: a round in plain steps at the same batch.
        throughput_multiplier: tau / dt.
        tokens_per_second: of the whole batch.
        seconds_per_token: that one request waits for a token on average.
        memory_bytes: on all devices together.
        cost_per_million_tokens: 0 without a price.
    """

    drafter: str
    k: int
    window: int
    batch: int
    context: int
    tau: float
    tau_source: str
    dt: float
    throughput_multiplier: float
    tokens_per_second: float
    seconds_per_token: float
    memory_bytes: float
    cost_per_million_tokens: float

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a candidate may take at most; 0 = as much as it likes.

    Args:
        memory_bytes: on all devices together.
        seconds_per_token: of one request.
        cost_per_million_tokens: in the currency of the price.
    """

    memory_bytes: float = 0.0
    seconds_per_token: float = 0.0
    cost_per_million_tokens: float = 0.0

    def allows(self, candidate: Candidate) -> bool:
        """Whether every limit is kept."""
        return not self.broken(candidate)

    def broken(self, candidate: Candidate) -> list[str]:
        """The fields whose limit ``candidate`` exceeds."""
        return [name for name, most in asdict(self).items() if most and getattr(candidate, name) > most]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is tried. windows: () = each drafter's own; others hold tau as it is, since it was measured with its own."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    ks: tuple[int, ...]
    windows: tuple[int, ...] = ()


def candidates(
    where: Deployment, draftings: Sequence[Drafting], grid: Grid, *, price_per_hour: float = 0.0
) -> list[Candidate]:
    """Plain decoding and every drafter at every k and window in every cell of ``grid``.

    ``price_per_hour``: of all devices together.
    """
    found = _evaluate(where, None, grid, 0, price_per_hour)
    for drafting in draftings:
        for window in dict.fromkeys(grid.windows if drafting.form.window and grid.windows else (drafting.form.window,)):
            tried = Drafting(form=drafting.form.with_window(window), acceptance=drafting.acceptance)
            for k in grid.ks:
                found += _evaluate(where, tried, grid, k, price_per_hour)
    return found


def _evaluate(where: Deployment, drafting: Drafting | None, grid: Grid, k: int, price: float) -> list[Candidate]:
    batch, context = np.array(grid.batches)[:, None], np.array(grid.contexts)[None, :]
    form = drafting.form if drafting else DraftForm(name=PLAIN)
    times = round_of(where, form, batch, context, k)
    tau = drafting.acceptance.tau(context, k) if drafting else np.ones(context.shape)
    speed = batch * tau / times.seconds
    columns = {
        "tau": tau,
        "dt": times.dt,
        "throughput_multiplier": tau / times.dt,
        "tokens_per_second": speed,
        "seconds_per_token": batch / speed,
        "memory_bytes": memory_bytes(where, form, batch, context, k),
        "cost_per_million_tokens": cost_per_million_tokens(speed, price),
    }
    shape = (len(grid.batches), len(grid.contexts))
    values = {name: np.broadcast_to(column, shape) for name, column in columns.items()}
    source = drafting.acceptance.source if drafting else ""
    return [
        Candidate(
            drafter=form.name,
            k=k,
            window=form.window,
            batch=b,
            context=c,
            tau_source=source,
            **{name: float(column[y, x]) for name, column in values.items()},
        )
        for y, b in enumerate(grid.batches)
        for x, c in enumerate(grid.contexts)
    ]


def best(found: Iterable[Candidate], limits: Limits, key: Callable[[Candidate], float] | None = None) -> Candidate:
    """The candidate within ``limits`` with the most tokens per second, or with the highest ``key``.

    Raises:
        CapacityError: none is within them; names the limits that bind, what would do, and what to change.
    """
    everything = list(found)
    if not everything:
        raise ConfigError("There is nothing to choose from; give at least one batch, context and drafter.")
    allowed = [candidate for candidate in everything if limits.allows(candidate)]
    if not allowed:
        raise CapacityError(_what_binds(everything, limits))
    return max(allowed, key=key or (lambda candidate: candidate.tokens_per_second))


def best_by_cell(found: Iterable[Candidate], limits: Limits) -> dict[tuple[int, int], Candidate]:
    """(batch, context) -> its fastest candidate within ``limits``; cells without one are left out."""
    fastest: dict[tuple[int, int], Candidate] = {}
    for candidate in found:
        place = (candidate.batch, candidate.context)
        if limits.allows(candidate) and (
            place not in fastest or candidate.tokens_per_second > fastest[place].tokens_per_second
        ):
            fastest[place] = candidate
    return fastest


def best_of_each(found: Iterable[Candidate]) -> list[Candidate]:
    """In every cell each drafter's fastest k and window, in the order of the search."""
    fastest: dict[tuple[str, int, int], Candidate] = {}
    for candidate in found:
        place = (candidate.drafter, candidate.batch, candidate.context)
        if place not in fastest or candidate.tokens_per_second > fastest[place].tokens_per_second:
            fastest[place] = candidate
    return list(fastest.values())


def pareto(found: Iterable[Candidate]) -> list[Candidate]:
    """Those that no other one beats in tokens per second and in seconds per token, the quickest to answer first.

    Meant for candidates of one context.
    """
    front: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: (c.seconds_per_token, -c.tokens_per_second)):
        if not front or candidate.tokens_per_second > front[-1].tokens_per_second:
            front.append(candidate)
    return front


# Limit -> its name in messages, divisor and unit for people, and what helps against it.
WORDS: Mapping[str, tuple[str, float, str, str]] = {
    "memory_bytes": ("memory", 1e9, "GB", "lower the batch or the context, add devices or use smaller weights"),
    "seconds_per_token": ("latency per token", 1e-3, "ms", "lower the batch, add devices or try other drafters"),
    "cost_per_million_tokens": ("cost per million tokens", 1.0, "", "raise the batch or find a lower price"),
}


def _what_binds(found: Sequence[Candidate], limits: Limits) -> str:
    """Which limits nothing keeps even alone, or that only their conjunction is impossible; the least that would do."""
    given = [name for name, most in asdict(limits).items() if most]
    alone = [name for name in given if all(name in limits.broken(candidate) for candidate in found)]
    if alone:
        parts = []
        for name in alone:
            words, unit, label, remedy = WORDS[name]
            least = min(getattr(candidate, name) for candidate in found)
            most = getattr(limits, name)
            parts.append(
                f"the limit on {words} binds: {most / unit:.4g} {label}".rstrip()
                + f" were allowed, {least / unit:.4g} {label}".rstrip()
                + f" is the least of all; {remedy}"
            )
        return "Nothing fits: " + "; and ".join(parts) + "."
    names = " and ".join(WORDS[name][0] for name in given)
    nearest = min(found, key=lambda candidate: _excess(candidate, limits))
    took = ", ".join(
        f"{WORDS[name][0]} {getattr(nearest, name) / WORDS[name][1]:.4g} {WORDS[name][2]}".rstrip() for name in given
    )
    return (
        f"Nothing fits: each limit can be kept, but not {names} together. Nearest is {nearest.drafter} with k = "
        f"{nearest.k} at batch {nearest.batch}, context {nearest.context}: {took}. Loosen one of them."
    )


def _excess(candidate: Candidate, limits: Limits) -> float:
    """By which factor a candidate exceeds the limit that it exceeds most."""
    return max(getattr(candidate, name) / getattr(limits, name) for name in limits.broken(candidate))
