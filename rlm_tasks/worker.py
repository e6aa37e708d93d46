"""What a worker's main process does for its pool: leases, lost nodes, free slots, the sweep.

Decides when a lease is beaten, when a node is given back, and which slots are on offer.  Pool processes never
beat, so an item that holds the interpreter for minutes runs once.  Refuses to know what nodes compute.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import billiard.pool
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery import bootsteps, signals
from celery.worker import state
from celery.worker.request import Request
from redis.exceptions import RedisError

from resilience.errors import StoreUnavailable
from rlm_tasks.dispatch import NODE_TASK
from rlm_tasks.page import Held
from rlm_tasks.runtime import Runtime

logger = logging.getLogger(__name__)

SETTLE_S = 0.005
"""A slot that stays free this long is on offer; between two small nodes it is free for less."""
REFRESH_S = 1.0
"""How often the guard looks by itself.  It otherwise wakes on events: ticking every 10 ms slowed computing
pool processes on two busy cores by 7 % (measured)."""
BACK_OFF_S = 1.0


class Guard(threading.Thread):
    """The thread of a worker's main process that speaks to the ledger."""

    def __init__(self, runtime: Runtime, pool_size: Callable[[], int], queues: Callable[[], list[str]]) -> None:
        super().__init__(name="rlm-guard", daemon=True)
        self._runtime, self._pool_size, self._queues = runtime, pool_size, queues
        self._stopping = False
        self._woken = threading.Event()
        self._offered: tuple[int, int] | None = None
        self._due = {"offer": 0.0, "beat": 0.0, "sweep": 0.0}
        self._lost = False

    def run(self) -> None:
        """Tick on each event and once a second until stopped."""
        while not self._stopping:
            if self._woken.wait(self._sleep_s()):
                self._woken.clear()
                time.sleep(SETTLE_S)
            try:
                self._tick(time.monotonic())
                self._lost = False
            except (RedisError, StoreUnavailable, OSError) as error:
                if not self._lost:
                    logger.warning("The ledger does not answer: %s", error)
                self._lost, self._offered = True, None

    def wake(self) -> None:
        """Say that a slot became free or busy."""
        self._woken.set()

    def _sleep_s(self) -> float:
        return min(REFRESH_S, max(0.0, min(self._due.values()) - time.monotonic())) if not self._lost else BACK_OFF_S

    def stop(self) -> None:
        """End the thread and take this worker's slots off the board."""
        self._stopping = True
        self._woken.set()
        self.join(timeout=5)
        try:
            self._runtime.slots.withdraw(self._runtime.worker)
        except (RedisError, OSError) as error:
            logger.info("Slots were not withdrawn, they expire: %s", error)

    def _tick(self, now: float) -> None:
        ledger = self._runtime.settings.ledger
        self._offer(now)
        if now >= self._due["beat"]:
            self._due["beat"] = now + ledger.lease_s / 3
            self._runtime.ledger.beat([(held.job, held.node, held.epoch) for held in self._runtime.page.held()])
        if now >= self._due["sweep"]:
            self._due["sweep"] = now + ledger.sweep_s
            self._sweep()
        self._kill_overdue(now)

    def _offer(self, now: float) -> None:
        total = self._pool_size()
        free = 0 if self._runtime.page.draining else max(0, total - len(state.reserved_requests))
        if (total, free) != self._offered or now >= self._due["offer"]:
            self._runtime.slots.publish(self._runtime.worker, total, free, self._queues())
            self._runtime.page.hungry = free > 0
            self._offered, self._due["offer"] = (total, free), now + REFRESH_S

    def _sweep(self) -> None:
        for job in self._runtime.ledger.overdue():
            swept = self._runtime.ledger.sweep(job)
            if swept.send:
                logger.info("Job %s: %d overdue nodes are sent again", job, len(swept.send))
                self._runtime.resend(job, swept.send)

    def _kill_overdue(self, now: float) -> None:
        limit = self._runtime.settings.node.item_limit_s
        if not limit:
            return
        for held in self._runtime.page.held():
            if now - held.since > limit and held.item >= 0:
                logger.error("Item %d of job %s ran longer than %g s; its process is killed", held.item, held.job, limit)
                give_back(self._runtime, held, deaths=self._runtime.settings.ledger.death_limit)
                os.kill(held.pid, signal.SIGKILL)


