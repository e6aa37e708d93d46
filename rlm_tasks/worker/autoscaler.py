"""Celery's autoscaler with our decision in it: ``celery -A rlm_tasks worker --autoscale=8,2``.

Decides how a pool is made larger or smaller: no process is ever ended that has work, and a worker
takes no more messages than it has processes for.  Refuses to know how many there should be; that is
`PoolScaler`'s part."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.worker import state
from celery.worker.autoscale import Autoscaler

from resilience.degradation import Level
from scheduler.autoscale import PoolScaler

logger = logging.getLogger(__name__)

TICK_S = 1.0
"""How often the pool is looked at when no message comes; Celery's 30 s are too long for a host in
need.
"""


class PressureAutoscaler(Autoscaler):  # type: ignore[misc]  # Celery ships no types
    """Grows a prefork pool with the work that waits for it, and shrinks it under pressure and when
    it is idle.

    It runs in the event loop of the worker's main process, at every message and every second.
    """

    max_concurrency: int
    min_concurrency: int

    def __init__(
        self,
        pool: Any,
        most: int,
        least: int = 0,
        *,
        worker: Any,
        keepalive: float = TICK_S,
        mutex: Any = None,
    ) -> None:
        # With no process at all, messages would be taken that nobody runs.
        super().__init__(pool, most, max(1, least), worker=worker, keepalive=keepalive, mutex=mutex)
        self._scaler = PoolScaler()
        self._prefetch = most  # what Celery starts with

    @property
    def reach(self) -> int:
        """How many processes there may soon be: the slots to offer.  A pool that stops offers
        none.
        """
        if not self.pool.active:
            return 0
        return self._scaler.reach(
            running=self.processes, level=self._level, most=self.max_concurrency
        )

    def update(self, max: int | None = None, min: int | None = None) -> tuple[int, int]:
        """Set new bounds (``celery control autoscale``); the pool follows at the next tick."""
        self.max_concurrency = self.max_concurrency if max is None else max
        self.min_concurrency = self.min_concurrency if min is None else min or 1
        return self.max_concurrency, self.min_concurrency

    def _maybe_scale(self, req: Any = None) -> bool:
        """Bring the pool to the wanted size; whether it changed, so that Celery starts the new
        processes at once.
        """
        if not self.pool.active:  # the worker is stopping
            return False
        running, busy = self.processes, len(state.active_requests)
        queued = max(0, len(state.reserved_requests) - busy) + (self._ready() if self._ready else 0)
        wanted = self.max_concurrency
        if self.worker.app.rlm_settings.autoscale.enabled:
            wanted = self._scaler.wanted(
                self.worker.app.rlm_runtime().clock(),
                running=running,
                busy=busy,
                queued=queued,
                level=self._level,
                most=self.max_concurrency,
                least=self.min_concurrency,
            )
        if wanted > running:
            self._grow(wanted - running)
        elif wanted < running:
            self._shrink(running - wanted)
        self._fit_prefetch()
        return bool(wanted > running)

    @property
    def _level(self) -> Level:
        return self.worker.app.rlm_runtime().page.level  # type: ignore[no-any-return]  # set by install

    @property
    def _ready(self) -> Callable[[], int] | None:
        """What tells of the messages that wait in this worker's queues."""
        return getattr(self.worker.app, "rlm_queued", None)

    def _shrink(self, n: int) -> None:
        """Let the youngest idle processes leave, as many as there are.

        Celery's way is a signal, and it takes a process for idle that has a message in its pipe;
        ours is the end of that pipe's messages, so what was handed over before is still done."""
        pool = self.pool._pool
        taking = pool._all_inqueues - pool._busy_workers - pool._active_writes
        idle = [
            each
            for each in pool._pool
            if each.inqW_fd in taking and not each._controlled_termination
        ][-n:]
        for process in idle:
            process._controlled_termination = True  # its end is no error
            pool._busy_workers.add(process.inqW_fd)  # it is given nothing more
            process.inq.put(None)
            pool._processes -= 1
            pool._putlock.shrink()
        if idle:
            logger.info("Scaling down %d processes.", len(idle))

    def _fit_prefetch(self) -> None:
        """Take as many messages as there are processes.

        Celery takes as many as there could be: at high pressure, those beyond the pool would wait
        here while other workers have nothing to do.  While nothing tells of the queues, those show
        that there is work to grow for."""
        if self._ready and (more := self.processes - self._prefetch) != 0:
            self.worker.consumer._update_prefetch_count(more)
            self._prefetch += more
