"""The pressure of a worker's host: measured once a second, published, and applied to its nodes.

The supervisor calls it in the worker's main process.  It writes the level for nodes to the shared
page.  That is the level of a drill, otherwise the worse of the host's own and the cluster's.
`scheduler.ladder` turns samples into levels.  Begin with `Host.measure`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from celery.worker import state

from resilience.degradation import Level
from resilience.store import Call, masked
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.jobs.spec import SCHEMA
from rlm_tasks.llm.reports import declared_endpoints
from rlm_tasks.messaging.dispatch import legible, read_header
from rlm_tasks.operations import registry
from rlm_tasks.settings.document import fingerprints
from rlm_tasks.telemetry.limit_reports import declared_limits
from rlm_tasks.version import __version__
from rlm_tasks.worker.queue_order import QueueOrder, running
from scheduler.board import MOST_NAMED, Board, HostReport, Orders, acted_on, refused_at, reported
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
        *,
        broker: str = "",
    ) -> None:
        """`clock` gives the time of day in seconds; readers compare it with the server's.

        `broker` is the URL of the broker that this worker consumes.
        """
        self._runtime, self._pool_size = runtime, pool_size
        self._queues, self._clock, self._broker = queues, clock, masked(broker)
        settings = runtime.settings.pressure
        self._sampler, self._ladder = Sampler(settings), HostLadder(settings)
        self._sample: Sample | None = None
        self._own: HostVerdict | None = None
        self._orders: Orders | None = None
        self._received_at = float("-inf")
        self._consumed_at = clock()  # when it last consumed a queue
        self.drained: list[str] = []  # queues that it does not consume until `Supervisor.resume`
        QueueOrder.facts = Facts(
            ages=self._ages,
            running=running,
            slots=pool_size,
            target_s=runtime.settings.admission.wait_s,
        )

    def measure(self, now: float) -> None:
        """Take a sample and apply it at once; this needs no Redis."""
        try:
            self._sample = self._sampler.sample()
            self._own = self._ladder.step(self._sample, now) if self._sample is not None else None
        except Exception:
            logger.exception("This host could not be measured; it counts as elevated")
            self._own = None
        self._act(now)

    def board_calls(self) -> list[Call]:
        """Return the calls that publish this host's report and read the orders and all slots."""
        board = self._runtime.board
        queue = next(iter(self._queues()), "")
        return [
            board.publish(self.report()),
            board.orders_call(),
            self._runtime.slots.take(queue, 0),
        ]

    def receive(self, answers: Sequence[Any], now: float) -> None:
        """Apply the answers to `board_calls`."""
        _, orders, (_, slots) = answers
        self._orders, self._received_at = Board.read(orders), now
        # A consumer that reconnects has no queue for a moment: the last number of slots holds.
        if slots:
            self._runtime.page.slots = slots
        self._act(now)

    def _act(self, now: float) -> None:
        """Write the level and the memory for nodes into the page; old orders do not count."""
        page = self._runtime.page
        if not self._runtime.settings.pressure.enabled:
            return
        if now - self._received_at > self._runtime.settings.pressure.stale_s:
            self._orders = None
        level = acted_on(self._own.level if self._own is not None else None, self._orders)
        if level != page.level:
            logger.warning(
                "Pressure is %s%s", level.label, f": {why}" if (why := self._why(level)) else ""
            )
        own = self._own.refusing if self._own is not None else Level.NORMAL
        page.set_levels(level, refused_at(own, self._orders))
        if self._sample is not None:
            processes = {held.pid for held in page.held()}  # threads of a pool share one
            page.free_mb = self._sample.available_mb
            page.available_mb = self._sample.available_mb + sum(map(held_mb, processes))

    def _why(self, level: Level) -> str:
        """Return the cause of a level, '' when it is not known."""
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
        """Return the report of this host and its worker."""
        unknown = Level.ELEVATED if self._runtime.settings.pressure.enabled else Level.NORMAL
        own = self._own or HostVerdict(unknown, 0.0, "it could not be measured")
        queues, now = tuple(self._queues()), self._clock()
        if queues:
            self._consumed_at = now
        return HostReport(
            worker=self._runtime.worker,
            level=own.level,
            percent=round(own.percent, 1),
            why=own.why,
            slots=self._pool_size(),
            busy=len(state.reserved_requests),
            queues=queues,
            active=dict(_active()),
            sample=self._sample,
            version=__version__,
            schema=SCHEMA,
            at=round(now, 3),
            refusing=own.refusing,
            refusing_why=own.refusing_why,
            operations=reported(registry.versions()),
            draining=self._runtime.page.draining,
            drained=tuple(self.drained),
            deaf_s=round(max(0.0, now - self._consumed_at), 1),
            **self._declared,
        )

    @functools.cached_property
    def _declared(self) -> dict[str, Any]:
        """The part of a report that stays the same while the worker lives."""
        settings = self._runtime.settings
        return {
            "broker": self._broker,
            "limits": declared_limits(self._runtime.guards),
            "endpoints": declared_endpoints(settings.llm),
            "settings": fingerprints(settings),
            "services": dict(islice(registry.services().items(), MOST_NAMED)),
        }

    def _ages(self) -> dict[str, float]:
        """Return the ages of the platform's queues in seconds, as the orders have them."""
        orders = self._orders  # the event loop asks, while the supervisor may drop the orders
        return (
            ages(orders.cluster.queues) if orders is not None and orders.cluster is not None else {}
        )


def _active() -> Counter[str]:
    """Return the number of running nodes of each operation in this worker's pool."""
    # The underlying set is copied in one step, while the event loop changes it.
    held = (reference() for reference in state.active_requests.data.copy())
    operations = (
        legible(read_header(request.request_dict.get("rlm")).operation)
        for request in held
        if request is not None
    )
    return Counter(operation for operation in operations if operation)
