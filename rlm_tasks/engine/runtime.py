"""All parts of a worker, built once before its pool forks (the composition root).

Celery's tasks and the worker's main process use it.  Begin with `Runtime.build`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from billiard.process import current_process
from celery import Celery
from redis.exceptions import RedisError

from resilience.bulkhead import URGENCY
from resilience.errors import StoreUnavailable
from resilience.fault_log import FaultLog, FaultLogSettings
from resilience.keys import Keys
from resilience.store import Store, guard_store
from resilience.timeouts import Timeouts
from rlm_tasks.engine.crashpoints import CrashPoint, no_hook
from rlm_tasks.engine.guards import ProcessGuards
from rlm_tasks.engine.item_timeouts import ItemTimeouts
from rlm_tasks.engine.node_events import NodeEvents
from rlm_tasks.engine.rounds import Rounds
from rlm_tasks.engine.shared_page import ProcessEntry, SharedPage, Steps
from rlm_tasks.engine.slot_shares import SlotShares
from rlm_tasks.jobs.file_roots import FilesRoot
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.stored_items import ItemReader
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.output_limit import OutputLimit
from rlm_tasks.messaging.broker_kinds import broker_kind
from rlm_tasks.messaging.delivery import Delivery
from rlm_tasks.messaging.dispatch import Dispatcher
from rlm_tasks.operations.code_metrics import read_below
from rlm_tasks.settings.model import Settings
from scheduler.admission import WaitingRoom
from scheduler.board import Board
from scheduler.events import Events
from scheduler.preemption import Preemption, more_urgent, rank_of
from scheduler.slots import SlotBoard
from scheduler.usage import Usage

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Runtime:
    """The parts that nodes and merges of one process share."""

    settings: Settings
    ledger: Ledger
    dispatcher: Dispatcher
    delivery: Delivery
    slots: SlotBoard
    preemption: Preemption
    items: ItemReader
    page: SharedPage
    guards: ProcessGuards
    timeouts: ItemTimeouts
    faults: FaultLog
    usage: Usage
    shares: SlotShares
    board: Board
    waiting_room: WaitingRoom
    node_events: NodeEvents
    rounds: Rounds
    output_limit: OutputLimit
    clock: Callable[[], float] = time.monotonic  # seconds
    worker: str = ""
    in_order: bool = True  # the broker delivers more urgent messages first
    retiring: bool = False  # this pool process ends before its next message, and is replaced
    reached: Callable[[CrashPoint], None] = no_hook
    item_ms: dict[str, float] = field(default_factory=dict)  # operation -> latest time of an item
    _entries: dict[tuple[int, int], ProcessEntry] = field(default_factory=dict)

    @classmethod
    def of(cls, app: Celery, settings: Settings) -> Runtime:
        """Return the runtime of a worker of one Celery app."""
        store = Store(
            settings.address,
            namespace=settings.namespace,
            patience_s=settings.ledger.lease_s,
        )
        keys = Keys(settings.namespace)
        ledger = Ledger(store, keys, settings.ledger, on_outage="wait")
        dispatcher = Dispatcher(app, ledger)
        ledger.after_close = dispatcher.forget_chords
        return cls.build(
            settings,
            ledger,
            dispatcher,
            shared=guard_store(settings),
            in_order=broker_kind(app.conf.broker_url).orders_queues,
        )

    @classmethod
    def build(
        cls,
        settings: Settings,
        ledger: Ledger,
        dispatcher: Dispatcher,
        *,
        shared: Store,
        clock: Callable[[], float] = time.monotonic,
        in_order: bool = True,
    ) -> Runtime:
        """Build all parts from a ledger and a dispatcher; the guards use the store `shared`."""
        store, keys = ledger.store, ledger.keys
        root = FilesRoot(settings.files_root)
        read_below(root)
        slots, page = SlotBoard(store, keys), SharedPage(settings.pressure.stale_s)
        store.stays, shared.is_quiet = lambda: not page.draining, True
        preemption = Preemption(store, keys, slots)
        delivery = Delivery(ledger, dispatcher, preemption)
        wake = delivery.fail_fast().wake
        guards = ProcessGuards(shared, settings, wake, ledger.stop)
        learned = Timeouts(shared, multipliers=settings.node.timeout_multipliers)
        events = Events(shared, settings.alerts.history)
        node_events = NodeEvents(events, settings.alerts, clock)
        patterns = FaultLogSettings(size=settings.fault_patterns)
        return cls(
            settings=settings,
            ledger=ledger,
            dispatcher=dispatcher,
            delivery=delivery,
            slots=slots,
            preemption=preemption,
            items=ItemReader(store, root),
            page=page,
            guards=guards,
            timeouts=ItemTimeouts(learned, settings.node, clock),
            faults=FaultLog(shared, patterns, node_events.escalated),
            usage=Usage(store, keys),
            shares=SlotShares(shared, settings, page, wake),
            board=Board(store, keys, settings.pressure),
            waiting_room=WaitingRoom(store, keys, settings.admission.max_jobs),
            node_events=node_events,
            rounds=Rounds(ledger, dispatcher, settings, guards.budgets, wake),
            output_limit=OutputLimit(store, settings.max_output_bytes),
            clock=clock,
            in_order=in_order,
        )

    def goes_back(self, queue: str) -> bool:
        """Whether a message goes back to its queue, because its slot was freed for urgent work.

        Always False for Redis, which delivers urgent messages first; RabbitMQ delivers in any
        order.
        """
        namespace, _, priority = queue.rpartition(".")
        ranks = self.page.urgent
        first = [each for each in URGENCY if more_urgent(ranks & rank_of(each), priority)]
        if self.in_order or not first:
            return False
        awaited = [self.preemption.awaited(f"{namespace}.{each}") for each in first]
        try:
            return any(self.ledger.store.call(*awaited))
        except (StoreUnavailable, RedisError) as error:
            logger.info(
                "A node keeps its slot, because Redis does not say whether urgent work waits: %s",
                error,
            )
            return False

    def steps(self, spec: JobSpec) -> Steps:
        """Return the steps of a node or a merge that this process runs."""
        limit_s = self.timeouts.step_limit_s(spec.operation, spec.complexity)
        return Steps(self.page_entry(), self.clock, limit_s)

    def page_entry(self) -> ProcessEntry:
        """Return the entry of the shared page that belongs to this process, or to this thread."""
        here = os.getpid(), threading.get_ident()
        if here not in self._entries:
            index = getattr(current_process(), "index", None)
            self._entries[here] = self.page.entry(len(self._entries) if index is None else index)
        return self._entries[here]
