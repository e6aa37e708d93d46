"""The supervisor: the thread of a worker's main process that cares for the pool's nodes.

It renews leases, gives back lost nodes, offers free slots, sweeps and drains.  Pool processes do
not renew leases, so an item that holds the interpreter for minutes runs once.  `bootsteps` starts
it.  Begin with `Supervisor.run`, then `_tick`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
from celery.worker import state
from redis.exceptions import ResponseError

from resilience.connections import RecordUnreadable
from resilience.store import Call
from resilience.validation import tell_unreadable
from rlm_tasks.engine.node import release
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.errors import JobUnreadable
from rlm_tasks.ledger.records import SWEEP_AT_ONCE
from rlm_tasks.worker.host import Host
from rlm_tasks.worker.lost_nodes import REAPED, UNREACHABLE, cause_of_death, give_back
from rlm_tasks.worker.overdue import OverdueProcesses
from rlm_tasks.worker.preflight import warnings
from rlm_tasks.worker.revocations import Revocations
from scheduler.preemption import rank_of
from scheduler.queues import priority_of

logger = logging.getLogger(__name__)

SETTLE_S = 0.005
"""A slot is offered when it stays free this long: between two small nodes it is free for less."""
REFRESH_S = 1.0
"""The time between two regular ticks.

Between them the supervisor wakes on events.  Ticks every 10 ms slowed computing pool processes on
two busy cores by 7 % (measured).
"""
BACK_OFF_S = 1.0
"""The time between two ticks while the ledger does not answer."""
REAPED_S = 2.0
"""Celery reports the cause of a process's death within this time of having reaped it."""
SWEEPS_IN_A_ROW = 10
"""A job with more overdue nodes than these sweeps send is swept again at a later tick.

Leases are renewed in between.
"""
MOST_BROKEN = 1000
"""Jobs that cannot be swept are remembered up to this number, so that each is logged once."""
TRIM_S = 60.0
"""The time between two calls that remove expired jobs from the list of jobs."""


