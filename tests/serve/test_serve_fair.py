"""The queue before the engine: turns between tenants, order within one, a bound for all."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from steeple.serve.fair import FairQueue


@dataclass(frozen=True)
class Waiting:
    tenant: str
    number: int


def test_tenants_take_turns() -> None:
    queue: FairQueue[Waiting] = FairQueue(10)
    assert queue.put([Waiting("a", i) for i in range(4)])
    assert queue.put([Waiting("b", i) for i in range(2)])
    assert queue.put([Waiting("c", 0)])
    taken = [(job.tenant, job.number) for job in queue.take(6)]
    assert taken == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert queue.tenants == {"a": 1}


def test_turns_go_on_where_they_were() -> None:
    queue: FairQueue[Waiting] = FairQueue(10)
    queue.put([Waiting("a", i) for i in range(3)])
    queue.put([Waiting("b", i) for i in range(3)])
    assert [job.tenant for _ in range(6) for job in queue.take(1)] == ["a", "b"] * 3


def test_all_or_none_get_in() -> None:
    queue: FairQueue[Waiting] = FairQueue(3)
    assert queue.put([Waiting("a", 0), Waiting("a", 1)])
    assert not queue.put([Waiting("b", 0), Waiting("b", 1)])
    assert len(queue) == 2
    assert queue.put([Waiting("b", 2)])


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.sampled_from("abc"), st.integers(1, 3)),
            st.tuples(st.just("take"), st.just(""), st.integers(0, 4)),
            st.tuples(st.just("remove"), st.sampled_from("abc"), st.integers(0, 20)),
        )
    )
)
def test_nothing_is_lost_or_served_twice(actions: list[tuple[str, str, int]]) -> None:
    queue: FairQueue[Waiting] = FairQueue(8)
    waiting: list[Waiting] = []
    number = 0
    for action, tenant, count in actions:
        if action == "put":
            jobs = [Waiting(tenant, number + i) for i in range(count)]
            number += count
            fits = len(waiting) + count <= 8
            assert queue.put(jobs) is fits
            waiting += jobs if fits else []
        elif action == "remove":
            assert queue.remove(Waiting(tenant, count)) is (Waiting(tenant, count) in waiting)
            waiting = [job for job in waiting if job != Waiting(tenant, count)]
        else:
            taken = queue.take(count)
            assert len(taken) == min(count, len(waiting))
            for job in taken:  # the oldest of its tenant
                assert job == next(one for one in waiting if one.tenant == job.tenant)
                waiting.remove(job)
        assert len(queue) == len(waiting) == sum(queue.tenants.values())
