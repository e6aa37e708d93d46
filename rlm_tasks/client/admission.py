"""Check at submit, before anything is stored, whether the platform accepts a job now.

`Submission` calls it; a refused job is raised or delayed there.  This module reads the pressure
level, the queue depths and the slots, once a second at most.  The rules themselves are in
`scheduler.admission`.  Begin with `AdmissionCheck.refusal`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from celery import Celery

from resilience.degradation import Level
from resilience.errors import Denied
from resilience.keys import Keys
from resilience.store import Store
from rlm_tasks.installation import command_of
from rlm_tasks.ledger.server_clock import ServerClock
from rlm_tasks.messaging.broker import AWAY
from rlm_tasks.messaging.queue_depths import QueueGauge
from rlm_tasks.settings.model import Settings
from scheduler.admission import full, shed
from scheduler.allocation import calculate_optimal_batch_size
from scheduler.board import (
    Board,
    HostReport,
    Orders,
    mean,
    prevailing,
    refused_at,
    refusing,
    refusing_why,
)
from scheduler.queues import QueueReport
from scheduler.slots import SlotBoard

logger = logging.getLogger(__name__)

READ_EVERY_S = 1.0
"""The load is read again after this time, so a loop of submissions reads it once a second."""


@dataclass(frozen=True, slots=True)
class PlatformLoad:
    """The load of the platform, as it was read last."""

    level: Level = Level.NORMAL  # the level by which jobs are refused
    cause: str = ""  # the measured value behind the level, and its host; '' if unknown
    queues: Mapping[str, QueueReport] = field(default_factory=dict)
    slots: Mapping[str, int] = field(default_factory=dict)  # queue that was read -> its slots
    cpu_pct: float = 0.0
    memory_pct: float = 0.0


class AdmissionCheck:
    """The admission check of one client."""

    def __init__(
        self,
        app: Celery,
        store: Store,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        server_clock: Callable[[], float] | None = None,
    ) -> None:
        """`server_clock` returns the time of the ledger's server; by default it is read here."""
        keys = Keys(settings.namespace)
        self._app, self._store, self._settings, self._clock = app, store, settings, clock
        self._board, self._slots = Board(store, keys, settings.pressure), SlotBoard(store, keys)
        self.gauge = QueueGauge(app, clock=server_clock or ServerClock(store))
        self._last = PlatformLoad(), float("-inf")  # the load and its time: one object, for threads

    def refusal(self, queue: str, priority: str) -> Denied | None:
        """Return the reason why a job is not accepted now, with the time to retry; None: accepted.

        A queue without a worker is limited by its depth alone, and not by the age of its messages.
        Raises StoreUnavailable.
        """
        load = self._load(queue)
        pressure = self._settings.pressure
        if refused := shed(
            priority,
            load.level,
            pressure.release_s,
            cause=load.cause,
            thresholds=pressure.thresholds,
        ):
            return refused
        report = load.queues.get(queue, QueueReport(0))
        if not load.slots.get(queue):
            report = QueueReport(report.depth)
        return full(queue, priority, report, self._settings.admission)

    def batch_size(self) -> int:
        """Return the number of jobs to open at a time.

        With autoscaling it follows the load that was read when the jobs were admitted.
        """
        (load, _), most = self._last, self._settings.batch.max_size
        return (
            calculate_optimal_batch_size(load.cpu_pct, load.memory_pct, most)
            if self._settings.autoscale.enabled
            else most
        )

    def _load(self, queue: str) -> PlatformLoad:
        now, (load, read_at) = self._clock(), self._last
        if queue not in load.slots or now - read_at >= READ_EVERY_S:
            load = self._read_load(tuple(dict.fromkeys((*load.slots, queue))))
            self._last = load, now
        return load

    def _read_load(self, queues: Sequence[str]) -> PlatformLoad:
        calls = [self._board.orders_call(), *(self._slots.take(each, 0) for each in queues)]
        answer, *slots = self._store.call(*calls)
        orders = self._board.read(answer)
        cluster, hosts = orders.cluster, [] if orders.cluster else self._board.hosts()
        level, cause = self._refused_at(orders, hosts)
        cpu_pct = cluster.cpu_pct if cluster else mean(hosts, "cpu_pct")
        memory_pct = cluster.memory_pct if cluster else mean(hosts, "memory_pct")
        serving = dict(zip(queues, (total for _, total in slots), strict=True))
        return PlatformLoad(
            level=level,
            cause=cause,
            queues=self._depths(queues),
            slots=serving,
            cpu_pct=cpu_pct,
            memory_pct=memory_pct,
        )

    def _refused_at(self, orders: Orders, hosts: Sequence[HostReport]) -> tuple[Level, str]:
        """Return the level by which jobs are refused, and its cause."""
        if not self._settings.pressure.enabled:
            return Level.NORMAL, ""
        level = refused_at(prevailing(hosts, refusing), orders)
        if orders.forced is not None:
            return level, f"a drill; {command_of(self._app)} control release_pressure ends it"
        if orders.cluster is not None:
            return level, orders.cluster.refusing_why
        return level, refusing_why(hosts, level)

    def _depths(self, queues: Sequence[str]) -> Mapping[str, QueueReport]:
        try:
            return self.gauge.read(queues)
        except AWAY as error:
            logger.info("Queues count as empty, because the broker does not answer: %s", error)
            return {}
