"""Where the time of a step goes: stopwatches around the engine's own methods, switched on for every second round."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from steeple.engine import Engine
from steeple.engine.engine import EngineParts
from steeple.model.layers import Linear, RMSNorm
from steeple.model.run import Runner
from steeple.model.whole import NativeForward

INSIDE = {"attention": "attention", "linear": "linear", "cache": "cache", "rows": "elementwise"}
"""Parts of a forward: as the native one names them, and as the result does. Elementwise: norms, activations, rotation,
embedding. What is left of a forward is its rest: calls from Python, threads that wait for each other."""

PARTS = (*INSIDE.values(), "rest", "logits", "sampling", "overhead")


class WatchedEngine(Engine):
    """An engine that can tell how long the parts of a step took. Between watched rounds nothing is in the way.

    The ``PARTS`` of a round add up to its time: those of ``INSIDE`` and ``rest`` are the forward, ``logits`` the head,
    ``sampling`` the rest of the judgement (laws, verification, tokens to the host), ``overhead`` everything else.
    """

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self._on = False
        self._seconds: dict[str, float] = defaultdict(float)
        self._watch(self._runner, "forward", "forward")
        self._watch(self._runner, "logits", "logits")
        self._watch(self._runner, "best", "logits")
        self._watch(self._judge, "judge", "judge")

    def _watch(self, owner: object, method: str, part: str) -> None:
        work = getattr(owner, method, None)
        if work is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return work(*args, **kwargs)
            start = time.perf_counter()
            result = work(*args, **kwargs)
            self._seconds[part] += time.perf_counter() - start
            return result

        setattr(owner, method, timed)

    def timed_step(self) -> float:
        """Seconds of one step that nobody watches."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def watched_step(self) -> dict[str, float]:
        """Seconds of one step by part; their sum is the step."""
        self._seconds.clear()
        with counting(self._runner) as inside:
            self._on = True
            total = self.timed_step()
            self._on = False
        forward, judge, logits = (self._seconds[name] for name in ("forward", "judge", "logits"))
        return {
            **inside,
            "rest": forward - sum(inside.values()),
            "logits": logits,
            "sampling": judge - logits,
            "overhead": total - forward - judge,
        }


@contextmanager
def counting(runner: Runner) -> Iterator[dict[str, float]]:
    """Seconds inside the runner's forwards within the block, by part, once the block has ended."""
    inside = dict.fromkeys(INSIDE.values(), 0.0)
    whole = runner.whole
    if not isinstance(whole, NativeForward):
        with _by_hand(runner, inside):
            yield inside
        return
    before = whole.parts
    whole.timing = True
    try:
        yield inside
    finally:
        whole.timing = False
        after = whole.parts
        inside.update({ours: after[theirs] - before[theirs] for theirs, ours in INSIDE.items()})


@contextmanager
def _by_hand(runner: Runner, inside: dict[str, float]) -> Iterator[None]:
    """For a forward layer by layer: what the layers are made of is replaced by the same with a stopwatch.

    On a GPU work is queued, so these seconds say what it costs to ask for the work.
    """

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = work(*args, **kwargs)
            inside[part] += time.perf_counter() - start
            return result

        return call

    places: list[tuple[Any, str, str]] = [(runner, "_attention", "attention"), (runner.cache, "stage", "cache")]
    for module in (*runner.decoder.layers.modules(), runner.decoder.norm):
        if isinstance(module, Linear | RMSNorm):
            places.append((module, "forward", "linear" if isinstance(module, Linear) else "elementwise"))
    before = [vars(owner).get(name) for owner, name, _ in places]
    for owner, name, part in places:
        vars(owner)[name] = timed(part, getattr(owner, name))
    try:
        yield
    finally:
        for (owner, name, _), work in zip(places, before, strict=True):
            del vars(owner)[name]
            if work is not None:
                vars(owner)[name] = work
