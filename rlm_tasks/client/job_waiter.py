"""Wait for a job: watch its progress, or block until it has ended.

`Job` extends it.  It waits on the job's event stream in Redis, and through outages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from redis.exceptions import ResponseError

from resilience.connections import LOST
from resilience.errors import StoreUnavailable, refuse_unless_seconds
from rlm_tasks.client.job_reader import Facts, JobReader
from rlm_tasks.client.session import Session
from rlm_tasks.errors import InvalidRequest, ResultTimeout
from rlm_tasks.results import JobEvent, Progress, Status

_T = TypeVar("_T")
_BLOCK_MS = 1000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class JobWaiter(JobReader):
    """A job that can be waited for."""

    def __init__(self, session: Session, job_id: str) -> None:
        super().__init__(session, job_id)
        self._last_event = b"0-0"

    def watch(self, interval_s: float = 0.2) -> Iterator[Progress]:
        """Yield the progress until the job has ended; the last one is final.

        `interval_s` is the longest time between two, in seconds; an event of the job yields one at
        once.  The method waits through outages of Redis.  Raises JobNotFound.
        """
        refuse_unless_seconds("interval_s", interval_s, InvalidRequest)
        while True:
            progress = self._through_outages(self.progress, None)
            yield progress
            if progress.status.final:
                return
            self._wait_for_event(min(interval_s, _BLOCK_MS / 1000))

    def follow(self) -> Iterator[JobEvent]:
        """Yield the job's newest thousand events, the oldest first, then new ones until it ends.

        The method waits through outages of Redis.  Raises JobNotFound.
        """
        last = ""
        for _ in self.watch(_BLOCK_MS / 1000):
            for event in self._through_outages(partial(self._ledger.events, self.id, last), None):
                last = event.id
                yield event

    def wait(self, timeout: float | None = None) -> Status:
        """Wait for the end and return the final status.

        Raises ResultTimeout, JobNotFound, and InvalidRequest for a `timeout` that is no number.
        """
        refuse_unless_seconds("timeout", timeout, InvalidRequest)
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            facts = self._through_outages(self._facts, until)
            if Status(facts["state"]).final:
                return Status(facts["state"])
            left_s = _BLOCK_MS / 1000 if until is None else until - time.monotonic()
            if left_s <= 0:
                raise ResultTimeout(self.id, timeout or 0.0)
            deadline = _first_deadline(facts)
            if deadline and (due_in_s := (deadline - self._now_ms()) / 1000) <= left_s:
                self._wait_until_expired(max(0.0, due_in_s), facts)
            else:
                self._wait_for_event(left_s)

    def _through_outages(self, read: Callable[[], _T], until: float | None) -> _T:
        """Repeat a read until Redis answers.

        Raises StoreUnavailable after the time `until`, and at once when waiting does not help, as
        with a wrong password.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return read()
            except StoreUnavailable as error:
                late = until is not None and time.monotonic() + pause_s > until
                if late or not error.retryable:
                    raise
                time.sleep(pause_s)
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)

    def _wait_for_event(self, seconds: float) -> None:
        """Wait for the next event of the job; none is missed between two calls."""
        block_ms = max(1, int(min(_BLOCK_MS, seconds * 1000)))
        streams: Any = {self._keys.events: self._last_event}
        with self._session.listeners.one_for(self.id, block_ms / 1000) as listens:
            if not listens:
                return
            try:
                answer: Any = self._session.store.client.xread(streams, block=block_ms)
            except (*LOST, ResponseError):
                time.sleep(min(0.2, seconds))
                return
        for _, entries in answer or ():
            self._last_event = entries[-1][0]

    def _wait_until_expired(self, due_in_s: float, facts: Facts) -> None:
        """Wait for the deadline, then end the job from here, in case that no worker is alive."""
        if due_in_s > 0:
            self._wait_for_event(due_in_s)
            return
        now_ms = self._now_ms()
        # A job that merges gets the grace from its deadline on: no worker may be there to stop it.
        began_ms = facts["deadline"] if facts["state"] == Status.MERGING else now_ms
        since_s = (now_ms - int(facts.get("stop_ms", began_ms))) / 1000
        force = since_s > self._session.settings.ledger.stop_grace_s
        for id in (self.id, *(id for id, _ in self._rounds(facts))):
            self._ledger.stop(id, "expired", force=force)
        self._wait_for_event(0.1)


def _first_deadline(facts: Facts) -> int:
    """Return the ms at which a job expires if nothing changes; 0: it does not."""
    deadline, start_by = int(facts["deadline"]), int(facts.get("start_by", 0))
    waits = start_by if facts["state"] == Status.PENDING else 0
    return min(filter(None, (deadline, waits)), default=0)
