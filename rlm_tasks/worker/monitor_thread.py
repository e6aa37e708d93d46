"""The beat-scheduled monitor: beat asks, all workers hear it, and the first of them looks.

Decides where the monitor runs: in a thread of a worker's main process.  A message in a queue would
wait behind the very overload it is to report; a broadcast does not, and one that nobody hears does
not pile up.  Refuses to know what is seen."""

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


class MonitorThread(threading.Thread):
    """Waits in a worker's main process to be asked, and counts what waits for a pool that may grow.

    A broker that hangs is waited for here, and not where leases are beaten.
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
        self._asked, self._stopping = threading.Event(), False
        self.queued = 0  # messages that wait for this worker, if it counts them

    def ask(self) -> None:
        """Have a look, unless another worker does."""
        self._asked.set()

    def run(self) -> None:
        """Look each time somebody asks, until stopped."""
        while not self._stopping:
            asked = self._asked.wait(COUNT_EVERY_S if self._count else None)
            self._asked.clear()
            try:
                if self._count and not self._stopping:
                    self.queued = self._count()
                if asked and not self._stopping:
                    self._monitor.look()
            except (*AWAY, StoreUnavailable) as error:
                logger.warning(
                    "The cluster's level is not known, hosts act on their own: %s", error
                )
            except Exception:
                logger.exception("The monitor met something unexpected, and looks again when asked")

    def stop(self) -> None:
        """End the thread; alerts that wait are delivered first."""
        self._stopping = True
        self._asked.set()
        self.join(timeout=5)
        self._alerts.close()
        if self._webhook is not None:
            self._webhook.close()


def monitor_thread(
    app: Celery, runtime: Runtime, slots: Callable[[], int] | None, queues: Callable[[], list[str]]
) -> MonitorThread:
    """Build the monitor of one worker; with `slots` it counts what waits for them, as a growing
    pool must know.
    """
    settings, store = runtime.settings, runtime.ledger.store
    events = Events(store, settings.alerts.history)
    alerts = Alerts(store, settings.alerts, events)
    advised, gauge = settings.autoscale.webhook_url, QueueGauge(app)
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
        waiting = sum(report.depth for report in gauge.read(queues()).values())
        return math.ceil(waiting * slots() / max(runtime.page.slots, slots(), 1)) if slots else 0

    return MonitorThread(monitor, alerts, webhook, count if slots else None)
