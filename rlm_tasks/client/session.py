"""The connections, settings and parts that a client shares with its jobs, plans and reports.

`Client` makes one `Session`; jobs, plans and reports take it instead of a client.  Nothing connects
before the first call.  Begin with `Session.__init__`.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from celery import Celery

from resilience.keys import Keys
from resilience.store import MAX_CONNECTIONS, Store, guard_store, masked
from rlm_tasks.client.admission import AdmissionCheck
from rlm_tasks.errors import BrokerUnavailable, InvalidRequest
from rlm_tasks.installation import command_of
from rlm_tasks.jobs.file_roots import FilesRoot
from rlm_tasks.jobs.stored_items import ItemReader
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.obstacles import Deployment
from rlm_tasks.messaging.broker import AWAY
from rlm_tasks.messaging.delivery import Delivery
from rlm_tasks.messaging.dispatch import Dispatcher
from rlm_tasks.messaging.queue_names import queue_names
from rlm_tasks.settings.model import Settings
from scheduler.admission import WaitingRoom
from scheduler.board import Board
from scheduler.preemption import Preemption
from scheduler.slots import SlotBoard

if TYPE_CHECKING:
    from resilience.breaker import CircuitBreakers
    from rlm_tasks.engine.guards import ProcessGuards
    from rlm_tasks.ledger.budgets import JobBudgets
    from scheduler.alerts import Alerts
    from scheduler.events import Events
    from scheduler.queues import QueueReport
    from scheduler.usage import Usage


logger = logging.getLogger(__name__)

_LISTENERS = MAX_CONNECTIONS // 2
_POLL_S = 0.1


class Listeners:
    """The threads of one client that listen to jobs; threads that wait for one job share one.

    Each listener holds a connection, so their number is limited.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_job: dict[str, threading.Event] = {}

    @contextmanager
    def one_for(self, job: str, seconds: float) -> Iterator[bool]:
        """Give True to the thread that is to listen; it tells the others when it has ended.

        Another thread waits for it for some seconds, or a short time when too many threads listen,
        and gets False.
        """
        own = threading.Event()
        with self._lock:
            crowded = len(self._by_job) >= _LISTENERS
            listener = self._by_job.get(job) if crowded else self._by_job.setdefault(job, own)
        if listener is not own:
            (listener or own).wait(seconds if listener else min(_POLL_S, seconds))
            yield False
            return
        try:
            yield True
        finally:
            with self._lock:
                del self._by_job[job]
            own.set()


class Session:
    """The parts by which one client reaches the platform."""

    def __init__(self, app: Celery) -> None:
        """Raises InvalidRequest for an app that the platform is not installed in."""
        if not hasattr(app, "rlm_settings"):
            shown = getattr(app, "main", app)
            advice = "the platform is not installed in it; call install(app) first"
            raise InvalidRequest("app", shown, advice)
        self.app = app
        self.settings: Settings = app.rlm_settings
        self.store = Store(self.settings.address, namespace=self.settings.namespace)
        self.keys = Keys(self.settings.namespace)
        self.ledger = Ledger(self.store, self.keys, self.settings.ledger)
        self.dispatcher = Dispatcher(app, self.ledger)
        self.slots = SlotBoard(self.store, self.keys)
        self.board = Board(self.store, self.keys, self.settings.pressure)
        preemption = Preemption(self.store, self.keys, self.slots)
        self.delivery = Delivery(self.ledger, self.dispatcher, preemption)
        self.admission = AdmissionCheck(
            app, self.store, self.settings, server_clock=self.ledger.clock
        )
        self.waiting_room = WaitingRoom(self.store, self.keys, self.settings.admission.max_jobs)
        self.reader = ItemReader(self.store, FilesRoot(self.settings.files_root))
        self.listeners = Listeners()

    def close(self) -> None:
        """Close the connections of this process."""
        self.admission.gauge.close()
        self.store.close()
        if "shared" in vars(self):  # it is made when first used
            self.shared.close()

    def queues(self) -> dict[str, QueueReport]:
        """Return depth and age of each queue of the platform.  Raises BrokerUnavailable."""
        try:
            return self.admission.gauge.read(queue_names(self.settings))
        except AWAY as error:
            raise BrokerUnavailable.of(str(self.app.conf.broker_url), error) from None

    def deployment(self) -> Deployment:
        """Return the facts around all jobs, by which explanations and the doctor judge.

        Raises StoreUnavailable.
        """
        workers = self.board.workers()
        try:
            queues = self.queues()
        except BrokerUnavailable:
            queues = None
        broker, command = masked(str(self.app.conf.broker_url)), command_of(self.app)
        return Deployment(workers, queues, broker, command)

    def recall(self) -> None:
        """Make running nodes of all workers ask the ledger at once, not at their next pulse."""
        try:
            self.dispatcher.broadcast("rlm_recall")
        except AWAY as error:
            logger.info("Workers were not recalled; they ask at their next pulse: %s", error)

    # --- made when first used ------------------------------------------------------------------

    @functools.cached_property
    def shared(self) -> Store:
        """The store of guards, the same as in workers."""
        return guard_store(self.settings)

    @functools.cached_property
    def guards(self) -> ProcessGuards:
        """The guards that operations declare, as workers build them."""
        from rlm_tasks.engine.guards import ProcessGuards

        return ProcessGuards(self.shared, self.settings, self.delivery.wake)

    @functools.cached_property
    def breakers(self) -> CircuitBreakers:
        """All circuit breakers."""
        from rlm_tasks.engine.guards import breakers_of

        return breakers_of(self.shared, self.settings, self.delivery.wake)

    @functools.cached_property
    def budgets(self) -> JobBudgets:
        """The budgets of jobs that call models."""
        from rlm_tasks.ledger.budgets import JobBudgets

        return JobBudgets(self.store, self.settings)

    @functools.cached_property
    def usage(self) -> Usage:
        """The cost of operations so far."""
        from scheduler.usage import Usage

        return Usage(self.store, self.keys)

    @functools.cached_property
    def events(self) -> Events:
        """The events of the platform."""
        from scheduler.events import Events

        return Events(self.store, self.settings.alerts.history)

    @functools.cached_property
    def alerts(self) -> Alerts:
        """The alerts of the platform."""
        from scheduler.alerts import Alerts

        return Alerts(self.store, self.settings.alerts, self.events)
