"""The message of a node in a worker's main process, from its arrival to its acknowledgement.

`tasks` names `NodeRequest` as the request class of nodes and merges; Celery creates one for each
message.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery.worker import state
from celery.worker.request import Request

from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.messaging.dispatch import NODE_TASK, is_id
from rlm_tasks.worker.lost_nodes import REAPED, UNREACHABLE, cause_of_death, give_back
from rlm_tasks.worker.revocations import BY
from rlm_tasks.worker.supervisor import Supervisor

logger = logging.getLogger(__name__)


class NodeRequest(Request):  # type: ignore[misc]  # Celery ships no types
    """A request that reports at once when its pool process is busy, free or dead."""

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Note that a slot is busy."""
        super().on_accepted(pid, time_accepted)
        self._wake_supervisor()

    def acknowledge(self) -> None:
        """Note that a slot is free: a node is acknowledged when it ends."""
        super().acknowledge()
        self._wake_supervisor()

    def _wake_supervisor(self) -> None:
        supervisor: Supervisor | None = getattr(self._app, "rlm_supervisor", None)
        if supervisor is not None:
            supervisor.wake()

    def on_failure(
        self, exc_info: ExceptionInfo, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        """Give the node back when its process was lost; Celery requeues the message."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, WorkerLostError | SystemExit):
            named = re.search(r"SIG[A-Z0-9]+", str(error))
            self._give_back(named[0] if named else REAPED)
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Fail the item that exceeded Celery's hard time limit, and repeat the rest of its node.

        Celery notices a lost process within 5 s, so this may be called for a process that is dead
        already.  Then its node is given back as after any other death.
        """
        if soft:
            super().on_timeout(soft, timeout)
            return
        state.task_ready(self)
        logger.error("Hard time limit (%ss) exceeded for %s[%s]", timeout, self.name, self.id)
        died_of = cause_of_death(self.worker_pid) if self.worker_pid else ""
        self._give_back(died_of or f"the hard time limit of {timeout:g} s", condemned=not died_of)
        self.reject(requeue=True)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Mark the pool process, so that it takes the signal as meant for it alone."""
        if self.worker_pid:
            self._runtime.page.doom(self.worker_pid)
        super().terminate(pool, signal)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Cancel the job of a revoked node; its chord gets no error."""
        state.task_ready(self)
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
        self.acknowledge()
        self._already_revoked = True
        self._give_back("")
        if self.name == NODE_TASK:
            try:
                self._runtime.ledger.fail_fast().stop(
                    self._job, "cancelled", detail=f"a node's task was {reason}", by=BY
                )
            except UNREACHABLE as error:
                logger.warning("Job %s was not cancelled: %s", self._job, error)

    @property
    def _runtime(self) -> Runtime:
        return self._app.rlm_runtime()  # type: ignore[no-any-return]  # set by install

    @property
    def _job(self) -> str:
        """The id of the job; '' if the message names none."""
        try:
            job = self._args[0] if self._args else self._payload[0][0]
        except (LookupError, TypeError):
            return ""
        return job if is_id(job) else ""

    def _give_back(self, died_of: str, *, condemned: bool = False) -> None:
        for held in self._runtime.page.held():
            if held.pid == self.worker_pid and held.job == self._job:
                give_back(self._runtime, held, died_of, condemned=condemned)
