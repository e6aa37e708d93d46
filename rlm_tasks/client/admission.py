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
from rlm_tasks.errors import UnknownToWorkers
from rlm_tasks.installation import command_of
from rlm_tasks.ledger.server_clock import ServerClock
from rlm_tasks.messaging.broker import AWAY
from rlm_tasks.messaging.queue_depths import QueueGauge
from rlm_tasks.operations.registry import Operation
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
    version_on,
)
from scheduler.queues import QueueReport
from scheduler.slots import SlotBoard

logger = logging.getLogger(__name__)

KNOWN_S = 30.0
"""An operation that a worker knew is looked up again after this time."""
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
    hosts: Sequence[HostReport] = ()  # only if they were asked for


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
        self._known_until: dict[tuple[str, str], float] = {}  # operation and queue -> time
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

    def check_known(self, operation: Operation, queue: str) -> None:
        """Raise UnknownOperation if workers of a queue live, and none of them knows an operation.

        An answer holds for some seconds, so that a loop of submissions asks once.  Older releases
        do not report their operations; then nothing is raised.  Raises StoreUnavailable.
        """
        key, now = (operation.name, queue), self._clock()
        if now < self._known_until.get(key, 0.0):
            return
        self._last = self._read_load(self._queues_with(queue), with_hosts=True), now
        load, _ = self._last
        serving = [host for host in load.hosts if queue in host.queues]
        version = version_on(serving, operation.name)
        module = getattr(operation.function, "__module__", "")
        if version == 0:
            known = (name for host in serving for name in host.operations or ())
            raise UnknownToWorkers(operation.name, queue, {*known}, module=module)
        if version is None and not serving and module == "__main__":
            logger.warning(
                "Operation %r is defined in __main__, which workers cannot import; put it in a "
                "module, and set RLM_OPERATIONS of the workers to it",
                operation.name,
            )
        if version is not None and version < operation.version:
            logger.warning(
                "Operation %r has version %d here, and %d on the workers of queue %s: its jobs "
                "wait for a worker with this version",
                operation.name,
                operation.version,
                version,
                queue,
            )
        self._known_until[key] = now + KNOWN_S

    def slots_of(self, queue: str) -> int:
        """Return the number of slots of live workers that consume a queue, at most 1 s old.

        Raises StoreUnavailable.
        """
        return self._load(queue).slots.get(queue, 0)

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
            load = self._read_load(self._queues_with(queue))
            self._last = load, now
        return load

    def _queues_with(self, queue: str) -> Sequence[str]:
        return tuple(dict.fromkeys((*self._last[0].slots, queue)))

    def _read_load(self, queues: Sequence[str], *, with_hosts: bool = False) -> PlatformLoad:
        calls = [self._board.orders_call(), *(self._slots.take(each, 0) for each in queues)]
        answer, *slots = self._store.call(
            *calls, *([self._board.workers_call()] if with_hosts else [])
        )
        all_hosts = self._board.read_workers(slots.pop()).live if with_hosts else None
        orders = self._board.read(answer)
        cluster = orders.cluster
        hosts = [] if cluster else all_hosts if all_hosts is not None else self._board.hosts()
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
            hosts=all_hosts or (),
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
