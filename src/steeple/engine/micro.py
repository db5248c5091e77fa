"""How many micro-batches a pipeline runs: raised until measured throughput drops, with hysteresis.

Source: the heuristic of SPIN (2025, arXiv 2503.15921). The number decides who shares a step, never what is written.
"""

from __future__ import annotations

from steeple.engine.config import MOST_MICRO_BATCHES

TURNS = 8  # steps of every micro-batch that make one measurement
MARGIN = 1.03  # another number must gain so much to be taken
FIRST_WAIT, LONGEST_WAIT = 4, 64  # measurements between two tries; each try in vain doubles it
OTHER_LOAD = 1.5  # so many times more or fewer requests than when it was measured: start again


class MicroBatches:
    """Args: fixed: the number, at least 1; or 0: it is chosen by what ``note`` is told, from 1 up to ``most``.

    A measurement is the tokens per second of ``TURNS`` steps of every micro-batch; the first turn after a change is
    left out, because it still carries drafts of the sizes before. It goes up as long as that pays, else back; then one
    more and one fewer are tried in turn, ever more rarely while that is in vain.
    """

    def __init__(self, fixed: int, most: int = MOST_MICRO_BATCHES) -> None:
        self._adaptive, self._most = fixed == 0, most
        self.count = fixed or 1
        self._begin(0)
        self._skip_turn()

    def _begin(self, load: int) -> None:
        """Nothing is known."""
        self._load, self._best, self._rate = load, self.count, 0.0
        self._wait, self._rest, self._down = FIRST_WAIT, 0, False

    def _skip_turn(self) -> None:
        self._steps, self._tokens, self._since = -self.count, 0, 0.0

    def note(self, tokens: int, load: int, now: float) -> None:
        """A step without prompts ended ``now`` (seconds on any clock): it wrote ``tokens``; ``load`` requests run."""
        if not self._adaptive:
            return
        if self._load and not 1 / OTHER_LOAD < max(load, 1) / self._load < OTHER_LOAD:
            self._begin(0)
            self._skip_turn()
        self._steps += 1
        if self._steps == 0:
            self._since = now
        elif self._steps > 0:
            self._tokens += tokens
        if self._steps < TURNS * self.count:
            return
        rate = self._tokens / max(now - self._since, 1e-9)
        self._load = max(load, 1)
        before = self.count
        self.count = min(self._decide(rate), max(load, 1))
        if self.count != before:
            self._skip_turn()
        else:
            self._steps, self._tokens, self._since = 0, 0, now

    def _decide(self, rate: float) -> int:
        """The number for the next measurement, after one of ``rate`` tokens per second at ``count``."""
        if self.count == self._best:
            # The newest measurement counts: what was may have been another text.
            first, self._rate = self._rate == 0.0, rate
            self._rest -= 1
            return self._try() if first or self._rest <= 0 else self._best
        if rate > MARGIN * self._rate:
            step = self.count - self._best
            self._best, self._rate, self._wait = self.count, rate, FIRST_WAIT
            self._down = step < 0
            return self._try()
        self._rest = self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        self._down = not self._down
        return self._best

    def _try(self) -> int:
        """The neighbour to measure next: on the side whose turn it is, if there is one."""
        tried = self._best + (-1 if self._down else 1)
        if not 1 <= tried <= self._most:
            self._down = not self._down
            tried = self._best + (-1 if self._down else 1)
        return tried