def give_back(runtime: Runtime, held: Held, *, deaths: int = 1) -> None:
    """RELEASE a node whose process is gone or about to go; its next claim knows the item that was in flight."""
    try:
        runtime.ledger.hasty().release(held.job, held.node, held.epoch, held.item, deaths)
    except (RedisError, StoreUnavailable, OSError) as error:
        logger.warning("Node %s of job %s was not given back, its lease runs out: %s", held.node, held.job, error)
    runtime.page.forget(held.pid)


class GuardStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Run the guard while the worker consumes."""

    requires = {"celery.worker.consumer.tasks:Tasks"}

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._guard: Guard | None = None
        super().__init__(consumer, **options)

    def start(self, consumer: Any) -> None:
        """Start with each (re)connection of the consumer."""
        runtime: Runtime = consumer.app.rlm_runtime()
        self._guard = Guard(
            runtime,
            lambda: consumer.pool.num_processes or 1,
            lambda: [queue.name for queue in consumer.task_consumer.queues] if consumer.task_consumer else [],
        )
        consumer.app.rlm_guard = self._guard
        self._guard.start()

    def stop(self, consumer: Any) -> None:
        """Stop on shutdown and before a reconnection."""
        if self._guard is not None:
            consumer.app.rlm_guard = None
            self._guard.stop()
            self._guard = None


def leave_promptly() -> None:
    """Let a pool process leave without waiting 30 s for receipts that nobody will write.

    A message that was handed to a pool process but not yet accepted when the worker is told to stop is dropped
    from billiard's cache, so its result is never counted, and the process waits for that count (billiard 4.3).
    The ledger needs no receipt: unacknowledged messages return to their queue, and a claim answers `done`.
    """
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 5  # times 0.1 s


def drain_on_shutdown(runtime: Callable[[], Runtime]) -> None:
    """Make running nodes cut at their next slice once this worker is told to stop."""

    def draining(**_: Any) -> None:
        runtime().page.draining = True

    signals.worker_shutting_down.connect(draining, weak=False)


def _has_exited(pid: int | None) -> bool:
    """Whether a pool process is gone, reaped or not."""
    if pid is None:
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


class NodeRequest(Request):  # type: ignore[misc]  # Celery ships no types
    """A node's message in the main process, which knows at once when its pool process is free, or gone."""

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A slot is busy."""
        super().on_accepted(pid, time_accepted)
        self._wake_guard()

    def acknowledge(self) -> None:
        """A slot is free: nodes are acknowledged when they end."""
        super().acknowledge()
        self._wake_guard()

    def _wake_guard(self) -> None:
        guard: Guard | None = getattr(self._app, "rlm_guard", None)
        if guard is not None:
            guard.wake()

    def on_failure(self, exc_info: ExceptionInfo, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Give the node back when its process was lost; the message is requeued by Celery."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, WorkerLostError | SystemExit):
            self._give_back(deaths=1)
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Fail the item that ran into Celery's hard time limit, and redo the rest of its node.

        Celery notices a lost process within 5 s, so the limit may strike first; that is a death like others.
        """
        if soft:
            super().on_timeout(soft, timeout)
            return
        state.task_ready(self)
        logger.error("Hard time limit (%ss) exceeded for %s[%s]", timeout, self.name, self.id)
        self._give_back(deaths=1 if _has_exited(self.worker_pid) else self._runtime.settings.ledger.death_limit)
        self.reject(requeue=True)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """A revoked node cancels its job: the chord hears nothing, the ledger everything."""
        state.task_ready(self)
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
        self.acknowledge()
        self._already_revoked = True
        self._give_back(deaths=0)
        if self.name == NODE_TASK:
            try:
                self._runtime.ledger.hasty().stop(self._job, "cancelled", detail=f"a node's task was {reason}")
            except (RedisError, StoreUnavailable, OSError) as error:
                logger.warning("Job %s was not cancelled: %s", self._job, error)

    @property
    def _runtime(self) -> Runtime:
        return self._app.rlm_runtime()  # type: ignore[no-any-return]  # set by install

    @property
    def _job(self) -> str:
        return str(self._args[0] if self._args else self._payload[0][0])

    def _give_back(self, *, deaths: int) -> None:
        for held in self._runtime.page.held():
            if held.pid == self.worker_pid and held.job == self._job:
                give_back(self._runtime, held, deaths=deaths)
