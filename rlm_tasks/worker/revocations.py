"""Jobs whose id was revoked by Celery: the worker cancels them.

After a job has fanned out, no message has its id, so Celery finds nothing to revoke.  `control`
adds the ids, the supervisor applies them.  Begin with `Revocations.apply`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

from resilience.connections import RecordUnreadable
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.errors import JobUnreadable
from rlm_tasks.ledger.round_ids import opened_rounds
from rlm_tasks.messaging.dispatch import is_id
from rlm_tasks.results import Status

logger = logging.getLogger(__name__)

BY = "a revoke of Celery"
"""The name that a revoked job has for its canceller: Celery tells no other."""
AT_ONCE, MOST_WAITING = 500, 100_000


class Revocations:
    """The revoked ids that this worker has not compared with the ledger yet."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._ledger = runtime, runtime.ledger.fail_fast()
        self._ids: deque[str] = deque(maxlen=MOST_WAITING)

    def add(self, ids: Iterable[object]) -> None:
        """Note revoked ids of tasks or jobs; this does not wait."""
        self._ids.extend(each for each in ids if isinstance(each, str) and is_id(each))

    def apply(self) -> None:
        """Cancel the jobs among the ids; an id of a task is left to Celery.

        Raises the errors of the ledger; then the rest of the ids waits for the next call.
        """
        while self._ids:
            ids = [self._ids[at] for at in range(min(AT_ONCE, len(self._ids)))]
            for job in self._ledger.job_list.known(ids):
                try:
                    self._cancel(job)
                except (JobUnreadable, RecordUnreadable) as error:
                    logger.warning("Job %s was revoked, but not cancelled: %s", job, error)
            for _ in ids:
                self._ids.popleft()

    def _cancel(self, job: str) -> None:
        before = self._ledger.facts(job).get("state", "")
        if before and Status(before).final and before != Status.CANCELLED:
            logger.warning("Job %s was revoked, but not cancelled: it has %s", job, before)
            return
        self._ledger.stop(job, "cancelled", detail="its id was revoked", by=BY)
        for round_, _ in opened_rounds(self._ledger, job):
            self._ledger.stop(round_, "cancelled", detail="its job was revoked", by=BY)
        self._runtime.page.recall()
        logger.info("Job %s is cancelled: its id was revoked", job)
