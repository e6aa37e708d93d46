"""Whether a job is taken in now: asked once, at submit, before anything is stored.

Decides what is looked at, and how often.  The rules are the scheduler's; what becomes of a job that
does not fit is the client's business."""

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
from rlm_tasks.messaging.broker import AWAY
from rlm_tasks.messaging.queue_depths import QueueGauge
from rlm_tasks.settings.model import Settings
from scheduler.admission import full, shed
from scheduler.allocation import calculate_optimal_batch_size
from scheduler.board import Board, acted_on, mean, prevailing
from scheduler.queues import QueueReport
from scheduler.slots import SlotBoard

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""What was seen holds for this long: a loop of submissions asks once a second, not once a job."""


@dataclass(frozen=True, slots=True)
class Seen:
    """How pressed the platform is."""

    level: Level = Level.NORMAL
    queues: Mapping[str, QueueReport] = field(default_factory=dict)
    slots: Mapping[str, int] = field(
        default_factory=dict
    )  # each queue that was looked at -> slots that serve it
    cpu_pct: float = 0.0
    memory_pct: float = 0.0


class AdmissionCheck:
    """The door of one client."""

    def __init__(
        self,
        app: Celery,
        store: Store,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        keys = Keys(settings.namespace)
        self._store, self._settings, self._clock = store, settings, clock
        self._board, self._slots = Board(store, keys, settings.pressure), SlotBoard(store, keys)
        self.gauge = QueueGauge(app)
        self._last = Seen(), float("-inf")  # what was seen, and when: one object, for threads

    def refusal(self, queue: str, priority: str) -> Denied | None:
        """Return why a job is not taken in now, and when to come back; None: it is.

        A queue that nobody serves keeps what it is given, up to its depth: that is what a broker is
        for."""
        seen = self._look(queue)
        if refused := shed(priority, seen.level, self._settings.pressure.release_s):
            return refused
        report = seen.queues.get(queue, QueueReport(0))
        if not seen.slots.get(queue):
            report = QueueReport(report.depth)
        return full(queue, priority, report, self._settings.admission)

    def batch_size(self) -> int:
        """Return how many jobs to open at a time, by what was seen when they were let in, if load
        is to count.
        """
        (seen, _), most = self._last, self._settings.batch.max_size
        return (
            calculate_optimal_batch_size(seen.cpu_pct, seen.memory_pct, most)
            if self._settings.autoscale.enabled
            else most
        )

    def _look(self, queue: str) -> Seen:
        now, (seen, seen_at) = self._clock(), self._last
        if queue not in seen.slots or now - seen_at >= LOOK_EVERY_S:
            seen = self._fresh(tuple(dict.fromkeys((*seen.slots, queue))))
            self._last = seen, now
        return seen

    def _fresh(self, queues: Sequence[str]) -> Seen:
        looks = [self._board.orders_call(), *(self._slots.take(each, 0) for each in queues)]
        answer, *slots = self._store.call(*looks)
        orders = self._board.read(answer)
        cluster, hosts = orders.cluster, [] if orders.cluster else self._board.hosts()
        level = (
            acted_on(prevailing(hosts), orders) if self._settings.pressure.enabled else Level.NORMAL
        )
        cpu_pct = cluster.cpu_pct if cluster else mean(hosts, "cpu_pct")
        memory_pct = cluster.memory_pct if cluster else mean(hosts, "memory_pct")
        serving = dict(zip(queues, (total for _, total in slots), strict=True))
        return Seen(
            level=level,
            queues=self._depths(queues),
            slots=serving,
            cpu_pct=cpu_pct,
            memory_pct=memory_pct,
        )

    def _depths(self, queues: Sequence[str]) -> Mapping[str, QueueReport]:
        try:
            return self.gauge.read(queues)
        except AWAY as error:
            logger.info("Queues are taken for empty, the broker does not answer: %s", error)
            return {}
