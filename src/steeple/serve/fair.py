"""What waits before the engine: a queue for each tenant, served in turns, and bounded in all."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar


class Waits(Protocol):
    """Whatever belongs to somebody."""

    @property
    def tenant(self) -> str: ...


J = TypeVar("J", bound=Waits)


class FairQueue(Generic[J]):
    """First come, first served within a tenant; between tenants one each in turn. Not thread-safe by itself.

    Args: size: most that may wait.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._queues: OrderedDict[str, deque[J]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def tenants(self) -> dict[str, int]:
        """How many wait for each tenant."""
        return {tenant: len(queue) for tenant, queue in list(self._queues.items())}

    def put(self, jobs: Sequence[J]) -> bool:
        """Queue all of them, or none if there is no room for all."""
        if self._length + len(jobs) > self.size:
            return False
        for job in jobs:
            self._queues.setdefault(job.tenant, deque()).append(job)
        self._length += len(jobs)
        return True

    def take(self, most: int) -> list[J]:
        """At most so many, a tenant after the other."""
        taken: list[J] = []
        while self._queues and len(taken) < most:
            tenant, queue = self._queues.popitem(last=False)
            taken.append(queue.popleft())
            if queue:
                self._queues[tenant] = queue  # to the end: it is the others' turn
        self._length -= len(taken)
        return taken

    def remove(self, job: J) -> bool:
        """Take one out, wherever it stands; False if it does not wait here."""
        queue = self._queues.get(job.tenant)
        if queue is None or job not in queue:
            return False
        queue.remove(job)
        if not queue:
            del self._queues[job.tenant]
        self._length -= 1
        return True
