"""The composition root of one process: what it reads and writes through, built once, before a fork.

Decides how parts are put together; refuses to know what they do.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from billiard.process import current_process
from celery import Celery

from resilience.keys import Keys
from resilience.store import Store
from rlm_tasks import operations
from rlm_tasks.crashpoints import CrashPoint, nobody_listens
from rlm_tasks.dispatch import Dispatcher
from rlm_tasks.ledger import Ledger
from rlm_tasks.page import Page, PageSlot
from rlm_tasks.settings import Settings
from rlm_tasks.sources import ItemReader
from scheduler.slots import SlotBoard


@dataclass
class Runtime:
    """The parts that nodes and merges of one process share."""

    settings: Settings
    ledger: Ledger
    slots: SlotBoard
    items: ItemReader
    dispatcher: Dispatcher
    page: Page
    worker: str = ""
    reached: Callable[[CrashPoint], None] = nobody_listens
    clock: Callable[[], float] = time.perf_counter  # seconds; what slices are measured by
    item_ms: dict[str, float] = field(default_factory=dict)  # operation -> time of an item, as last seen by this process
    _page_slots: dict[tuple[int, int], PageSlot] = field(default_factory=dict)

    @classmethod
    def of(cls, app: Celery, settings: Settings, *, patience_s: float) -> Runtime:
        """Build the parts for one Celery app."""
        store, keys = Store(settings.redis_url), Keys(settings.namespace)
        ledger = Ledger(store, keys, settings.ledger, patience_s=patience_s)
        return cls(settings, ledger, SlotBoard(store, keys), ItemReader(store), Dispatcher(app, ledger), Page())

    def resend(self, job: str, nodes: Sequence[str]) -> None:
        """Send registered nodes again; the splits of an operation nobody knows here get no chord."""
        spec = self.ledger.spec(job)
        if spec is not None:
            merges = spec.operation in operations.names() and operations.get(spec.operation).merge is not None
            self.dispatcher.resend(job, nodes, merges=merges)

    def page_slot(self) -> PageSlot:
        """Return where this pool process, or this thread of a threads pool, says what it holds."""
        here = os.getpid(), threading.get_ident()
        if here not in self._page_slots:
            index = getattr(current_process(), "index", None)
            self._page_slots[here] = self.page.slot(len(self._page_slots) if index is None else index)
        return self._page_slots[here]
