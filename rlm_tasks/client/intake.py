"""Open many jobs no faster than workers take them in.

`Submission.open` asks `Intake.room` before each part of a batch.  A batch that fits into one part,
such as a single job, costs no call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from resilience.bucket import ROUTER, TokenBucket

if TYPE_CHECKING:
    from rlm_tasks.client.session import Session

PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.1
"""The states of unclaimed jobs are read again after the first; each further pause is twice as long,
up to the longest.
"""


class Intake:
    """The intake of one batch.

    Where workers live, at most `RLM_BATCH__MAX_SIZE` of its jobs are open and unclaimed at once.
    The waits of one batch add up to at most `RLM_BATCH__WAIT_S`; then the rest is opened.
    """

    def __init__(
        self,
        session: Session,
        queues: Iterable[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._session, self._queues = session, frozenset(queues)
        self._clock, self._sleep = clock, sleep
        self._settings = session.settings.batch
        self._unclaimed: list[str] = []
        self._waited_s = 0.0

    def room(self, wanted: int) -> int:
        """Return the number of jobs to open now, at least 1; wait until workers have room.

        Raises StoreUnavailable.
        """
        size = self._size()
        count = min(wanted, self._free(size) if self._unclaimed else size)
        return self._paced(count) if self._settings.router else count

    def opened(self, jobs: Iterable[str]) -> None:
        """Remember jobs whose messages were sent."""
        self._unclaimed += jobs

    def _size(self) -> int:
        """Return the number of jobs of one part; the bound on unclaimed jobs limits it, too."""
        size = self._session.admission.batch_size()
        return min(size, self._settings.max_size) if self._has_workers() else size

    def _free(self, size: int) -> int:
        most, pause_s = min(size, self._settings.max_size), PAUSE_S
        while self._waited_s < self._settings.wait_s and self._has_workers():
            self._unclaimed = self._still_unclaimed()
            free = most - len(self._unclaimed)
            if free >= max(1, most // 2):
                return free
            began = self._clock()
            self._sleep(pause_s)
            self._waited_s += max(pause_s, self._clock() - began)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        return size

    def _has_workers(self) -> bool:
        """Whether a live worker consumes one of the batch's queues; at most 1 s old."""
        return any(self._session.admission.slots_of(queue) for queue in self._queues)

    def _still_unclaimed(self) -> list[str]:
        keys = self._session.keys

        def read(client: Any) -> list[bytes | None]:
            pipe = client.pipeline(transaction=False)
            for job in self._unclaimed:
                pipe.hget(keys.of(job).job, "state")
            found: list[bytes | None] = pipe.execute()
            return found

        states = self._session.store.call(read)
        return [job for job, at in zip(self._unclaimed, states, strict=True) if at == b"pending"]

    def _paced(self, count: int) -> int:
        """Take a number of jobs from the router's rate, which all clients share; wait for it."""
        bucket = TokenBucket(
            "submissions", self._session.shared, sleep=self._sleep, requests=ROUTER
        )
        count = min(count, int(ROUTER.capacity))
        while not (grant := bucket.acquire(requests=count, max_wait_s=self._settings.wait_s)):
            self._sleep(grant.wait_s)
        return count
