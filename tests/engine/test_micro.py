"""How many micro-batches: the controller on a simulated clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from steeple.engine.micro import FIRST_WAIT, LONGEST_WAIT, TURNS, MicroBatches

Rate = Callable[[int], float]


class Simulated:
    """Steps of a pipeline whose throughput is ``rate(micro-batches)`` tokens a second, ``noise`` relative."""

    def __init__(self, rate: Rate, load: int = 32, noise: float = 0.0) -> None:
        self.micro, self.rate, self.load = MicroBatches(0), rate, load
        self.now, self.used = 0.0, []
        self._dice, self._noise = np.random.default_rng(0), noise

    def run(self, steps: int) -> None:
        for _ in range(steps):
            count = self.micro.count
            tokens = 10
            self.now += tokens / (self.rate(count) * (1 + self._noise * self._dice.normal()))
            self.micro.note(tokens, self.load, self.now)
            self.used.append(count)

    def share(self, count: int, last: int) -> float:
        return self.used[-last:].count(count) / last


def peak(best: int) -> Rate:
    return lambda count: 100.0 * (1 - 0.1 * abs(count - best))


@pytest.mark.parametrize("best", range(1, 9))
def test_it_climbs_to_the_best_and_stays(best: int) -> None:
    simulated = Simulated(peak(best))
    simulated.run(6000)
    assert simulated.share(best, 2000) > 0.85


@pytest.mark.parametrize("best", [1, 4])
def test_noise_below_the_margin_does_not_move_it_far(best: int) -> None:
    simulated = Simulated(peak(best), noise=0.05)
    simulated.run(6000)
    assert simulated.share(best, 2000) > 0.7


def test_a_flat_throughput_keeps_one() -> None:
    simulated = Simulated(lambda count: 100.0 + 0.1 * count)
    simulated.run(4000)
    assert simulated.share(1, 2000) > 0.85, "more micro-batches that gain nothing are not taken"


def test_tries_in_vain_become_rare() -> None:
    simulated = Simulated(peak(1))
    simulated.run(20_000)
    tries = [i for i, (a, b) in enumerate(zip(simulated.used, simulated.used[1:], strict=False)) if a == 1 and b == 2]
    gaps = np.diff(tries)
    assert gaps[0] < 3 * FIRST_WAIT * TURNS
    assert gaps[-1] >= LONGEST_WAIT * TURNS
    assert (np.diff(gaps) >= -TURNS).all()


def test_it_follows_a_change_of_the_best() -> None:
    simulated = Simulated(peak(2))
    simulated.run(3000)
    simulated.rate = peak(4)
    simulated.run(6000)
    assert simulated.share(4, 2000) > 0.8


def test_another_load_starts_again_at_once() -> None:
    simulated = Simulated(peak(1))
    simulated.run(20_000)
    simulated.rate, simulated.load = peak(3), 100
    simulated.run(20 * TURNS)
    assert simulated.share(3, 5) == 1.0


def test_it_goes_down_as_straight_as_up() -> None:
    simulated = Simulated(peak(8))
    simulated.run(3000)
    simulated.rate, simulated.load = peak(1), 100
    simulated.run(sum((TURNS + 1) * count for count in range(1, 9)) + TURNS * 8)
    assert simulated.micro.count <= 2


def test_no_more_micro_batches_than_requests() -> None:
    simulated = Simulated(peak(8), load=3)
    simulated.run(3000)
    assert max(simulated.used) == 3


def test_the_first_turn_after_a_change_does_not_count() -> None:
    micro, now, used = MicroBatches(0), 0.0, []
    before, fresh = 1, 0
    for _ in range(600):
        count = micro.count
        fresh = count if count != before else fresh - 1
        now += 100.0 if fresh > 0 else 1.0 / count  # a change costs a fortune, in each micro-batch once
        before = count
        micro.note(10, 32, now)
        used.append(count)
    assert max(used) == 8, "a change was held against the number that it led to"


def test_a_fixed_number_stays() -> None:
    micro = MicroBatches(3)
    for step in range(200):
        micro.note(10, 32, float(step))
        assert micro.count == 3
