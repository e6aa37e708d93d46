"""The thread of a worker that measures the whole platform each time beat asks.

Beat's task is broadcast to all workers, and one of them measures (`scheduler.monitor`).  A message
in a queue would wait behind the overload that it should report; a broadcast does not.  A broadcast
that no worker receives does not pile up.  `bootsteps` starts the thread.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable

from celery import Celery

from resilience.breaker import CircuitBreakers
from resilience.errors import StoreUnavailable
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.messaging.broker import AWAY
from rlm_tasks.messaging.queue_depths import QueueGauge
from scheduler.alerts import Alerts, Webhook
from scheduler.events import Events
from scheduler.monitor import Monitor, MonitorSettings
from scheduler.snapshots import Snapshots

logger = logging.getLogger(__name__)

COUNT_EVERY_S = 1.0
"""The time between two counts of waiting messages, for a pool that may grow."""


class MonitorThread(threading.Thread):
    """Runs the monitor on request, and counts waiting messages for a pool that may grow.

    A broker that hangs blocks this thread, and not the supervisor, which renews leases.
    """

    def __init__(
        self,
        monitor: Monitor,
        alerts: Alerts,
        webhook: Webhook | None = None,
        count: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(name="rlm-monitor", daemon=True)
        self._monitor, self._alerts, self._webhook, self._count = monitor, alerts, webhook, count
        self._requested, self._stopping = threading.Event(), False
        self.queued = 0  # waiting messages for this worker, while it counts them

    def ask(self) -> None:
        """Request a measurement; the monitor makes none if another worker did so just before."""
        self._requested.set()

    def run(self) -> None:
        """Measure on each request, until stopped."""
        while not self._stopping:
            requested = self._requested.wait(COUNT_EVERY_S if self._count else None)
            self._requested.clear()
            try:
                if self._count and not self._stopping:
                    self.queued = self._count()
                if requested and not self._stopping:
                    self._monitor.look()
            except (*AWAY, StoreUnavailable) as error:
                logger.warning(
                    "The cluster's level is not known, hosts act on their own: %s", error
                )
            except Exception:
                logger.exception("The monitor met an unexpected error; the next request runs it")

    def stop(self) -> None:
        """End the thread, after the delivery of waiting alerts."""
        self._stopping = True
        self._requested.set()
        self.join(timeout=5)
        self._alerts.close()
        if self._webhook is not None:
            self._webhook.close()


def monitor_thread(
    app: Celery, runtime: Runtime, slots: Callable[[], int] | None, queues: Callable[[], list[str]]
) -> MonitorThread:
    """Return the monitor thread of one worker.

    With `slots`, the number of this worker's slots, it also counts the messages that wait for them.
    """
    settings, store = runtime.settings, runtime.ledger.store
    events = Events(store, settings.alerts.history)
    alerts = Alerts(store, settings.alerts, events)
    advised, gauge = settings.autoscale.webhook_url, QueueGauge(app, clock=runtime.ledger.clock)
    snapshots = (
        Snapshots(store, runtime.ledger.keys, settings.snapshots)
        if settings.snapshots.enabled
        else None
    )
    webhook = Webhook(advised, settings.alerts.webhook_secret) if advised else None
    monitor = Monitor(
        runtime.board,
        store,
        MonitorSettings(settings.pressure, settings.admission, settings.autoscale),
        usage=runtime.usage,
        breakers=CircuitBreakers(store),
        gauge=gauge.read,
        events=events,
        alerts=alerts,
        room=runtime.waiting_room,
        wake=runtime.delivery.wake,
        webhook=webhook,
        snapshots=snapshots,
        worker=runtime.worker,
    )

    def count() -> int:
        """Return this worker's part of the waiting messages, by its part of all slots."""
        waiting = sum(report.depth for report in gauge.read(queues()).values())
        return math.ceil(waiting * slots() / max(runtime.page.slots, slots(), 1)) if slots else 0

    return MonitorThread(monitor, alerts, webhook, count if slots else None)
