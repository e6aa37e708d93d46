"""Pool processes that run for too long: their end, and the end of their item or of their job.

The supervisor calls it once a second.  It is the last means against code that hangs: it also ends
code outside of Python, which no signal handler interrupts.  Begin with `OverdueProcesses.end`.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

import redis

from resilience.errors import CallTimeout
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.engine.shared_page import NO_ITEM, Held
from rlm_tasks.jobs.item_failures import failure_of
from rlm_tasks.results import Status
from rlm_tasks.worker.lost_nodes import give_back

logger = logging.getLogger(__name__)

ALARM_GRACE_S, ALARM_GRACE_SHARE = 1.0, 0.05
"""An item past its limit has this long to react to its alarm, before its process is killed.

The greater of the seconds and the share of the limit counts.
"""
ENDED_GRACES = 2
"""A process may go on for this many stop graces after the end of its job."""


class OverdueProcesses:
    """The pool processes of one worker whose item, step or job has taken too long."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._ledger = runtime, runtime.ledger.fail_fast()
        self._ended_at: dict[str, float] = {}  # token -> when its job was found to have ended

    def end(self, now: float) -> None:
        """Kill processes that exceed a time limit, and those whose job ended some time ago."""
        at_work = [
            held
            for held in self._runtime.page.held()
            if held.item != NO_ITEM and held.pid != os.getpid()
        ]
        overdue = [held for held in at_work if _is_overdue(held, now)]
        for held in overdue:
            if held.step is None:
                self._end_item(held)
            else:
                self._end_step(held)
        self._end_forgotten([held for held in at_work if held not in overdue], now)

    def _end_item(self, held: Held) -> None:
        """Kill a process whose item does not react to its alarm; the item does not run again."""
        logger.error(
            "An item of job %s ran longer than %g s; its process is killed", held.job, held.limit_s
        )
        self._kill(held, f"its item limit of {held.limit_s:g} s", condemned=True)

    def _end_step(self, held: Held) -> None:
        """Kill a process whose step hangs; it would hang again, so its job fails."""
        assert held.step is not None
        error = CallTimeout(held.step.words, held.limit_s)
        logger.error("Job %s fails, and a process is killed: %s", held.job, error)
        self._kill(held, f"the limit of {held.limit_s:g} s for {held.step.words}")
        self._ledger.stop(held.job, "failed", detail=str(error), error=failure_of(-1, error))

    def _end_forgotten(self, at_work: Sequence[Held], now: float) -> None:
        """Kill processes that still work for a job that has ended: nobody waits for them."""
        grace_s = self._runtime.settings.ledger.stop_grace_s
        long = [held for held in at_work if now - held.since > grace_s]
        states = self._states([held.job for held in long]) if long else []
        ended = [held for held, state in zip(long, states, strict=True) if state.final]
        self._ended_at = {held.token: self._ended_at.get(held.token, now) for held in ended}
        for held in ended:
            if now - self._ended_at[held.token] >= ENDED_GRACES * grace_s:
                logger.error(
                    "A process still works for job %s, which has ended; it is killed", held.job
                )
                self._kill(held, "the end of its job")

    def _states(self, jobs: Sequence[str]) -> list[Status]:
        """Return the states of jobs; one that is not known is taken for running."""
        keys = self._ledger.keys

        def read(client: redis.Redis) -> list[bytes | None]:
            pipe = client.pipeline(transaction=False)
            for job in jobs:
                pipe.hget(keys.of(job).job, "state")
            return pipe.execute()

        found = self._ledger.call(read)
        return [Status(each.decode()) if each else Status.RUNNING for each in found]

    def _kill(self, held: Held, why: str, *, condemned: bool = False) -> None:
        """Give a node back, kill its process, and send the node again if it waits."""
        given_back = give_back(self._runtime, held, why, condemned=condemned)
        os.kill(held.pid, signal.SIGKILL)
        if given_back:
            self._runtime.delivery.resend(held.job, [held.node])


def _is_overdue(held: Held, now: float) -> bool:
    """Whether a step or an item is past its limit; an item has some time to react to its alarm."""
    grace_s = max(ALARM_GRACE_S, ALARM_GRACE_SHARE * held.limit_s) if held.step is None else 0.0
    return bool(held.limit_s) and now - held.since > held.limit_s + grace_s
