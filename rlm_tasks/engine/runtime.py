"""The composition root of one process: what it reads and writes through, built once, before a fork.

Decides how parts are put together; refuses to know what they do.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from billiard.process import current_process
from celery import Celery
from redis.exceptions import RedisError

from resilience.fault_log import FaultLog, FaultLogSettings
from resilience.keys import Keys
from resilience.store import Store, guard_store
from resilience.timeouts import Timeouts
from resilience.waiters import URGENCY
from rlm_tasks.engine.crashpoints import CrashPoint, nobody_listens
from rlm_tasks.engine.guards import Guards
from rlm_tasks.engine.item_timeouts import ItemTimeouts
from rlm_tasks.engine.node_events import NodeEvents
from rlm_tasks.engine.rounds import Rounds
from rlm_tasks.engine.shared_page import ProcessEntry, SharedPage
from rlm_tasks.engine.slot_shares import SlotShares
from rlm_tasks.jobs.items import ItemReader
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.messaging.delivery import making_room, resend, wake
from rlm_tasks.messaging.dispatch import Dispatcher
from rlm_tasks.messaging.transports import speaks_redis
from rlm_tasks.settings.model import Settings
from scheduler.admission import WaitingRoom
from scheduler.board import Board
from scheduler.events import Events
from scheduler.preemption import Preemption, more_urgent, rank_of
from scheduler.slots import SlotBoard
from scheduler.usage import Usage

logger = logging.getLogger(__name__)


@dataclass
class Runtime:
    """The parts that nodes and merges of one process share."""

    settings: Settings
    ledger: Ledger
    slots: SlotBoard
    preemption: Preemption
    items: ItemReader
    dispatcher: Dispatcher
    page: SharedPage
    guards: Guards
    limits: ItemTimeouts
    faults: FaultLog
    usage: Usage
    shares: SlotShares
    board: Board
    room: WaitingRoom
    notices: NodeEvents
    rounds: Rounds
    worker: str = ""
    in_order: bool = True  # the broker hands over what is more urgent first
    retiring: bool = (
        False  # this pool process ends before its next message, and another takes its place
    )
    reached: Callable[[CrashPoint], None] = nobody_listens
    clock: Callable[[], float] = time.perf_counter  # seconds; what slices are measured by
    item_ms: dict[str, float] = field(
        default_factory=dict
    )  # operation -> time of an item, as last seen by this process
    _page_slots: dict[tuple[int, int], ProcessEntry] = field(default_factory=dict)

    @classmethod
    def of(cls, app: Celery, settings: Settings, *, patience_s: float) -> Runtime:
        """Build the parts for one Celery app."""
        store, keys = (
            Store(settings.address, namespace=settings.namespace),
            Keys(settings.namespace),
        )
        ledger = Ledger(store, keys, settings.ledger, patience_s=patience_s)
        dispatcher, shared = Dispatcher(app, ledger), guard_store(settings)
        page = SharedPage(stale_s=settings.pressure.stale_s)

        def waken(waiters: Sequence[str]) -> int:
            return wake(ledger.hasty(), dispatcher, waiters)

        guards = Guards(shared, settings, waken, ledger.stop)
        limits = ItemTimeouts(
            Timeouts(shared, multipliers=settings.node.timeout_multipliers),
            settings.node,
            time.monotonic,
        )
        slots = SlotBoard(store, keys)
        return cls(
            settings,
            ledger,
            slots,
            Preemption(store, keys, slots),
            ItemReader(store),
            dispatcher,
            page,
            guards,
            limits,
            FaultLog(shared, FaultLogSettings(size=settings.fault_patterns)),
            Usage(store, keys),
            SlotShares(shared, settings, page, waken),
            Board(store, keys, settings.pressure),
            WaitingRoom(store, keys, settings.admission.max_jobs),
            NodeEvents(Events(shared, settings.alerts.history), settings.alerts, time.monotonic),
            Rounds(
                ledger=ledger,
                dispatcher=dispatcher,
                settings=settings,
                purse=guards.purse,
                wake=waken,
            ),
            in_order=speaks_redis(app.conf.broker_url),
        )

    def resend(self, job: str, nodes: Sequence[str]) -> None:
        """Send registered nodes again; the splits of an operation nobody knows here get no
        chord.
        """
        resend(self.ledger, self.dispatcher, job, nodes)

    def wake(self, waiters: Sequence[str]) -> int:
        """Let nodes go on that a guard has named; return how many have waited."""
        return wake(self.ledger, self.dispatcher, waiters)

    def stands_aside(self, queue: str) -> bool:
        """Whether a message of a queue has got a slot that was given up for what is more urgent,
        and goes back for it.

        Redis hands over what is more urgent first; RabbitMQ hands over what it likes.
        """
        namespace, _, priority = queue.rpartition(".")
        first = [
            each for each in URGENCY if more_urgent(self.page.urgent & rank_of(each), priority)
        ]
        if self.in_order or not first:
            return False
        try:
            return any(
                self.ledger.store.run(
                    *(self.preemption.awaited(f"{namespace}.{each}") for each in first)
                )
            )
        except RedisError as error:
            logger.info("A node takes the slot that it has got: %s", error)
            return False

    def making_room(
        self, queue: str, nodes: Sequence[str], *, freed: int
    ) -> AbstractContextManager[None]:
        """Have less urgent nodes yield for urgent ones that are sent within the block, as far as
        there is no slot.
        """
        return making_room(self.preemption, self.dispatcher, queue, nodes, freed=freed)

    def page_slot(self) -> ProcessEntry:
        """Return where this pool process, or this thread of a threads pool, says what it holds."""
        here = os.getpid(), threading.get_ident()
        if here not in self._page_slots:
            index = getattr(current_process(), "index", None)
            self._page_slots[here] = self.page.slot(
                len(self._page_slots) if index is None else index
            )
        return self._page_slots[here]
