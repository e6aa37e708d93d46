"""What a worker tells of its host, and what it is told to act on; once a second, in its main
process.

Decides what reaches the shared page: the worse of the own host's level and the cluster's, or what a
drill orders.  Refuses to know how a level follows from a measurement, and what nodes make of it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from celery.worker import state

from resilience.degradation import Level
from resilience.store import Call
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.jobs.spec import SCHEMA
from rlm_tasks.version import __version__
from rlm_tasks.worker.queue_order import QueueOrder, running
from scheduler.board import Board, HostReport, Orders, acted_on
from scheduler.ladder import HostLadder, HostVerdict
from scheduler.queues import ages
from scheduler.sampling import Sample, Sampler, held_mb
from scheduler.stride import Facts

logger = logging.getLogger(__name__)


class Host:
    """The host of one worker."""

    def __init__(
        self,
        runtime: Runtime,
        pool_size: Callable[[], int],
        queues: Callable[[], list[str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives seconds of the day's time; others compare it with the server's."""
        self._runtime, self._pool_size, self._queues, self._clock = (
            runtime,
            pool_size,
            queues,
            clock,
        )
        settings = runtime.settings.pressure
        self._sampler, self._ladder = Sampler(settings), HostLadder(settings)
        self._sample: Sample | None = None
        self._own: HostVerdict | None = None
        self._orders: Orders | None = None
        self._heard_at = float("-inf")
        QueueOrder.facts = Facts(
            ages=self._ages,
            running=running,
            slots=pool_size,
            target_s=runtime.settings.admission.wait_s,
        )

    def measure(self, now: float) -> None:
        """Take a sample, and act on it at once; whatever becomes of Redis."""
        try:
            self._sample = self._sampler.sample()
            self._own = self._ladder.step(self._sample, now) if self._sample is not None else None
        except Exception:
            logger.exception("This host could not be measured; its level is taken for elevated")
            self._own = None
        self._act(now)

    def exchange(self) -> list[Call]:
        """Return the calls that tell of this host, and ask what to act on."""
        board = self._runtime.board
        queue = next(iter(self._queues()), "")
        return [
            board.publish(self.report()),
            board.orders_call(),
            self._runtime.slots.take(queue, 0),
        ]

    def heard(self, answers: Sequence[Any], now: float) -> None:
        """Act on what was answered."""
        _, told, (_, slots) = answers
        self._orders, self._heard_at = Board.read(told), now
        if (
            slots
        ):  # a consumer that reconnects has no queue for a moment; what was heard before holds
            self._runtime.page.slots = slots
        self._act(now)

    def _act(self, now: float) -> None:
        """Write what nodes act on into the page.  What was heard long ago counts no more."""
        page = self._runtime.page
        if not self._runtime.settings.pressure.enabled:
            return
        if now - self._heard_at > self._runtime.settings.pressure.stale_s:
            self._orders = None
        level = acted_on(self._own.level if self._own is not None else None, self._orders)
        if level != page.level:
            logger.warning(
                "Pressure is %s%s", level.label, f": {why}" if (why := self._why(level)) else ""
            )
        page.level = level
        if self._sample is not None:
            processes = {held.pid for held in page.held()}  # threads of a pool share one
            page.free_mb = self._sample.available_mb
            page.available_mb = self._sample.available_mb + sum(map(held_mb, processes))

    def _why(self, level: Level) -> str:
        if self._orders is not None and self._orders.forced is not None:
            return "it is forced"
        if self._own is not None and self._own.level == level:
            return self._own.why
        return (
            self._orders.cluster.why
            if self._orders is not None and self._orders.cluster is not None
            else ""
        )

    def report(self) -> HostReport:
        """Return how this host stands."""
        unknown = Level.ELEVATED if self._runtime.settings.pressure.enabled else Level.NORMAL
        own = self._own or HostVerdict(unknown, 0.0, "it could not be measured")
        return HostReport(
            worker=self._runtime.worker,
            level=own.level,
            percent=round(own.percent, 1),
            why=own.why,
            slots=self._pool_size(),
            busy=len(state.reserved_requests),
            queues=tuple(self._queues()),
            active=dict(_active()),
            sample=self._sample,
            version=__version__,
            schema=SCHEMA,
            at=round(self._clock(), 3),
        )

    def _ages(self) -> dict[str, float]:
        orders = self._orders  # the event loop asks, while the guard's thread may forget them
        return (
            ages(orders.cluster.queues) if orders is not None and orders.cluster is not None else {}
        )


def _active() -> Counter[str]:
    """Return how many nodes of each operation this worker's pool runs."""
    # The bare set is copied in one step, while the event loop changes it; as in `queue_order`.
    held = (reference() for reference in state.active_requests.data.copy())
    told = (
        (request.request_dict.get("rlm") or {}).get("operation", "")
        for request in held
        if request is not None
    )
    return Counter(operation for operation in told if operation)
