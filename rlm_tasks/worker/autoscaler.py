"""Celery's autoscaler with the platform's decision: ``celery -A rlm_tasks worker --autoscale=8,2``.

Celery creates it by the name in `worker_autoscaler`.  `scheduler.autoscale.PoolScaler` decides the
number of processes.  This class changes the pool: no process with work is ended, and a worker takes
no more messages than it has processes.
"""

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
"""The time between two checks of the pool without messages.

Celery's 30 s are too long for a host under pressure.
"""


class PressureAutoscaler(Autoscaler):  # type: ignore[misc]  # Celery ships no types
    """Grows a prefork pool for waiting work, and shrinks it under pressure and when it is idle.

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
        # Without any process, the worker would take messages that no process runs.
        super().__init__(pool, most, max(1, least), worker=worker, keepalive=keepalive, mutex=mutex)
        self._scaler = PoolScaler()
        self._prefetch = most  # Celery's prefetch count at the start

    @property
    def reach(self) -> int:
        """The number of slots to offer: the processes that may run soon; 0 while the pool stops."""
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
        """Bring the pool to the wanted size.

        Return whether it grew: Celery then starts the new processes at once.
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
        """The function that counts waiting messages in this worker's queues, if there is one."""
        return getattr(self.worker.app, "rlm_queued", None)

    def _shrink(self, n: int) -> None:
        """End up to `n` idle processes, the youngest first.

        Celery ends a process by a signal, and counts it as idle while a message waits in its pipe.
        Here a process gets an end mark in its pipe, so it first runs the messages before that.
        """
        pool = self.pool._pool
        taking = pool._all_inqueues - pool._busy_workers - pool._active_writes
        idle = [
            each
            for each in pool._pool
            if each.inqW_fd in taking and not each._controlled_termination
        ][-n:]
        for process in idle:
            process._controlled_termination = True  # Celery must not report its end as an error
            pool._busy_workers.add(process.inqW_fd)  # it gets no further message
            process.inq.put(None)
            pool._processes -= 1
            pool._putlock.shrink()
        if idle:
            logger.info("Scaling down %d processes.", len(idle))

    def _fit_prefetch(self) -> None:
        """Set the prefetch count to the number of processes.

        Celery sets it to the largest size of the pool.  At high pressure the extra messages would
        wait here while other workers are idle.  Without a count of waiting messages, Celery's
        number stays: then only the extra messages show that the pool should grow.
        """
        if self._ready and (more := self.processes - self._prefetch) != 0:
            self.worker.consumer._update_prefetch_count(more)
            self._prefetch += more