class Supervisor(threading.Thread):
    """The thread of a worker's main process that speaks to the ledger.

    It lives as long as the pool: also while the consumer reconnects, and while a stopping worker
    waits for its last items.
    """

    def __init__(
        self,
        runtime: Runtime,
        celery: Mapping[str, Any],
        pool_size: Callable[[], int],
        queues: Callable[[], list[str]],
        exit_code: Callable[[int], int | None] = lambda _pid: None,
        wake_loop: Callable[[], object] = lambda: None,
    ) -> None:
        """Make the supervisor of one worker; `celery` is the app's configuration.

        The function `exit_code` returns the exit code of a process that billiard has reaped, None
        otherwise.  The function `wake_loop` makes the event loop go round.  On its own the loop may
        need a second to see that the worker has to stop.
        """
        super().__init__(name="rlm-supervisor", daemon=True)
        self._runtime, self._clock, self._celery = runtime, runtime.clock, celery
        self._pool_size, self.queues = pool_size, queues
        self._exit_code, self._wake_loop = exit_code, wake_loop
        # Calls fail at once while Redis is away; the next ticks catch up.
        self._ledger = runtime.ledger.fail_fast()
        broker = str(celery.get("broker_url") or "")
        self.host = Host(runtime, pool_size, queues, broker=broker)
        self.revocations = Revocations(runtime)
        self._overdue = OverdueProcesses(runtime)
        self._stopping = False
        # An Event would lock up when a signal's handler sets it while it is being set.
        self._wakeups: SimpleQueue[None] = SimpleQueue()
        names = ("measure", "exchange", "offer", "processes", "beat", "sweep", "trim")
        self._due = dict.fromkeys(names, 0.0)
        self._broken_jobs: dict[str, None] = {}
        self._sweep_not_before = 0.0
        self._ledger_away = False
        self._settings_checked = False
        self._offered: tuple[int, int] | None = None  # all slots and free slots, as published
        self._reaped_at: dict[int, float] = {}  # pid -> when it was found reaped, cause unknown
        self._given_back: dict[int, str] = {}  # pid -> token of a node that its process gave up
        self._announced = 0  # ranks of urgent work announced since the last exchange began
        # Times of the last tick, and of the last tick at which the ledger answered.
        self.ticked_at = self.answered_at = self._clock()

    def run(self) -> None:
        """Tick on each event, when a job is due, and once a second, until stopped."""
        while not self._stopping:
            with suppress(Empty):
                self._wakeups.get(timeout=self._sleep_s())
                time.sleep(SETTLE_S)
                while True:  # one tick serves all wake-ups until now
                    self._wakeups.get_nowait()
            try:
                if self._runtime.page.draining:
                    self._wake_loop()
                self._tick(self._clock())
                self._ledger_away, self.answered_at = False, self._clock()
            except RecordUnreadable as error:
                tell_unreadable("a record that the supervisor needs", error.cause)
            except UNREACHABLE as error:
                if not self._ledger_away:
                    logger.warning("The ledger does not answer, so work waits: %s", error)
                self._ledger_away, self._offered, self._due["beat"] = True, None, 0.0
            except Exception:
                logger.exception("The supervisor met an unexpected error, and continues")
            self.ticked_at = self._clock()

    def wake(self) -> None:
        """Tick soon: a slot became free or busy, or the worker drains."""
        self._wakeups.put(None)

    def begin(self) -> None:
        """Offer slots and report at once the queues that are now consumed, not a second later."""
        self._offered, self._due["exchange"] = None, 0.0
        self.wake()

    def drain(self, queues: list[str]) -> None:
        """Make running nodes hand over, and offer no slot, until `resume`.

        `queues` are the queues that the worker no longer consumes.
        """
        self.host.drained += [each for each in queues if each not in self.host.drained]
        self._runtime.page.draining = True
        self.wake()

    def resume(self) -> list[str]:
        """Offer slots again; return the queues that are to be consumed again."""
        queues, self.host.drained = self.host.drained, []
        if queues:
            self._runtime.page.draining = False
            self.wake()
        return queues

    def make_room(self, queue: str) -> bool:
        """Make running nodes ask whether to yield to urgent work in a queue.

        Return False when this worker does not serve the queue.
        """
        if queue not in self.queues():
            return False
        self._announced |= rank_of(priority_of(queue))
        self._runtime.page.urgent |= rank_of(priority_of(queue))
        self._runtime.page.recall()
        return True

    def _sleep_s(self) -> float:
        if self._ledger_away:
            return BACK_OFF_S
        return min(REFRESH_S, max(0.0, min(self._due.values()) - self._clock()))

    def stop(self) -> None:
        """End the thread, and withdraw this worker's slots and its host report."""
        self._stopping = True
        self._wakeups.put(None)
        self.join(timeout=5)
        try:
            self._runtime.slots.withdraw(self._runtime.worker)
            self._runtime.board.withdraw(self._runtime.worker)
        except UNREACHABLE as error:
            logger.info("The slots of this worker were not withdrawn; they expire: %s", error)

    def _tick(self, now: float) -> None:
        ledger = self._runtime.settings.ledger
        if now >= self._due["measure"]:
            self._due["measure"] = now + REFRESH_S
            self.host.measure(now)
        if self._ledger_away:
            # Leases ran out while Redis was away: give each worker the time to renew its own.
            self._sweep_not_before = now + ledger.lease_s / 3
        if not self._settings_checked:
            self._check_settings()
        self._offer(now)
        if now >= self._due["exchange"]:
            self._due["exchange"] = now + REFRESH_S
            self._exchange(now)
        self.revocations.apply()
        if now >= self._due["processes"]:
            self._due["processes"] = now + REFRESH_S
            self._reap(now)
            self._overdue.end(now)
        if now >= self._due["beat"]:
            self._due["beat"] = now + ledger.lease_s / 3
            self._ledger.beat(
                [
                    (held.job, held.node, held.token)
                    for held in self._runtime.page.held()
                    if not held.given_up
                ]
            )
        if now >= self._due["sweep"]:
            self._due["sweep"] = now + ledger.sweep_s
            self._sweep()
            self._plan_sweep(*self._ledger.store.call(self._ledger.due.first()))
        if now >= self._due["trim"]:
            self._due["trim"] = now + TRIM_S
            self._ledger.job_list.trim()

    def _check_settings(self) -> None:
        """Log a warning for each setting that loses data or repeats work."""
        for each in warnings(self._ledger.store, self._runtime.settings, self._celery):
            logger.warning("%s", each)
        self._settings_checked = True

    def _offer(self, now: float) -> None:
        """Publish this worker's slots, and read in the same round trip when the next job is due."""
        total = 0 if self._runtime.page.draining else self._pool_size()
        free = max(0, total - len(state.reserved_requests))
        if (total, free) != self._offered or now >= self._due["offer"]:
            offer = self._runtime.slots.publish(self._runtime.worker, total, free, self.queues())
            _, next_ms = self._ledger.store.call(offer, self._ledger.due.first())
            self._plan_sweep(next_ms)
            self._runtime.page.hungry = free > 0
            self._offered, self._due["offer"] = (total, free), now + REFRESH_S

    def _exchange(self, now: float) -> None:
        """Publish the host report, and read the orders and the urgent work, in one round trip.

        Once a second suffices, although slots become free more often.
        """
        self._announced, calls = 0, self.host.board_calls()
        answers = self._ledger.store.call(*calls, *self._tokens())
        self.host.receive(answers[: len(calls)], now)
        self._set_urgent(answers[len(calls) :])

    def _tokens(self) -> list[Call]:
        """Return the calls that count the open tokens of each queue with a rank."""
        return [
            self._runtime.preemption.open(queue)
            for queue in self.queues()
            if rank_of(priority_of(queue))
        ]

    def _set_urgent(self, tokens: Sequence[int]) -> None:
        """Write the ranks with waiting urgent work into the page, by the open tokens of each queue.

        So urgent work is found without an announcement, and forgotten when none waits.  Ranks that
        were announced during the exchange are kept.
        """
        served = [
            rank_of(priority_of(queue)) for queue in self.queues() if rank_of(priority_of(queue))
        ]
        urgent = sum(rank for rank, waiting in zip(served, tokens, strict=False) if waiting)
        if urgent & ~self._runtime.page.urgent:
            self._runtime.page.recall()
        self._runtime.page.urgent = urgent
        if self._announced:
            self._runtime.page.urgent |= self._announced

    def _plan_sweep(self, next_ms: int) -> None:
        """Sweep when the first job is due, in `next_ms`: a parked node waits for an exact time."""
        if next_ms >= 0:
            at = min(self._due["sweep"], self._clock() + next_ms / 1000)
            self._due["sweep"] = max(self._sweep_not_before, at)

    def _reap(self, now: float) -> None:
        """Give back the nodes of dead pool processes at once: Celery may need 5 s to notice."""
        for held in self._runtime.page.held():
            died_of = cause_of_death(held.pid) if held.pid != os.getpid() else ""
            if died_of == REAPED:
                died_of = self._reaped_by_pool(held.pid)
            if died_of == REAPED and now - self._reaped_at.setdefault(held.pid, now) < REAPED_S:
                continue  # Celery has noticed the death, and will report its cause
            if died_of:
                logger.warning(
                    "Pool process %d died of %s; node %s of job %s will run in another process",
                    held.pid,
                    died_of,
                    held.node,
                    held.job,
                    extra={"job": held.job, "node": held.node},
                )
                self._reaped_at.pop(held.pid, None)
                self._given_back.pop(held.pid, None)
                if give_back(self._runtime, held, died_of):
                    self._runtime.delivery.resend(held.job, [held.node])
            elif held.given_up and self._given_back.get(held.pid) != held.token:
                # Only its living process writes the entry, so the entry stays.
                release(self._runtime, self._ledger, held.job, held.node, held.token)
                self._given_back[held.pid] = held.token

    def _reaped_by_pool(self, pid: int) -> str:
        """Return the cause of death of a process that billiard has reaped.

        billiard reaps dead processes also when it starts another one; Celery may need 5 s to
        notice such a death.
        """
        code = self._exit_code(pid)
        if code is None:
            return REAPED
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _sweep(self) -> None:
        """Recover the overdue nodes of the jobs that are due, a bounded number of each."""
        sweep_ms = int(self._runtime.settings.ledger.sweep_s * 1000)
        for job in self._ledger.due.take(SWEEP_AT_ONCE, sweep_ms):
            try:
                self._sweep_job(job)
            except (JobUnreadable, ResponseError, msgspec.MsgspecError, ValueError, LookupError):
                # One job with broken records must not stop the recovery of all others.
                if job not in self._broken_jobs:
                    self._broken_jobs[job] = None
                    logger.exception("Job %s cannot be swept; other jobs are", job)
                if len(self._broken_jobs) > MOST_BROKEN:
                    del self._broken_jobs[next(iter(self._broken_jobs))]

    def _sweep_job(self, job: str) -> None:
        for _ in range(SWEEPS_IN_A_ROW):
            swept = self._ledger.sweep(job)
            if swept.send:
                logger.info("Job %s: %d overdue nodes are sent again", job, len(swept.send))
                self._runtime.delivery.resend(job, swept.send)
            if not swept.more:
                return
